"""Whose ControlNet a file is, told from the names in its header, for models of another family to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.checkpoint.header import read_header, strict_json
from sfumato.errors import CheckpointError, InputError
from sfumato.families.lora import CONTEXTS, TITLES, describe

UNET = "Stable Diffusion 1, 2 or XL"
UNET_HINTS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
SD3_HINT = "pos_embed_input.proj.weight"
KEYS = "attn2.to_k.weight"
OURS = "control"  # in the metadata of pocket's, which say their format there


def require_control(path: Path, family: str) -> None:
    """`InputError` that says whose a ControlNet is, if it plainly is not for this family; `CheckpointError` for a LoRA.

    family: a key of `TITLES`. Only a header is read; what cannot be read or told is left to those who open it.
    """
    file = _file_of(path)
    if file is None:
        return
    try:
        header = read_header(file)
    except (CheckpointError, OSError):
        return
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    if describe(shapes, {}) is not None:
        raise CheckpointError(f"{path} is a LoRA, not a ControlNet; give it by --lora")
    theirs = _whose(shapes, header.metadata)
    ours = UNET if family in CONTEXTS.values() else TITLES[family]
    if theirs in ("", ours) or (ours == UNET and theirs in map(TITLES.get, CONTEXTS.values())):
        return
    raise InputError(
        f"{path} is a ControlNet for {theirs}; this model is {TITLES[family]}", argument="controlnet"
    )


def _whose(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str:
    """The title of its family, "" where nothing tells."""
    if OURS in metadata and _is_ours(metadata[OURS]):
        return TITLES["pocket"]
    if SD3_HINT in shapes and "controlnet_blocks.0.weight" in shapes:
        return TITLES["sd3"]
    if any(name.endswith(UNET_HINTS) for name in shapes):
        width = next((shape[1] for name, shape in shapes.items() if name.endswith(KEYS)), 0)
        return TITLES[CONTEXTS[width]] if width in CONTEXTS else UNET
    return ""


def _is_ours(text: str) -> bool:
    try:
        said = strict_json(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and "format" in said


def _file_of(path: Path) -> Path | None:
    """A file itself, or the first with weights in a folder."""
    if path.is_dir():
        return next(iter(sorted(path.glob("*.safetensors"))), None)
    return path if path.is_file() else None
