"""The names of tensors in Stable Diffusion files, as tables between them and ours.

Ours are those of the diffusers layout. A single file keeps the names of the code it was trained with: the U-Net has
those of ldm/modules/diffusionmodules/openaimodel.py. The rest is in `published/keys.py`: the text encoder is laid out
as in transformers (SD 1, SDXL's first) or in open_clip (SD 2, SDXL's second).

In templates `{p}` is weight or bias and `{i}` a layer.
"""

from __future__ import annotations

from sfumato.checkpoint.rules import Drop, KeyMap, Rename, Rule, expand, within
from sfumato.families.published import keys as shared
from sfumato.families.published.keys import (
    AVERAGES,
    CONTRASTIVE,
    VAE_PREFIX,
    WB,
    clip_map,
    open_clip_map,
    same,
    text_map,
    vae_folder_map,
    vae_map,
)
from sfumato.nn.unet import UNetConfig

__all__ = [  # all tables of such files, the shared ones with them
    "EXTRAS",
    "UNET_PREFIX",
    "VAE_PREFIX",
    "clip_map",
    "open_clip_map",
    "same",
    "text_map",
    "unet_map",
    "vae_folder_map",
    "vae_map",
]

UNET_PREFIX = shared.DENOISER_PREFIX

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

SCHEDULE = "the noise schedule, which is worked out from its betas"
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
