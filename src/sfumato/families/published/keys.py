"""The names of tensors that families of checkpoints have in common: those of autoencoders and of text encoders.

Ours are those of the diffusers layout. A single file keeps the names of the code it was trained with: the VAE has those
of ldm/modules/diffusionmodules/model.py, a text encoder those of transformers or of open_clip.

In templates `{p}` is weight or bias and `{i}` a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.rules import (
    Drop,
    Eye,
    KeyMap,
    Rename,
    Rule,
    Split,
    Squeeze,
    Transpose,
    expand,
    within,
)
from sfumato.text.clip import PROJECTION, ClipConfig
from sfumato.text.t5 import T5Config
from sfumato.text.vision import PROJECTION as VISUAL_PROJECTION
from sfumato.text.vision import ClipVisionConfig

if TYPE_CHECKING:
    from sfumato.families.published.kinds import Kind, TextPart

WB = ("weight", "bias")
DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

VAE_ENDS = (  # of the encoder and of the decoder
    Rename("conv_in.{p}", "conv_in.{p}"),
    Rename("norm_out.{p}", "conv_norm_out.{p}"),
    Rename("conv_out.{p}", "conv_out.{p}"),
)
VAE_RESNET = ("norm1.{p}", "conv1.{p}", "norm2.{p}", "conv2.{p}")
VAE_SHORTCUT = (Rename("nin_shortcut.{p}", "conv_shortcut.{p}"),)
VAE_TEMPORAL = (  # of a block that mixes frames, beside its spatial half
    Rename("time_stack.in_layers.0.{p}", "temporal_res_block.norm1.{p}"),
    Rename("time_stack.in_layers.2.{p}", "temporal_res_block.conv1.{p}"),
    Rename("time_stack.out_layers.0.{p}", "temporal_res_block.norm2.{p}"),
    Rename("time_stack.out_layers.3.{p}", "temporal_res_block.conv2.{p}"),
    Rename("mix_factor", "time_mixer.mix_factor"),
)
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

VISION = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.pre_layrnorm.{p}",
    "vision_model.post_layernorm.{p}",
    VISUAL_PROJECTION,
)
OPEN_CLIP_VISION = (
    Rename("class_embedding", "vision_model.embeddings.class_embedding"),
    Rename("conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    Rename("positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    Rename("ln_pre.{p}", "vision_model.pre_layrnorm.{p}"),
    Rename("ln_post.{p}", "vision_model.post_layernorm.{p}"),
    Transpose("proj", VISUAL_PROJECTION),  # open_clip multiplies by the matrix itself
)

T5_LAYER = tuple(
    f"encoder.block.{{i}}.layer.{name}.weight"
    for name in (
        *(f"0.SelfAttention.{matrix}" for matrix in "qkvo"),
        *(
            "0.layer_norm",
            "1.DenseReluDense.wi_0",
            "1.DenseReluDense.wi_1",
            "1.DenseReluDense.wo",
            "1.layer_norm",
        ),
    )
)
T5_ENDS = (
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm.weight",
)
T5_TABLE, T5_TWIN = "shared.weight", "encoder.embed_tokens.weight"  # the same numbers; files have one or both

POSITIONS = "the numbers 0 to 76, which need no file"
CONTRASTIVE = "used when CLIP compares texts with pictures, not here"
AVERAGES = "averages kept for further training; the weights beside them are used"
LOSS = "the loss of the VAE's training"
TWIN = "the same table of tokens once more"


def same(names: Iterable[str]) -> tuple[Rename, ...]:
    """Rules for names that both layouts share."""
    return tuple(Rename(name, name) for name in names)


def vae_map(config: KLConfig) -> KeyMap:
    """The VAE's original names (`encoder.down.…`, without a prefix) to ours (`encoder.down_blocks.…`).

    The original numbers the decoder's levels from the finest, as the encoder's; ours follow the data. Its attention is
    made of 1×1 convolutions, ours of linear layers.
    """
    widths, last = config.widths, len(config.widths) - 1
    plain, wider = same(VAE_RESNET), same(VAE_RESNET) + VAE_SHORTCUT
    rules: list[Rule] = []

    def resnet(half: str, shortcut: bool = False) -> tuple[Rule, ...]:
        block = wider if shortcut else plain
        if config.temporal and half == "decoder.":
            return within("", "spatial_res_block.", block) + VAE_TEMPORAL
        return block

    if config.use_quant_conv:
        rules += same(["quant_conv.{p}"])
    if config.use_post_quant_conv:
        rules += same(["post_quant_conv.{p}"])
    for half in ("encoder.", "decoder."):
        rules += within(half, half, VAE_ENDS)
        rules += within(f"{half}mid.block_1.", f"{half}mid_block.resnets.0.", resnet(half))
        rules += within(f"{half}mid.block_2.", f"{half}mid_block.resnets.1.", resnet(half))
        if config.mid_attention:
            rules += within(f"{half}mid.attn_1.", f"{half}mid_block.attentions.0.", VAE_ATTENTION)
    for level in range(last + 1):  # from the finest
        coarser, finer = widths[min(level + 1, last)], widths[max(level - 1, 0)]
        down, up = f"encoder.down_blocks.{level}.", f"decoder.up_blocks.{last - level}."
        for place in range(config.resnets):
            block = resnet("encoder.", place == 0 and widths[level] != finer)
            rules += within(f"encoder.down.{level}.block.{place}.", f"{down}resnets.{place}.", block)
        for place in range(config.resnets + 1):
            block = resnet("decoder.", place == 0 and widths[level] != coarser)
            rules += within(f"decoder.up.{level}.block.{place}.", f"{up}resnets.{place}.", block)
        if level < last:
            rules.append(
                Rename(f"encoder.down.{level}.downsample.conv.{{p}}", f"{down}downsamplers.0.conv.{{p}}")
            )
        if level > 0:
            rules.append(Rename(f"decoder.up.{level}.upsample.conv.{{p}}", f"{up}upsamplers.0.conv.{{p}}"))
    if config.temporal:
        rules.append(Rename("decoder.conv_out.time_mix_conv.{p}", "decoder.time_conv_out.{p}"))
    return KeyMap(expand(rules, p=WB), (Drop("loss.*", LOSS), Drop("model_ema.*", AVERAGES)))


def vae_folder_map(config: KLConfig) -> KeyMap:
    """The VAE's names in a diffusers folder to ours: the same, or those of its attention before diffusers 0.17."""
    places = [f"{half}.mid_block.attentions.0." for half in ("encoder", "decoder")]
    old = [rule for place in places for rule in within(place, place, VAE_ATTENTION_OLD)]
    return KeyMap(same(vae_map(config).ours)).also(*(old if config.mid_attention else ()))


def clip_map(config: ClipConfig, held: Collection[str] | None = None) -> KeyMap:
    """A CLIP text encoder's names in transformers to ours, which are those with `text_model.`.

    transformers 5.6 and later save `CLIPTextModel` without that prefix, earlier ones with it. held: the names of a
    file; one without the projection that the config has was trained with one that changes nothing, where widths allow.
    """
    names = expand(same(CLIP), p=WB) + expand(same(CLIP_LAYER), i=range(config.layers), p=WB)
    rules = within("text_model.", "text_model.", names)
    drops = [Drop(f"{at}embeddings.position_ids", POSITIONS) for at in ("text_model.", "")]
    drops += [Drop("logit_scale", CONTRASTIVE)]
    if (
        config.projection
        and config.projection == config.width
        and held is not None
        and PROJECTION not in held
    ):
        rules += (Eye(PROJECTION, config.width),)
    elif config.projection:
        rules += (Rename(PROJECTION, PROJECTION),)
    else:
        drops += [Drop(PROJECTION, CONTRASTIVE), Drop("text_projection", CONTRASTIVE)]
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


def vision_map(config: ClipVisionConfig) -> KeyMap:
    """The names of CLIP's picture encoder in transformers, which are ours."""
    layers = tuple(f"vision_model.{name}" for name in CLIP_LAYER)
    names = expand(same(VISION), p=WB) + expand(same(layers), i=range(config.layers), p=WB)
    return KeyMap(names, (Drop("vision_model.embeddings.position_ids", POSITIONS),))


def open_clip_vision_map(config: ClipVisionConfig) -> KeyMap:
    """A picture encoder's names in open_clip to ours."""
    layers = within(
        "transformer.resblocks.{i}.", "vision_model.encoder.layers.{i}.", expand(OPEN_CLIP_LAYER, p=WB)
    )
    return KeyMap(expand(OPEN_CLIP_VISION, p=WB) + expand(layers, i=range(config.layers)))


def t5_map(config: T5Config, held: Collection[str] | None = None) -> KeyMap:
    """The names of T5's encoder, which are the same everywhere but for its table of tokens. held: the names of a file,
    which may have the table under another name, or twice.
    """
    rules = same(T5_ENDS) + expand(same(T5_LAYER), i=range(config.layers))
    if held is not None and T5_TWIN in held and T5_TABLE not in held:
        return KeyMap((*rules, Rename(T5_TWIN, T5_TABLE)))
    return KeyMap(
        (*rules, Rename(T5_TABLE, T5_TABLE)), (Drop(T5_TWIN, TWIN), Drop("logit_scale", CONTRASTIVE))
    )


def text_map(part: TextPart, held: Collection[str] | None = None) -> KeyMap:
    """The layout in which single files keep this encoder, to ours. held: the names of one; None is to write it."""
    if part.open_clip and isinstance(part.config, ClipConfig):
        return open_clip_map(part.config)
    if part.open_clip and isinstance(part.config, ClipVisionConfig):
        return open_clip_vision_map(part.config)
    return text_folder_map(part, held)


def text_folder_map(part: TextPart, held: Collection[str] | None = None) -> KeyMap:
    """The layout of transformers, to ours."""
    if isinstance(part.config, T5Config):
        return t5_map(part.config, held)
    if isinstance(part.config, ClipVisionConfig):
        return vision_map(part.config)
    return clip_map(part.config, held)


def prefixes(kind: Kind, denoiser: str, names: Iterable[str] | None = None) -> dict[str, str]:
    """Part to its prefix in a single file: of those that `names` hold; without names, of all as we write them.

    denoiser: what the part that draws is called.
    """
    known = {denoiser: (DENOISER_PREFIX,), "vae": (VAE_PREFIX,)} | {
        part.name: part.prefixes for part in kind.text
    }
    if names is None:
        return {part: choices[0] for part, choices in known.items()}
    names = tuple(names)
    heads = {prefix for prefix in sum(known.values(), ()) for name in names if name.startswith(prefix)}
    found = {part: next((p for p in choices if p in heads), None) for part, choices in known.items()}
    return {part: prefix for part, prefix in found.items() if prefix}


def file_map(
    kind: Kind,
    denoiser: tuple[str, KeyMap],
    places: Mapping[str, str],
    extras: tuple[Drop, ...],
    names: Collection[str] | None = None,
) -> KeyMap:
    """The whole of a single file to ours, a part's names under `vae.`, `text_encoder.` and so on.

    denoiser: the name of the part that draws, and its map. places: the parts that a file has and their prefixes, from
    `prefixes`. extras: what files hold beside their networks. names: all of the file's, None to write one.
    """
    whole = KeyMap((), extras)
    texts = {part.name: part for part in kind.text}
    for part, prefix in places.items():
        if part == denoiser[0]:
            table = denoiser[1]
        elif part == "vae":
            table = vae_map(kind.vae)
        else:
            held = None if names is None else {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
            table = text_map(texts[part], held)
        whole |= table.within(prefix, f"{part}.")
    return whole


def folder_map(kind: Kind, denoiser: tuple[str, KeyMap], part: str, names: Collection[str]) -> KeyMap:
    """A part's names in a diffusers folder to ours: the same, save for older spellings, twins and buffers."""
    if part == denoiser[0]:
        return KeyMap(same(denoiser[1].ours))
    if part == "vae":
        return vae_folder_map(kind.vae)
    return text_folder_map(next(text for text in kind.text if text.name == part), names)
