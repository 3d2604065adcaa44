"""ControlNet files of Stable Diffusion 3: what each is, by names and shapes, and its tensors under our names.

Read are diffusers folders and single files under diffusers' names, and Stability's own for the large model, whose
blocks have the original names (diffusers scripts/convert_sd3_controlnet_to_diffusers.py; Stability-AI/sd3.5,
dit_embedder.py and sd3_infer.py). What no tensor says comes from a folder's config.json, or is as such files are
published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.checkpoint.detect import Shape, Signature, identify
from sfumato.checkpoint.rules import Drop, KeyMap, expand, shapes, within
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.controls import (
    ControlFile,
    Place,
    control_weights,
    relatives,
    together,
)
from sfumato.families.published.keys import WB, same
from sfumato.families.published.openers import blank
from sfumato.families.published.signatures import refused
from sfumato.families.sd3.keys import PICTURE
from sfumato.nn.mmdit import MMDiTConfig
from sfumato.nn.mmdit_control import MMDiTControlConfig

ENTRANCE = "pos_embed."  # of the noisy latent, which some have none of their own for
KIND = "control_type"  # which picture one of Stability's reads, as a number: 0 blur, 1 canny, 2 depth
CANNY = 1
CANNY_SPAN = (
    0.5,
    128.0,
)  # as it was trained: edges of 0 and 255, times a half and plus a half (sd3_infer.py)


def open_control(
    path: Place, base: MMDiTConfig, kind: str, tensors: Mapping[str, Tensor], variant: str | None = None
) -> ControlFile:
    """The ControlNet in a .safetensors file, a diffusers folder, or a folder's part, for a model of this transformer.

    kind: the model's. tensors: the transformer's, of which some take the entrance. `InputError` when it is for another
    one; `CheckpointError` when it is damaged, none, or one of a kind that is not read, which it names.
    """
    weights, said = control_weights(path, variant)
    found, source = shapes(weights), str(path)
    layout = identify(found, signatures(), source).layout
    own = ENTRANCE + "proj.weight" in found
    single = "context_embedder.weight" not in found
    blocks = _blocks(found, base, source, single, own)
    canny = KIND in found and int(weights[KIND]) == CANNY
    if KIND not in found and single:  # in diffusers' names nothing but the name says so
        canny = re.search(r"(?<![a-z])canny(?![a-z])", Path(path).absolute().name.lower()) is not None
    extra = found["pos_embed_input.proj.weight"][1] - base.channels
    config = MMDiTControlConfig(
        blocks,
        extra if extra in (0, 1) else 0,
        joint=not single,
        span=CANNY_SPAN if canny else (-1.0, 1.0),
        **_told(said, single, extra),
    )
    _check(config, extra, base, kind, source)
    table = control_map(config) if layout == "original" else KeyMap(same(control_map(config).ours))
    if not own:
        table = KeyMap(tuple(rule for rule in table.rules if not str(rule.ours).startswith(ENTRANCE)))
    ours = (table | KeyMap((), (Drop(KIND, "which picture it reads; it is drawn so"),))).to_ours(
        weights, source
    )
    beside = {} if own else {name: tensors[name] for name in tensors if name.startswith(ENTRANCE)}
    return ControlFile(kind, config, ours, source, beside)


def control_map(config: MMDiTControlConfig) -> KeyMap:
    """The names in Stability's files to ours, which are those of diffusers: its blocks alone are called otherwise."""
    names = [name for name in blank(config).state_dict() if not name.startswith("transformer_blocks.")]
    if config.joint:
        return KeyMap(same(blank(config).state_dict()))
    at = "transformer_blocks.{i}."
    rules = expand(within(at, at, PICTURE), i=range(config.blocks.layers), p=WB)
    return KeyMap((*same(names), *rules))


def signatures() -> tuple[Signature, ...]:
    """The marks of ControlNets in both layouts, and of relatives that are refused."""
    marks: dict[str, Shape | None] = {
        "controlnet_blocks.0.weight": (None, None),
        "pos_embed_input.proj.weight": (None, None, None, None),
        "time_text_embed.text_embedder.linear_1.weight": (None, None),
    }
    at = "transformer_blocks.0.attn."
    return (
        Signature("sd3", "controlnet", "diffusers", marks | {f"{at}to_q.weight": None}, (f"{at}qkv.weight",)),
        Signature("sd3", "controlnet", "original", marks | {f"{at}qkv.weight": None}, (f"{at}to_q.weight",)),
        *refused(
            "a mixture of two layouts, diffusers' and the original; write it anew in one",
            together("controlnet_blocks.0.weight", f"{at}to_q.weight", f"{at}qkv.weight"),
        ),
        *refused(
            "a ControlNet of Stable Diffusion 1, 2 or XL, which belongs on one",
            "*input_hint_block.0.weight",
            "controlnet_cond_embedding.conv_in.weight",
        ),
        *relatives(),
    )


def _blocks(
    found: Mapping[str, Sequence[int]], base: MMDiTConfig, source: str, single: bool, own: bool
) -> MMDiTConfig:
    """The shape of its blocks and of what enters them, from shapes of tensors."""
    width = found["controlnet_blocks.0.weight"][0]
    if width % base.head_width:
        raise CheckpointError(f"{source} has blocks of width {width}, not a multiple of {base.head_width}")
    numbers = {int(m[1]) for name in found if (m := re.match(r"transformer_blocks\.(\d+)\.", name))}
    positions = base.positions
    if own:
        table = found.get(f"{ENTRANCE}pos_embed", (1, 0))
        positions = isqrt(table[1])
        if positions < 1 or positions**2 != table[1]:
            raise CheckpointError(f"{source} has no square table of positions, {ENTRANCE}pos_embed")
    return replace(
        base,
        layers=max(numbers) + 1,
        heads=width // base.head_width,
        context=base.context if single else found["context_embedder.weight"][1],
        pooled=found["time_text_embed.text_embedder.linear_1.weight"][1],
        positions=positions,
        qk_norm="transformer_blocks.0.attn.norm_q.weight" in found,
        dual=tuple(n for n in sorted(numbers) if f"transformer_blocks.{n}.attn2.to_q.weight" in found),
    )


def _told(said: Mapping[str, Any], single: bool, extra: int) -> dict[str, Any]:
    """What a folder's config.json says that no tensor does; without one, as such files are published.

    One told no pooled text reads latents that are not shifted, but for those that read a mask (diffusers,
    pipeline_stable_diffusion_3_controlnet.py and …_inpainting.py).
    """
    zeros = said.get("force_zeros_for_pooled_projection", not single) is True
    return {"zero_pooled": zeros or extra == 1, "shifted": extra == 1 or not zeros}


def _check(config: MMDiTControlConfig, extra: int, base: MMDiTConfig, kind: str, source: str) -> None:
    own = config.blocks
    if extra not in (0, 1):
        raise CheckpointError(
            f"{source} reads {base.channels + extra} channels of control pictures; {base.channels}, and one of a mask "
            "behind them, are supported"
        )
    if not config.joint and own.pooled == own.width:
        raise CheckpointError(
            f"{source} cannot be used: this is a ControlNet whose blocks each begin anew (Stability's for medium "
            "models), not supported"
        )
    ours, theirs = ((c.width, c.context, c.pooled, c.patch) for c in (base, own))
    if ours != theirs or own.layers > base.layers:
        raise InputError(
            f"{source} is a ControlNet for a transformer of width {own.width}, told texts of {own.context} and "
            f"{own.pooled}; that of {kind} is of width {base.width}, told {base.context} and {base.pooled}",
            argument="controlnet",
        )
