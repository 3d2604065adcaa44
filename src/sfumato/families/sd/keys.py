"""The names of tensors in Stable Diffusion files, as tables between them and ours.

Ours are those of the diffusers layout. A single file keeps the names of the code it was trained with: the U-Net has
those of ldm/modules/diffusionmodules/openaimodel.py, the VAE those of ldm/modules/diffusionmodules/model.py, the text
encoder those of transformers (SD 1, SDXL's first) or of open_clip (SD 2, SDXL's second).

In templates `{p}` is weight or bias and `{i}` a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.rules import Drop, KeyMap, Rename, Rule, Split, Squeeze, Transpose, expand, within
from sfumato.families.sd.shapes import System, TextPart
from sfumato.nn.unet import UNetConfig
from sfumato.text.clip import ClipConfig

WB = ("weight", "bias")
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

UNET_ENDS = (
    Rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
    Rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
    Rename("input_blocks.0.0.{p}", "conv_in.{p}"),
    Rename("out.0.{p}", "conv_norm_out.{p}"),
    Rename("out.2.{p}", "conv_out.{p}"),
)
UNET_VECTOR = (
    Rename("label_emb.0.0.{p}", "add_embedding.linear_1.{p}"),
    Rename("label_emb.0.2.{p}", "add_embedding.linear_2.{p}"),
)
UNET_RESNET = (
    Rename("in_layers.0.{p}", "norm1.{p}"),
    Rename("in_layers.2.{p}", "conv1.{p}"),
    Rename("emb_layers.1.{p}", "time_emb_proj.{p}"),
    Rename("out_layers.0.{p}", "norm2.{p}"),
    Rename("out_layers.3.{p}", "conv2.{p}"),
)
UNET_SHORTCUT = (Rename("skip_connection.{p}", "conv_shortcut.{p}"),)
UNET_ATTENTION = ("norm.{p}", "proj_in.{p}", "proj_out.{p}")  # these names are the same on both sides …
UNET_BLOCK = tuple(  # … and these
    f"transformer_blocks.{{i}}.{name}"
    for name in (
        *(f"attn{n}.{tensor}" for n in (1, 2) for tensor in ("to_q.weight", "to_k.weight", "to_v.weight")),
        *("attn1.to_out.0.{p}", "attn2.to_out.0.{p}", "norm1.{p}", "norm2.{p}", "norm3.{p}"),
        *("ff.net.0.proj.{p}", "ff.net.2.{p}"),
    )
)

VAE_ENDS = (  # of the encoder and of the decoder
    Rename("conv_in.{p}", "conv_in.{p}"),
    Rename("norm_out.{p}", "conv_norm_out.{p}"),
    Rename("conv_out.{p}", "conv_out.{p}"),
)
VAE_RESNET = ("norm1.{p}", "conv1.{p}", "norm2.{p}", "conv2.{p}")
VAE_SHORTCUT = (Rename("nin_shortcut.{p}", "conv_shortcut.{p}"),)
VAE_ATTENTION = (
    Rename("norm.{p}", "group_norm.{p}"),
    Squeeze("q.weight", "to_q.weight"),
    Squeeze("k.weight", "to_k.weight"),
    Squeeze("v.weight", "to_v.weight"),
    Squeeze("proj_out.weight", "to_out.0.weight"),
    Rename("q.bias", "to_q.bias"),
    Rename("k.bias", "to_k.bias"),
    Rename("v.bias", "to_v.bias"),
    Rename("proj_out.bias", "to_out.0.bias"),
)
VAE_ATTENTION_OLD = tuple(  # diffusers before 0.17
    rule
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    for rule in (Squeeze(f"{old}.weight", f"{new}.weight"), Rename(f"{old}.bias", f"{new}.bias"))
)

CLIP = (
    "embeddings.token_embedding.weight",
    "embeddings.position_embedding.weight",
    "final_layer_norm.{p}",
)
CLIP_LAYER = tuple(
    f"encoder.layers.{{i}}.{name}.{{p}}"
    for name in (
        *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    )
)
OPEN_CLIP = (
    Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rename("ln_final.{p}", "text_model.final_layer_norm.{p}"),
)
OPEN_CLIP_LAYER = (
    Rename("ln_1.{p}", "layer_norm1.{p}"),
    Rename("ln_2.{p}", "layer_norm2.{p}"),
    Split("attn.in_proj_{p}", ("self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}")),
    Rename("attn.out_proj.{p}", "self_attn.out_proj.{p}"),
    Rename("mlp.c_fc.{p}", "mlp.fc1.{p}"),
    Rename("mlp.c_proj.{p}", "mlp.fc2.{p}"),
)

POSITIONS = "the numbers 0 to 76, which need no file"
CONTRASTIVE = "used when CLIP compares texts with pictures, not here"
SCHEDULE = "the noise schedule, which is worked out from its betas"
AVERAGES = "averages kept for further training; the weights beside them are used"
LOSS = "the loss of the VAE's training"
MARKER = "says how the U-Net was trained; detection reads it"
EXTRAS = (
    *(
        Drop(name, SCHEDULE)
        for name in (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "lvlb_weights",
            "denoiser.sigmas",
        )
    ),
    Drop("model_ema.*", AVERAGES),
    Drop("logvar", "the weighting of the training loss"),
    Drop("scale_factor", "the latents' scale, which the family knows"),
    Drop("global_step", "the number of steps trained"),
    Drop("epoch", "the number of epochs trained"),
    Drop("cond_stage_model.logit_scale", CONTRASTIVE),
    Drop("embedding_manager.*", "an embedding of the tool that fine-tuned it"),
    Drop("v_pred", MARKER),
    Drop("ztsnr", MARKER),
)


def same(names: Iterable[str]) -> tuple[Rename, ...]:
    """Rules for names that both layouts share."""
    return tuple(Rename(name, name) for name in names)


def unet_map(config: UNetConfig) -> KeyMap:
    """The U-Net's original names (`input_blocks.…`, without a prefix) to ours (`down_blocks.…`).

    The original numbers blocks through all levels and counts the convolution at the entrance as block 0. It has no
    name for the guidance scale's projection, which keeps ours.
    """
    stride = config.resnets + 1  # blocks of a level, with the down- or upsampling
    last = len(config.channels) - 1
    rules: list[Rule] = [*UNET_ENDS, *(UNET_VECTOR if config.vector else ())]
    if config.time_cond:
        rules += same(["time_embedding.cond_proj.weight"])

    width = config.channels[0]  # of what arrives at a block
    for level, (channels, depth) in enumerate(zip(config.channels, config.depths, strict=True)):
        first, ours = 1 + level * stride, f"down_blocks.{level}."
        for place in range(config.resnets):
            rules += within(f"input_blocks.{first + place}.", ours, _block(channels != width, depth, place))
            width = channels
        if level < last:
            down = Rename("0.op.{p}", "downsamplers.0.conv.{p}")
            rules += within(f"input_blocks.{first + config.resnets}.", ours, [down])

    rules += within("middle_block.0.", "mid_block.resnets.0.", UNET_RESNET)
    rules += within("middle_block.1.", "mid_block.attentions.0.", _transformer(config.mid_depth))
    rules += within("middle_block.2.", "mid_block.resnets.1.", UNET_RESNET)

    for level, depth in enumerate(reversed(config.depths)):
        first, ours = level * stride, f"up_blocks.{level}."
        for place in range(stride):  # what arrives is concatenated with a skip: its width always differs
            rules += within(f"output_blocks.{first + place}.", ours, _block(True, depth, place))
        if level < last:  # the upsampling comes after the transformer, if there is one
            up = Rename(f"{2 if depth else 1}.conv.{{p}}", "upsamplers.0.conv.{p}")
            rules += within(f"output_blocks.{first + config.resnets}.", ours, [up])
    return KeyMap(expand(rules, p=WB))


def _block(shortcut: bool, depth: int, place: int) -> tuple[Rule, ...]:
    """A residual block and the transformer after it."""
    resnet = UNET_RESNET + (UNET_SHORTCUT if shortcut else ())
    return within("0.", f"resnets.{place}.", resnet) + within(
        "1.", f"attentions.{place}.", _transformer(depth)
    )


def _transformer(depth: int) -> tuple[Rule, ...]:
    if not depth:
        return ()
    return same(UNET_ATTENTION) + expand(same(UNET_BLOCK), i=range(depth))


def vae_map(config: KLConfig) -> KeyMap:
    """The VAE's original names (`encoder.down.…`, without a prefix) to ours (`encoder.down_blocks.…`).

    The original numbers the decoder's levels from the finest, as the encoder's; ours follow the data. Its attention is
    made of 1×1 convolutions, ours of linear layers.
    """
    widths, last = config.widths, len(config.widths) - 1
    resnet, wider = same(VAE_RESNET), same(VAE_RESNET) + VAE_SHORTCUT
    rules: list[Rule] = []
    if config.use_quant_conv:
        rules += same(["quant_conv.{p}"])
    if config.use_post_quant_conv:
        rules += same(["post_quant_conv.{p}"])
    for half in ("encoder.", "decoder."):
        rules += within(half, half, VAE_ENDS)
        rules += within(f"{half}mid.block_1.", f"{half}mid_block.resnets.0.", resnet)
        rules += within(f"{half}mid.block_2.", f"{half}mid_block.resnets.1.", resnet)
        if config.mid_attention:
            rules += within(f"{half}mid.attn_1.", f"{half}mid_block.attentions.0.", VAE_ATTENTION)
    for level in range(last + 1):  # from the finest
        coarser, finer = widths[min(level + 1, last)], widths[max(level - 1, 0)]
        down, up = f"encoder.down_blocks.{level}.", f"decoder.up_blocks.{last - level}."
        for place in range(config.resnets):
            block = wider if place == 0 and widths[level] != finer else resnet
            rules += within(f"encoder.down.{level}.block.{place}.", f"{down}resnets.{place}.", block)
        for place in range(config.resnets + 1):
            block = wider if place == 0 and widths[level] != coarser else resnet
            rules += within(f"decoder.up.{level}.block.{place}.", f"{up}resnets.{place}.", block)
        if level < last:
            rules.append(
                Rename(f"encoder.down.{level}.downsample.conv.{{p}}", f"{down}downsamplers.0.conv.{{p}}")
            )
        if level > 0:
            rules.append(Rename(f"decoder.up.{level}.upsample.conv.{{p}}", f"{up}upsamplers.0.conv.{{p}}"))
    return KeyMap(expand(rules, p=WB), (Drop("loss.*", LOSS), Drop("model_ema.*", AVERAGES)))


def clip_map(config: ClipConfig) -> KeyMap:
    """A CLIP text encoder's names in transformers to ours, which are those with `text_model.`.

    transformers 5.6 and later save `CLIPTextModel` without that prefix, earlier ones with it.
    """
    names = expand(same(CLIP), p=WB) + expand(same(CLIP_LAYER), i=range(config.layers), p=WB)
    rules = within("text_model.", "text_model.", names)
    drops = [Drop(f"{at}embeddings.position_ids", POSITIONS) for at in ("text_model.", "")]
    drops += [Drop("logit_scale", CONTRASTIVE)]
    if config.projection:
        rules += (Rename("text_projection.weight", "text_projection.weight"),)
    else:
        drops += [Drop("text_projection.weight", CONTRASTIVE), Drop("text_projection", CONTRASTIVE)]
    return KeyMap(rules, tuple(drops)).also(*within("", "text_model.", names))


def open_clip_map(config: ClipConfig) -> KeyMap:
    """A text encoder's names in open_clip to ours. What is not used of its last block is dropped by name."""
    layers = within(
        "transformer.resblocks.{i}.", "text_model.encoder.layers.{i}.", expand(OPEN_CLIP_LAYER, p=WB)
    )
    rules = expand(OPEN_CLIP, p=WB) + expand(layers, i=range(config.layers))
    drops = [
        Drop("logit_scale", CONTRASTIVE),
        Drop("transformer.text_model.embeddings.position_ids", POSITIONS),  # some tools write it
    ]
    if config.projection:
        # open_clip multiplies by the matrix itself; some tools write the linear layer's under this name
        rules += (Transpose("text_projection", "text_projection.weight"),)
        return KeyMap(rules, tuple(drops)).also(Rename("text_projection.weight", "text_projection.weight"))
    unused = "the last block, which is not used: the text's features are those before it"
    drops += [
        Drop(f"transformer.resblocks.{config.layers}.*", unused),
        Drop("text_projection", CONTRASTIVE),
        Drop("text_projection.weight", CONTRASTIVE),
    ]
    return KeyMap(rules, tuple(drops))


def text_map(part: TextPart) -> KeyMap:
    """The layout in which single files keep this encoder, to ours."""
    return open_clip_map(part.config) if part.open_clip else clip_map(part.config)


def folder_maps(system: System) -> dict[str, KeyMap]:
    """For each part of a diffusers folder, its names to ours: the same, save for older spellings and buffers."""
    maps = {"unet": KeyMap(same(unet_map(system.unet).ours)), "vae": vae_folder_map(system.vae)}
    return maps | {part.name: clip_map(part.config) for part in system.text}


def vae_folder_map(config: KLConfig) -> KeyMap:
    """The VAE's names in a diffusers folder to ours: the same, or those of its attention before diffusers 0.17."""
    places = [f"{half}.mid_block.attentions.0." for half in ("encoder", "decoder")]
    old = [rule for place in places for rule in within(place, place, VAE_ATTENTION_OLD)]
    return KeyMap(same(vae_map(config).ours)).also(*(old if config.mid_attention else ()))


def prefixes(system: System, names: Iterable[str] | None = None) -> dict[str, str]:
    """Part to its prefix in a single file: of those that `names` hold; without names, of all as we write them."""
    known = {"unet": (UNET_PREFIX,), "vae": (VAE_PREFIX,)} | {
        part.name: part.prefixes for part in system.text
    }
    if names is None:
        return {part: choices[0] for part, choices in known.items()}
    names = tuple(names)
    heads = {prefix for prefix in sum(known.values(), ()) for name in names if name.startswith(prefix)}
    found = {part: next((p for p in choices if p in heads), None) for part, choices in known.items()}
    return {part: prefix for part, prefix in found.items() if prefix}


def file_map(system: System, places: Mapping[str, str] | None = None) -> KeyMap:
    """The whole of a single file to ours, a part's names under `unet.`, `vae.`, `text_encoder.`, `text_encoder_2.`.

    places: the parts that a file has and their prefixes, from `prefixes`; None is the complete file as we write it.
    What real files hold beside their networks is dropped by name.
    """
    maps = {"unet": unet_map(system.unet), "vae": vae_map(system.vae)}
    maps |= {part.name: text_map(part) for part in system.text}
    whole = KeyMap((), EXTRAS)
    for part, prefix in (prefixes(system) if places is None else places).items():
        whole |= maps[part].within(prefix, f"{part}.")
    return whole
