"""Whose LoRA a file is, and of what kind, told from the names and shapes in its header, without importing torch.

Widths tell: what a cross-attention's keys read is the width of the family's text features. Where a file changes no
cross-attention, text encoders tell by their widths, and transformers by names that no U-Net has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.adapters.config import adapter_file
from sfumato.adapters.roles import Spelled, group, looks_like_one
from sfumato.checkpoint.header import read_header
from sfumato.errors import CheckpointError

TITLES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL's refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "pocket": "pocket",
}
CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}  # width of a cross-attention's text
MARKS = (  # of names, first match first
    (re.compile(r"single_transformer_blocks|double_blocks"), "flux"),
    (
        re.compile(
            r"joint_blocks|(?<!single_)transformer_blocks[._]\d+[._](attn2?[._](add_|to_)|norm1_context)"
        ),
        "sd3",
    ),
    (re.compile(r"(^|\.)dit\.blocks\.\d"), "pocket"),
)
SPATIAL = re.compile(r"(down|up|mid)_blocks?|(in|out)put_blocks|middle_block")  # of U-Nets
KEYS = re.compile(r"attn2[._]to_[kv]$")
PARTS = (  # of names' beginnings
    (re.compile(r"(lora|lycoris)_te3|text_encoder_3"), "text_encoder_3"),
    (re.compile(r"(lora|lycoris)_te2|(base_model\.model\.)?text_encoder_2"), "text_encoder_2"),
    (re.compile(r"(lora|lycoris)_te1?[_.]|(base_model\.model\.)?(text_encoder|text_model)"), "text_encoder"),
)


@dataclass(frozen=True)
class Described:
    """family: a key of `TITLES`, "" where nothing tells; why: what told it. ranks: how many modules have which.

    alphas: what the notes in the header say of alpha; those in the tensors are not looked at. parts: modules of each.
    """

    family: str
    why: str
    formats: tuple[str, ...]
    ranks: Mapping[int, int]
    parts: Mapping[str, int]
    alpha: str = ""
    unknown: tuple[str, ...] = field(default_factory=tuple)


def describe(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> Described | None:
    """What a LoRA's header tells, or None for a file that is none."""
    if not looks_like_one(shapes):
        return None
    modules, unknown, _ = group(shapes)
    formats = {kind: None for spelled in modules.values() for kind in sorted(spelled.formats)}
    ranks = Counter(rank for spelled in modules.values() if (rank := _rank(spelled, shapes)))
    parts = Counter(_part(spelled.module) for spelled in modules.values())
    family, why = _family(modules, shapes)
    alpha = metadata.get("ss_network_alpha", "")
    return Described(
        family, why, tuple(formats), dict(sorted(ranks.items())), dict(parts), alpha, tuple(unknown)
    )


def require_family(path: Path, family: str) -> None:
    """`CheckpointError` that says whose LoRA it is, if it plainly is not for this family. Only the header is read."""
    file = adapter_file(path)
    header = read_header(file)
    found = describe({name: entry.shape for name, entry in header.tensors.items()}, header.metadata)
    if found is None:
        raise CheckpointError(
            f"{file} is no LoRA: none of its {len(header.tensors)} tensors is a part of one"
        )
    if found.family and found.family != family:
        raise CheckpointError(
            f"{file} is a LoRA for {TITLES.get(found.family, found.family)} ({found.why}); this model is "
            f"{TITLES.get(family, family)}"
        )


def _part(module: str) -> str:
    if SPATIAL.search(module):
        return "unet"
    return next((part for mark, part in PARTS if mark.match(module)), "denoiser")


def _family(modules: Mapping[str, Spelled], shapes: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    for mark, family in MARKS:
        for module in modules:
            if not SPATIAL.search(module) and mark.search(module):
                return family, f"it has {module}"
    for module, spelled in modules.items():
        if KEYS.search(module) and SPATIAL.search(module):
            width = _inputs(spelled, shapes)
            if width in CONTEXTS:
                return CONTEXTS[width], f"its cross-attention reads texts of width {width}"
    texts = {
        _part(module): _inputs(spelled, shapes) for module, spelled in modules.items() if "q_proj" in module
    }
    if "text_encoder_3" in texts:
        return "sd3", "it changes a third text encoder"
    if texts.get("text_encoder") == 1024:
        return "sd2", "its text encoder is of width 1024"
    return "", ""


def _rank(spelled: Spelled, shapes: Mapping[str, Sequence[int]]) -> int | None:
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in spelled.tensors and len(shape := shapes[spelled.tensors[role]]) > 1:
            return shape[0]
    return None


def _inputs(spelled: Spelled, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """How many channels a module reads."""
    sizes = {role: shapes[name] for role, name in spelled.tensors.items() if len(shapes[name]) > 1}
    for role in ("down", "hada_w1_b", "diff"):
        if role in sizes:
            return sizes[role][1]
    one, two = (
        next((sizes[r][1] for r in (f"lokr_w{n}", f"lokr_w{n}_b") if r in sizes), None) for n in (1, 2)
    )
    return one * two if one and two else None
