"""The marks by which Stable Video Diffusion is told apart, and its neighbours that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.checkpoint.detect import Shape, Signature
from sfumato.families.published.keys import DENOISER_PREFIX, VAE_PREFIX
from sfumato.families.published.signatures import refused
from sfumato.families.svd.shapes import SAME_TENSORS, SYSTEMS, System
from sfumato.nn.spacetime import SpaceTimeConfig

OTHERS = (256, 512, 1280)  # widths of what SV3D and SV4D are told, which have the same U-Net
LABELS = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")


def _marks(config: SpaceTimeConfig, original: bool) -> dict[str, Shape]:
    """The tensors that tell the U-Net apart: entrance, exit, what it is told, and what mixes frames."""
    first, level = config.channels[0], next(i for i, depth in enumerate(config.depths) if depth)
    width = config.channels[level]
    if original:
        block = f"input_blocks.{1 + level * (config.resnets + 1)}."
        entrance, label, exit_ = "input_blocks.0.0", LABELS[0], "out.2"
        mixer, conv = f"{block}0.time_mixer.mix_factor", f"{block}0.time_stack.in_layers.2.weight"
        reader = f"{block}1.time_stack.0.attn2.to_k.weight"
    else:
        block = f"down_blocks.{level}."
        entrance, label, exit_ = "conv_in", LABELS[1], "conv_out"
        mixer = f"{block}resnets.0.time_mixer.mix_factor"
        conv = f"{block}resnets.0.temporal_res_block.conv1.weight"
        reader = f"{block}attentions.0.temporal_transformer_blocks.0.attn2.to_k.weight"
    return {
        f"{entrance}.weight": (first, config.in_channels, 3, 3),
        f"{exit_}.weight": (config.out_channels, first, 3, 3),
        label: (config.time_width, config.told * config.waves),
        mixer: (1,),
        conv: (width, width, 3, 1, 1),
        reader: (width, config.context),
    }


def _neighbours() -> list[Signature]:
    mixers = ("input_blocks.1.0.time_mixer.mix_factor", "down_blocks.0.resnets.0.time_mixer.mix_factor")
    told: list[dict[str, Shape | None]] = [
        {f"{prefix}{mixer}": None, f"{prefix}{label}": (None, width)}
        for mixer, label in zip(mixers, LABELS, strict=True)
        for prefix in (DENOISER_PREFIX, "")
        for width in OTHERS
    ]
    return [
        *refused("an SV3D or SV4D checkpoint (views of an object), not supported", *told),
        *refused(
            "a Stable Video Diffusion with a decoder of pictures (svd_image_decoder); take svd.safetensors or "
            "svd_xt.safetensors, and for such a decoder give --vae",
            {
                f"{DENOISER_PREFIX}{mixers[0]}": None,
                f"{VAE_PREFIX}decoder.mid.block_1.conv1.weight": None,
            },
            without=(f"{VAE_PREFIX}decoder.mid.block_1.time_stack.in_layers.0.weight",),
        ),
    ]


def signatures(systems: Mapping[str, System] = SYSTEMS) -> tuple[Signature, ...]:
    """All of them: U-Nets that we read, alone and in whole files, in both layouts; and what is refused."""
    found = []
    for kind, system in systems.items():
        if kind in SAME_TENSORS:
            continue
        for layout, part, prefix in (
            ("original", "checkpoint", DENOISER_PREFIX),
            ("original", "unet", ""),
            ("diffusers", "unet", ""),
        ):
            marks = _marks(system.unet, original=layout == "original")
            required = {prefix + name: shape for name, shape in marks.items()}
            found.append(Signature(kind, part, layout, required, prefix=prefix))
    return (*found, *_neighbours())
