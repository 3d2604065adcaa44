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
from sfumato.adapters.roles import Spelled, group, looks_like_one, refused_among
from sfumato.checkpoint.header import Header, read_header
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
BOTH = "sdxl"  # reads prompts with two encoders that textual inversions are made for
JOINT = {1536: "3 or 3.5 Medium", 2432: "3.5 Large"}  # widths of Stable Diffusion 3's transformers
MARKS = (  # of names, first match first
    (re.compile(r"single_transformer_blocks|double_blocks"), "flux"),
    (re.compile(r"joint_blocks"), "sd3"),
    (re.compile(r"(^|\.)dit\.blocks\.\d"), "pocket"),
)
OTHER = 3072  # the width of other transformers whose blocks have the same names
STREAMS = re.compile(
    r"(?<!single_)transformer_blocks[._]\d+[._](attn2?[._](to_|add_|norm_)|(norm1|ff)(_context)?[._])"
)
CONTEXT = re.compile(r"[._](add_[qkv]_proj|to_add_out|norm1_context|ff_context)([._]|$)")
TOKENS = re.compile(r"(to_[qkv]|add_[qkv]_proj|qkv)$")  # layers that read a transformer's tokens
SPATIAL = re.compile(r"(down|up|mid)_blocks?|(in|out)put_blocks|middle_block")  # of U-Nets
DEEP = re.compile(r"transformer_blocks[._][4-9]([._]|$)")  # of SDXL's U-Net: others have up to 4 there
KEYS = re.compile(r"attn2[._]to_[kv]$")
PARTS = (  # of names' beginnings
    (
        re.compile(r"(lora|lycoris)_te3|(base_model\.model\.)?text_encoder_3|(text_encoders\.)?t5(xxl)?\."),
        "text_encoder_3",
    ),
    (
        re.compile(r"(lora|lycoris)_te2|(base_model\.model\.)?text_encoder_2|(text_encoders\.)?clip_g\."),
        "text_encoder_2",
    ),
    (
        re.compile(r"(lora|lycoris)_te1?[_.]|(base_model\.model\.)?(text_encoder|text_model)|clip_l\."),
        "text_encoder",
    ),
)


@dataclass(frozen=True)
class Described:
    """family: a key of `TITLES`, "" where nothing tells; why: what told it. ranks: how many modules have which.

    alphas: what the notes in the header say of alpha; those in the tensors are not looked at. parts: modules of each.
    width: of a transformer's tokens, where a layer tells it.
    """

    family: str
    why: str
    formats: tuple[str, ...]
    ranks: Mapping[int, int]
    parts: Mapping[str, int]
    alpha: str = ""
    unknown: tuple[str, ...] = field(default_factory=tuple)
    width: int | None = None


def describe(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> Described | None:
    """What a LoRA's header tells, or None for a file that is none."""
    if not looks_like_one(shapes):
        return None
    modules, unknown, _ = group(shapes)
    formats = {kind: None for spelled in modules.values() for kind in sorted(spelled.formats)}
    ranks = Counter(rank for spelled in modules.values() if (rank := _rank(spelled, shapes)))
    parts = Counter(_part(spelled.module) for spelled in modules.values())
    width = _width(modules, shapes)
    family, why = _family(modules, shapes, width)
    alpha = metadata.get("ss_network_alpha", "")
    return Described(
        family, why, tuple(formats), dict(sorted(ranks.items())), dict(parts), alpha, tuple(unknown), width
    )


def mark_of(kind: str) -> str:
    """The key of `TITLES` for a kind of model: "sdxl" for "sdxl-inpaint", "sd3" for "sd3.5-large"."""
    return max((mark for mark in TITLES if kind.startswith(mark)), key=len)


def require_family(path: Path, family: str, width: int | None = None) -> None:
    """`CheckpointError` that says whose LoRA it is, if it plainly is not for this family. Only the header is read.

    width: of the model's transformer, where it has one.
    """
    file = adapter_file(path)
    header = read_header(file)
    try:
        found = described(file, header)
    except CheckpointError:
        from sfumato.families.control import whose  # which asks here whether a ControlNet is a LoRA

        if whose({name: entry.shape for name, entry in header.tensors.items()}, header.metadata)[0]:
            raise CheckpointError(
                f"{file} is a ControlNet, not a LoRA; give it by `controlnets` KIND=FILE"
            ) from None
        raise
    if found.family and found.family != family:
        raise CheckpointError(
            f"{file} is a LoRA for {TITLES.get(found.family, found.family)} ({found.why}); this model is "
            f"{TITLES.get(family, family)}"
        )
    if not found.family and "unet" in found.parts and family not in CONTEXTS.values():
        raise CheckpointError(
            f"{file} is a LoRA for a U-Net, as Stable Diffusion 1, 2 and XL have; this model is {TITLES[family]}"
        )
    if found.family and None not in (width, found.width) and width != found.width:
        theirs, ours = (f" ({JOINT[w]})" if w in JOINT else "" for w in (found.width, width))
        raise CheckpointError(
            f"{file} is a LoRA for a {TITLES[family]} of width {found.width}{theirs}; this model's is {width}{ours}"
        )


def described(file: Path, header: Header) -> Described:
    """What a LoRA's header tells. `CheckpointError` for a file that is none, or of a kind that is not read."""
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    found = describe(shapes, header.metadata)
    if found is not None:
        return found
    if kind := refused_among(shapes):
        raise CheckpointError(
            f"{file} is of {kind}, a kind of adapter that is not read; LoRA, LoHa and LoKr are"
        )
    raise CheckpointError(f"{file} is no LoRA: none of its {len(shapes)} tensors is a part of one")


def _part(module: str) -> str:
    if SPATIAL.search(module):
        return "unet"
    return next((part for mark, part in PARTS if mark.match(module)), "denoiser")


def _width(modules: Mapping[str, Spelled], shapes: Mapping[str, Sequence[int]]) -> int | None:
    for module, spelled in modules.items():
        joint = not SPATIAL.search(module) and (STREAMS.search(module) or "joint_blocks" in module)
        if joint and TOKENS.search(module) and (width := _inputs(spelled, shapes)):
            return width
    return None


def _family(
    modules: Mapping[str, Spelled], shapes: Mapping[str, Sequence[int]], width: int | None
) -> tuple[str, str]:
    for mark, family in MARKS:
        for module in modules:
            if not SPATIAL.search(module) and mark.search(module):
                return family, f"it has {module}"
    for module in modules:
        joint = not SPATIAL.search(module) and STREAMS.search(module)
        if joint and (width in JOINT or (CONTEXT.search(module) and width != OTHER)):
            return "sd3", f"it has {module}"
    for module, spelled in modules.items():
        if KEYS.search(module) and SPATIAL.search(module):
            width = _inputs(spelled, shapes)
            if width in CONTEXTS:
                return CONTEXTS[width], f"its cross-attention reads texts of width {width}"
    for module in modules:
        if SPATIAL.search(module) and DEEP.search(module):
            return "sdxl", f"it has {module}"
    texts = {
        _part(module): _inputs(spelled, shapes)
        for module, spelled in modules.items()
        if "q_proj" in module or "SelfAttention" in module
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
