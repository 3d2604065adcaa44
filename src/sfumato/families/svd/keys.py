"""The names of tensors in Stable Video Diffusion files, as tables between them and ours.

Ours are those of the diffusers layout. A single file keeps the names of Stability-AI/generative-models: the U-Net's are
those of Stable Diffusion, with `time_stack` and `time_mixer` beside them (sgm/modules/diffusionmodules/video_model.py).

Two autoencoders lie in such a file. The conditioner's, that of Stable Diffusion 2, encodes the picture; the first
stage's decodes clips, and its own encoder, which lacks the convolution after it, draws nothing. A diffusers folder has
the encoder of the one and the decoder of the other, and so have we. Files that were pruned of the first, or written by
other programs, have the second's alone, which is taken then.

In templates `{p}` is weight or bias and `{i}` a layer.
"""

from __future__ import annotations

from collections.abc import Collection

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.rules import Drop, Eye, KeyMap, Rename, Rule, expand, within
from sfumato.families.published import keys as shared
from sfumato.families.published.keys import AVERAGES, CONTRASTIVE, VAE_PREFIX, WB, same, vae_map
from sfumato.nn.spacetime import SpaceTimeConfig

UNET_PREFIX = shared.DENOISER_PREFIX
CONDITIONER = "conditioner.embedders.3.encoder."  # the autoencoder that encodes the picture
CLIP = "conditioner.embedders.0.open_clip."

ENDS = (
    Rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
    Rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
    Rename("label_emb.0.0.{p}", "add_embedding.linear_1.{p}"),
    Rename("label_emb.0.2.{p}", "add_embedding.linear_2.{p}"),
    Rename("input_blocks.0.0.{p}", "conv_in.{p}"),
    Rename("out.0.{p}", "conv_norm_out.{p}"),
    Rename("out.2.{p}", "conv_out.{p}"),
)
HALF = (  # of a residual block: of frames, and of clips
    Rename("in_layers.0.{p}", "norm1.{p}"),
    Rename("in_layers.2.{p}", "conv1.{p}"),
    Rename("emb_layers.1.{p}", "time_emb_proj.{p}"),
    Rename("out_layers.0.{p}", "norm2.{p}"),
    Rename("out_layers.3.{p}", "conv2.{p}"),
)
MIXER = Rename("time_mixer.mix_factor", "time_mixer.mix_factor")
SHORTCUT = (Rename("skip_connection.{p}", "spatial_res_block.conv_shortcut.{p}"),)
TRANSFORMER = (
    Rename("norm.{p}", "norm.{p}"),
    Rename("proj_in.{p}", "proj_in.{p}"),
    Rename("proj_out.{p}", "proj_out.{p}"),
    Rename("time_pos_embed.0.{p}", "time_pos_embed.linear_1.{p}"),
    Rename("time_pos_embed.2.{p}", "time_pos_embed.linear_2.{p}"),
    MIXER,
)
SPATIAL = tuple(  # of a transformer's block, named alike on both sides
    name
    for name in (
        *(f"attn{n}.{tensor}" for n in (1, 2) for tensor in ("to_q.weight", "to_k.weight", "to_v.weight")),
        *("attn1.to_out.0.{p}", "attn2.to_out.0.{p}", "norm1.{p}", "norm2.{p}", "norm3.{p}"),
        *("ff.net.0.proj.{p}", "ff.net.2.{p}"),
    )
)
TEMPORAL = (*SPATIAL, "norm_in.{p}", "ff_in.net.0.proj.{p}", "ff_in.net.2.{p}")

UNUSED_DECODER = "the decoder of pictures beside the encoder that is used; the first stage's decodes clips"
UNUSED_ENCODER = "the first stage's encoder; the conditioner's, which encoded pictures in training, is used"
EXTRAS = (
    Drop("model_ema.*", AVERAGES),
    Drop("denoiser.sigmas", "the noise levels, which the family knows"),
    Drop("model_sampling.*", "the noise levels, which the family knows"),
    *(
        Drop(f"{CLIP}model.{name}", CONTRASTIVE)
        for name in (
            "logit_scale",
            "positional_embedding",
            "text_projection",
            "token_embedding.weight",
            "ln_final.*",
            "transformer.*",
            "attn_mask",
        )
    ),
)


def unet_map(config: SpaceTimeConfig) -> KeyMap:
    """The U-Net's original names (`input_blocks.…`, without a prefix) to ours (`down_blocks.…`).

    The original numbers blocks through all levels and counts the convolution at the entrance as block 0.
    """
    stride = config.resnets + 1  # blocks of a level, with the down- or upsampling
    last = len(config.channels) - 1
    rules: list[Rule] = list(ENDS)
    width = config.channels[0]  # of what arrives at a block
    for level, (channels, depth) in enumerate(zip(config.channels, config.depths, strict=True)):
        first, ours = 1 + level * stride, f"down_blocks.{level}."
        for place in range(config.resnets):
            rules += within(f"input_blocks.{first + place}.", ours, _block(channels != width, depth, place))
            width = channels
        if level < last:
            down = Rename("0.op.{p}", "downsamplers.0.conv.{p}")
            rules += within(f"input_blocks.{first + config.resnets}.", ours, [down])

    rules += within("middle_block.0.", "mid_block.resnets.0.", _resnet(False))
    rules += within("middle_block.1.", "mid_block.attentions.0.", _transformer(config.mid_depth))
    rules += within("middle_block.2.", "mid_block.resnets.1.", _resnet(False))

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
    return within("0.", f"resnets.{place}.", _resnet(shortcut)) + within(
        "1.", f"attentions.{place}.", _transformer(depth)
    )


def _resnet(shortcut: bool) -> tuple[Rule, ...]:
    """Its half of frames, its half of clips, and what mixes the two."""
    halves = within("", "spatial_res_block.", HALF) + within("time_stack.", "temporal_res_block.", HALF)
    return (*halves, MIXER, *(SHORTCUT if shortcut else ()))


def _transformer(depth: int) -> tuple[Rule, ...]:
    if not depth:
        return ()
    blocks = within("transformer_blocks.{i}.", "transformer_blocks.{i}.", same(SPATIAL))
    blocks += within("time_stack.{i}.", "temporal_transformer_blocks.{i}.", same(TEMPORAL))
    return TRANSFORMER + expand(blocks, i=range(depth))


def encoder_map(config: KLConfig) -> KeyMap:
    """The VAE's encoder alone, and not the convolution after it."""
    return KeyMap(tuple(rule for rule in vae_map(config).rules if str(rule.ours).startswith("encoder.")))


def first_stage_map(config: KLConfig, names: Collection[str] | None = None) -> KeyMap:
    """The VAE of a whole file to ours, prefixes and all. names: the file's; one may have the first stage's alone."""
    pruned = names is not None and not any(name.startswith(CONDITIONER) for name in names)
    whole, encoder = vae_map(config), encoder_map(config)
    decoder = KeyMap(tuple(rule for rule in whole.rules if str(rule.ours).startswith("decoder.")))
    if pruned:
        width = 2 * config.latent_channels
        quant = (Eye("quant_conv.weight", width, ndim=4), Eye("quant_conv.bias", width, ndim=1))
        return KeyMap((*(encoder | decoder).within(VAE_PREFIX, "").rules, *quant))
    quant_conv = KeyMap(tuple(rule for rule in whole.rules if str(rule.ours).startswith("quant_conv.")))
    drops = (
        Drop(f"{VAE_PREFIX}encoder.*", UNUSED_ENCODER),
        Drop(f"{CONDITIONER}decoder.*", UNUSED_DECODER),
        Drop(f"{CONDITIONER}post_quant_conv.*", UNUSED_DECODER),
    )
    placed = (encoder | quant_conv).within(CONDITIONER, "") | decoder.within(VAE_PREFIX, "")
    return KeyMap(placed.rules, drops)
