"""ControlNet files of Stable Diffusion: what each is, by names and shapes, its tensors under our names, the network.

Read are diffusers folders and single files: under diffusers' names, under the original ones (`input_blocks.…`), and
under those with `control_model.` before them, with or without a whole checkpoint around. Their relatives that work
otherwise are refused by name. What no tensor says comes from a folder's config.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sfumato.checkpoint.detect import Shape, Signature, identify
from sfumato.checkpoint.rules import Drop, KeyMap, Rename, Rule, expand, shapes, within
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.controls import (
    ControlFile,
    Controller,
    Place,
    control_weights,
    relatives,
    together,
)
from sfumato.families.published.keys import WB, same
from sfumato.families.published.signatures import refused
from sfumato.families.sd import keys
from sfumato.families.sd.shapes import SYSTEMS, System
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.unet import UNetConfig
from sfumato.types import Conditioning

PREFIX = "control_model."
KINDS = ("sd1", "sd2", "sdxl")  # of systems that have ControlNets; others with the same U-Net take theirs
HINT = "controlnet_cond_embedding."
AROUND = "the checkpoint that it was trained with; give that one as the model, if it is wanted"
BEGUN = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")


def open_control(
    path: Place, variant: str | None = None, systems: Mapping[str, System] | None = None
) -> ControlFile:
    """The ControlNet in a .safetensors file, a diffusers folder, or a folder's part.

    `CheckpointError` when it is damaged, mixed of two layouts, none, or one of a kind that is not read, which it names.
    """
    weights, said = control_weights(path, variant)
    found = shapes(weights)
    kinds = {kind: system for kind, system in (systems or SYSTEMS).items() if kind in KINDS}
    match = identify(found, signatures(kinds), str(path))
    at, original = match.prefix, match.layout == "original"
    hint = _hint_channels(found, at, original, str(path))
    unet = _as_deep(kinds[match.kind].unet, found, at, original, str(path))
    config = ControlNetConfig(unet, hint, **_told(said, str(path)))
    table = control_map(config) if original else KeyMap(same(control_map(config).ours))
    table = table.within(at, "") | KeyMap((), (*keys.EXTRAS, *(_around() if at else ())))
    return ControlFile(match.kind, config, table.to_ours(weights, str(path)), str(path))


def check(file: ControlFile, unet: UNetConfig, kind: str) -> None:
    """`InputError` unless a ControlNet is for this U-Net, of a system of this kind."""
    own = file.config.unet
    ours, theirs = ((u.channels, u.context, u.vector, u.linear) for u in (unet, own))
    if ours != theirs:
        told = f" and a vector of {own.vector}" if own.vector else ""
        wants = f" and a vector of {unet.vector}" if unet.vector else ""
        raise InputError(
            f"{file.source} is a ControlNet of {file.kind}, which reads text {own.context} wide{told}; the model "
            f"is of {kind}, with text {unet.context} wide{wants}: give a ControlNet of {kind.split('-')[0]}",
            argument="controlnet",
        )


def controller(network: ControlNet, pixels: Tensor) -> Controller:
    """What a ControlNet adds to the U-Net's skips and to its middle, shown this picture: (1, 3, H, W) in [0, 1]."""
    hint = network.features(pixels)
    channels = network.config.in_channels

    def adds(x: Tensor, time: Tensor, cond: Conditioning, guess: bool) -> tuple[Tensor, ...]:
        # an inpainting U-Net reads more behind the noisy latent
        x = x[:, :channels, 0]
        vector = cond.vector if network.config.vector else None
        return network(x, time, cond.tokens, vector, hint=hint, guess=guess)

    return adds


def control_map(config: ControlNetConfig) -> KeyMap:
    """The original names of a ControlNet (cldm/cldm.py, without a prefix) to ours, which are those of diffusers."""
    whole = keys.unet_map(config.unet).rules
    rules: list[Rule] = [rule for rule in whole if str(rule.ours).split(".")[0] in BEGUN]
    last = len(config.hint_channels) - 1
    names = ["conv_in", *(f"blocks.{i}" for i in range(2 * last)), "conv_out"]
    hints = [Rename(f"{2 * i}.{{p}}", f"{name}.{{p}}") for i, name in enumerate(names)]
    rules += expand(within("input_hint_block.", HINT, hints), p=WB)
    zeros = [
        Rename(f"zero_convs.{i}.0.{{p}}", f"controlnet_down_blocks.{i}.{{p}}")
        for i in range(len(config.unet.skips))
    ]
    zeros.append(Rename("middle_block_out.0.{p}", "controlnet_mid_block.{p}"))
    return KeyMap((*rules, *expand(zeros, p=WB)))


def _around() -> tuple[Drop, ...]:
    """What stands beside a ControlNet in the file of a whole checkpoint."""
    heads = ("model.diffusion_model", "first_stage_model", "cond_stage_model", "conditioner")
    return tuple(Drop(f"{head}.*", AROUND) for head in heads)


def _told(said: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What a folder's config.json says that no tensor does."""
    order = said.get("controlnet_conditioning_channel_order", "rgb")
    if order not in ("rgb", "bgr"):
        raise CheckpointError(f"{source} reads its picture in the order {order!r}; rgb and bgr are known")
    return {"pooled": said.get("global_pool_conditions") is True, "bgr": order == "bgr"}


def _as_deep(
    unet: UNetConfig, found: Mapping[str, Sequence[int]], at: str, original: bool, source: str
) -> UNetConfig:
    """The U-Net's shape with as many transformer blocks as the file has, which may be fewer (SDXL's smaller ones)."""

    def depth(place: str) -> int:
        pattern = re.compile(re.escape(f"{at}{place}.transformer_blocks.") + r"(\d+)\.")
        return len({m[1] for name in found if (m := pattern.match(name))})

    stride = unet.resnets + 1
    if original:
        places = [f"input_blocks.{1 + level * stride}.1" for level in range(len(unet.depths))]
        middle = "middle_block.1"
    else:
        places = [f"down_blocks.{level}.attentions.0" for level in range(len(unet.depths))]
        middle = "mid_block.attentions.0"
    if not (mid := depth(middle)):
        raise CheckpointError(
            f"{source} cannot be used: this is a ControlNet without attention in its middle, not supported"
        )
    return replace(unet, depths=tuple(map(depth, places)), mid_depth=mid)


def _hint_channels(
    found: Mapping[str, Sequence[int]], at: str, original: bool, source: str
) -> tuple[int, ...]:
    """Widths of the picture's features, from the layers that read it; a picture has 3 channels."""
    head = f"{at}input_hint_block." if original else f"{at}{HINT}"
    pattern = re.compile(re.escape(head) + (r"(\d+)\." if original else r"blocks\.(\d+)\."))
    last = max((int(m[1]) for name in found if (m := pattern.match(name))), default=0)
    if original:  # the last one leads out of them
        names = [f"{head}{2 * number}.weight" for number in range(max(1, last // 2))]
    else:  # they come in pairs
        names = [f"{head}conv_in.weight", *(f"{head}blocks.{n}.weight" for n in range(last // 2 * 2 + 2))]
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(f"{source} lacks {missing[0]}; the file is incomplete")
    if found[names[0]][1] != 3:
        raise CheckpointError(
            f"{source} reads control pictures of {found[names[0]][1]} channels; 3 are supported"
        )
    return tuple(found[name][0] for name in names[::2])


def signatures(systems: Mapping[str, System]) -> tuple[Signature, ...]:
    """The marks of ControlNets for these systems in all layouts, and of relatives that are refused."""
    made = []
    for kind, system in systems.items():
        for layout, at in (("original", PREFIX), ("original", ""), ("diffusers", "")):
            marks = {
                f"{at}{name}": shape for name, shape in _marks(system.unet, layout == "original").items()
            }
            vector = () if system.unet.vector else (f"{at}label_emb.*", f"{at}add_embedding.*")
            made.append(Signature(kind, "controlnet", layout, marks, vector, at))
    return (*made, *_relatives())


def _marks(unet: UNetConfig, original: bool) -> dict[str, Shape]:
    """Entrance, exit, picture, time, vector, and the width of the text."""
    first, level = unet.channels[0], next(i for i, depth in enumerate(unet.depths) if depth)
    last = unet.channels[-1]
    names = (
        ("input_blocks.0.0", "time_embed.0", "label_emb.0.0", "middle_block_out.0", "input_hint_block.0")
        if original
        else (
            "conv_in",
            "time_embedding.linear_1",
            "add_embedding.linear_1",
            "controlnet_mid_block",
            f"{HINT}conv_in",
        )
    )
    entrance, time, vector, middle, hint = (f"{name}.weight" for name in names)
    text = (
        f"input_blocks.{1 + level * (unet.resnets + 1)}.1"
        if original
        else f"down_blocks.{level}.attentions.0"
    )
    marks: dict[str, Shape] = {
        entrance: (first, 4, 3, 3),
        time: (4 * first, first),
        middle: (last, last, 1, 1),
        hint: (None, None, 3, 3),
        f"{text}.transformer_blocks.0.attn2.to_k.weight": (unet.channels[level], unet.context),
    }
    return marks | ({vector: (4 * first, unet.vector)} if unet.vector else {})


def _relatives() -> list[Signature]:
    """Those of `relatives`, of another family, and two layouts in one file."""
    return [
        *refused(
            "a mixture of two layouts, diffusers' and the original; write it anew in one",
            together("*input_hint_block.0.weight", f"{HINT}*"),
            together(f"{PREFIX}input_hint_block.0.weight", "input_hint_block.0.weight"),
            together("*zero_convs.0.0.weight", "controlnet_down_blocks.*"),
        ),
        *refused(
            "a ControlNet of SD3, which belongs on one",
            together("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"),
            together("controlnet_blocks.0.weight", "pos_embed.proj.weight"),
        ),
        *relatives(),
    ]
