"""Whose ControlNet a file is, told from the names in its header, for models of another family to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sfumato.checkpoint.header import read_header
from sfumato.errors import CheckpointError, InputError
from sfumato.families import FAMILIES, checkpoint_families, family_named
from sfumato.families.lora import describe


def require_control(path: Path, family: str, title: str) -> None:
    """`InputError` that says whose a ControlNet is, if it plainly is not for this family; `CheckpointError` for a LoRA.

    family: by its name. title: what the model is called. Only a header is read; what cannot be read or told is left to
    those who open it.
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
        raise CheckpointError(f"{path} is a LoRA, not a ControlNet; give it by `loras`")
    theirs, name = whose(shapes, header.metadata)
    if theirs not in ("", family):
        raise InputError(f"{path} is a ControlNet for {name}; this model is {title}", argument="controlnet")


def whose(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Its family, and what the models that it is for are called; empty where nothing tells."""
    for name in FAMILIES:  # before the others, which then need not be imported
        if title := family_named(name).control_title(shapes, metadata):
            return name, title
    for family in checkpoint_families():
        if title := family.control_title(shapes, metadata):
            return family.name, title
    return "", ""


def _file_of(path: Path) -> Path | None:
    """A file itself, or the first with weights in a folder."""
    if path.is_dir():
        return next(iter(sorted(path.glob("*.safetensors"))), None)
    return path if path.is_file() else None
