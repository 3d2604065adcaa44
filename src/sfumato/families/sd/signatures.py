"""The marks by which U-Nets of Stable Diffusion are told apart, and their neighbours that are refused by name.

Whether an SD 2 predicts noise or v no name or shape tells; it is guessed from its numbers (`predicts_v`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sfumato.checkpoint.detect import Shape, Signature
from sfumato.families.lora import CONTEXTS, TITLES
from sfumato.families.published.signatures import refused
from sfumato.families.sd.keys import UNET_PREFIX
from sfumato.families.sd.shapes import SYSTEMS, System
from sfumato.nn.unet import UNetConfig

# names at the top of a single file that say how it was trained (ComfyUI, comfy/supported_models.py, which reads them
# for SDXL; here they are read for all)
MARKERS: dict[tuple[str, ...], dict[str, Any]] = {
    (): {},
    ("v_pred",): {"prediction": "v"},
    ("v_pred", "ztsnr"): {"prediction": "v", "zero_snr": True},
}
HINTS = (
    "input_hint_block.0.weight",
    "controlnet_cond_embedding.conv_in.weight",
)  # of ControlNets, in either naming
COND = "time_embedding.cond_proj.weight"  # of a U-Net that is told the guidance scale
V_DEVIATION = 0.09


def predicts_v(unet: Mapping[str, Tensor], config: UNetConfig) -> bool:
    """Whether an SD 2 U-Net predicts v, by the spread of one bias in its last transformer: above 0.09 in those that do.

    unet: tensors under our names; one is read. A rule of thumb of ComfyUI's (comfy/supported_models.py, class SD20),
    and nothing better is in the file; an explicit choice of the user comes before it. Inpainting models predict noise.
    """
    last = f"up_blocks.{len(config.channels) - 1}.attentions.{config.resnets}"
    return float(unet[f"{last}.transformer_blocks.0.norm1.bias"].float().std(correction=0)) > V_DEVIATION


def _unet_marks(config: UNetConfig, original: bool) -> dict[str, Shape]:
    """The tensors that tell U-Nets apart: entrance, exit, width of the text, deepest transformer, and vector."""
    first, level = config.channels[0], next(i for i, depth in enumerate(config.depths) if depth)
    deep = len(config.depths) - 1 - next(i for i, depth in enumerate(reversed(config.depths)) if depth)
    width, narrow = config.channels[deep], config.channels[level]
    blocks = config.resnets + 1
    if original:
        entrance, time, vector, exit_ = "input_blocks.0.0", "time_embed.0", "label_emb.0.0", "out.2"
        shallow, deepest = f"input_blocks.{1 + level * blocks}.1", f"input_blocks.{2 + deep * blocks}.1"
        end = f"output_blocks.{len(config.channels) * blocks - 1}.0.in_layers.2"
    else:
        entrance, time, vector = "conv_in", "time_embedding.linear_1", "add_embedding.linear_1"
        exit_, end = "conv_out", f"up_blocks.{len(config.channels) - 1}.resnets.{config.resnets}.conv1"
        shallow, deepest = f"down_blocks.{level}.attentions.0", f"down_blocks.{deep}.attentions.1"
    last = config.depths[deep] - 1
    marks: dict[str, Shape] = {
        f"{entrance}.weight": (first, config.in_channels, 3, 3),
        f"{exit_}.weight": (4, first, 3, 3),
        f"{time}.weight": (4 * first, first),
        f"{end}.weight": (first, 2 * first, 3, 3),
        f"{shallow}.proj_in.weight": (narrow, narrow) if config.linear else (narrow, narrow, 1, 1),
        f"{shallow}.transformer_blocks.0.attn2.to_k.weight": (narrow, config.context),
        f"{deepest}.transformer_blocks.{last}.attn2.to_k.weight": (width, config.context),
    }
    if config.time_cond:
        marks[COND] = (first, config.time_cond)
    if config.vector:
        marks[f"{vector}.weight"] = (4 * first, config.vector)
    return marks


def _unets(systems: Mapping[str, System]) -> list[Signature]:
    found = []
    for kind, system in systems.items():
        for layout, part, prefix in (
            ("original", "checkpoint", UNET_PREFIX),
            ("original", "unet", ""),
            ("diffusers", "unet", ""),
        ):
            own = _unet_marks(system.unet, original=layout == "original")
            marks = {prefix + name: shape for name, shape in own.items()}
            absent = [] if system.unet.vector else ["label_emb.*", "add_embedding.*", "class_embedding.*"]
            absent += [] if system.unet.time_cond else [COND]
            for names, traits in MARKERS.items():
                forbidden = [prefix + name for name in absent]
                forbidden += [name for name in ("v_pred", "ztsnr") if name not in names]
                required = marks | dict.fromkeys(names)
                found.append(Signature(kind, part, layout, required, tuple(forbidden), prefix, traits))
    return found


def _neighbours() -> list[Signature]:
    """What resembles a Stable Diffusion file, or is kept beside one, and is none that we can use."""
    entrances = (f"{UNET_PREFIX}input_blocks.0.0.weight", "input_blocks.0.0.weight", "conv_in.weight")
    middles: tuple[str, ...] = (
        f"{UNET_PREFIX}middle_block.0.in_layers.2.weight",
        "middle_block.0.in_layers.2.weight",
    )
    middles += ("mid_block.resnets.0.conv1.weight",)

    def channels(count: int, *widths: int) -> list[dict[str, Shape | None]]:
        """U-Nets whose entrance reads this many channels."""
        return [
            {entrance: (width, count, 3, 3), middle: None}
            for entrance, middle in zip(entrances, middles, strict=True)
            for width in widths
        ]

    return [
        *refused(
            "a ControlNet; it belongs on a model (--controlnet KIND=FILE), and is not one",
            "control_model.time_embed.0.weight",
            "input_hint_block.0.weight",
            "controlnet_cond_embedding.conv_in.weight",
        ),
        *refused("an AnimateDiff motion module, not supported", "*motion_modules.0.temporal_transformer.*"),
        *refused(
            "an InstructPix2Pix (8 input channels), not supported",
            *channels(8, 320),
            without=("*.time_mixer.mix_factor",),
        ),
        *refused("a depth-guided SD 2 (5 input channels), not supported", *channels(5, 320)),
        *refused("the x4 upscaler (7 input channels), not supported", *channels(7, 256)),
        *refused("a Zero123 checkpoint, not supported", "cc_projection.weight"),
        *refused(
            "an unCLIP checkpoint of SD 2, not supported",
            *(
                {f"{prefix}{name}": (1280, width)}
                for name in ("label_emb.0.0.weight", "class_embedding.linear_1.weight")
                for prefix in (UNET_PREFIX, "")
                for width in (1536, 2048)
            ),
        ),
        *refused(
            "a distilled SDXL with blocks left out (SSD-1B, Vega, KOALA), not supported",
            {f"{UNET_PREFIX}label_emb.0.0.weight": (1280, 2816)},
            {"label_emb.0.0.weight": (1280, 2816)},
            {"add_embedding.linear_1.weight": (1280, 2816), "conv_out.weight": None},
            without=(
                "*input_blocks.8.1.transformer_blocks.9.*",
                "down_blocks.2.attentions.1.transformer_blocks.9.*",
            ),
        ),
        *refused("a Playground v2.5 checkpoint (EDM), not supported", "edm_mean"),
        *refused("a CosXL checkpoint (EDM v-prediction), not supported", "edm_vpred.sigma_max"),
    ]


def signatures(systems: Mapping[str, System] = SYSTEMS) -> tuple[Signature, ...]:
    """All of them: U-Nets that we read, alone and in whole files, in both layouts; and those that we refuse."""
    return (*_unets(systems), *_neighbours())


def control_title(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str:
    """What the models are called that a ControlNet is for; "" of a file that is none of theirs."""
    if not any(name.endswith(HINTS) for name in shapes):
        return ""
    width = next((shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), 0)
    return TITLES[CONTEXTS[width]] if width in CONTEXTS else "Stable Diffusion 1, 2 or XL"
