"""Conversion of checkpoints between the layouts in which a family's models are published."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sfumato.errors import CheckpointError, InputError
from sfumato.families import checkpoint_families
from sfumato.families.published.checkpoint import open_checkpoint
from sfumato.families.published.convert import Written, write_file, write_folder
from sfumato.families.published.loras import with_loras

LAYOUTS = ("single", "folder")
SUFFIX = ".safetensors"
FILES = {
    ".ckpt",
    ".pt",
    ".pth",
    ".bin",
    ".gguf",
    ".onnx",
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".json",
    ".zip",
    ".tar",
}
Merge = tuple[str | os.PathLike[str], float, Mapping[str, float]]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    kind: str | None = None,
    prediction: str | None = None,
    merge: Sequence[Merge] = (),
    partial: bool = False,
    on_report: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Read the checkpoint at `source` and write it to `target`, which must not exist.

    layout: "single" or "folder"; None is a single file where `target` ends in .safetensors, else a folder. variant,
    kind, prediction: see `open_checkpoint`. merge: LoRAs (file, weight, blocks) to put into the weights; partial: of
    which what fits; `on_report` hears of each what it changes. `on_progress` hears how many tensors are written, and of
    how many. Errors: those of reading and writing; `InputError` for a target that exists.
    """
    target = Path(target)
    if layout is None:
        layout = "single" if target.suffix == SUFFIX else "folder"
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}", argument="layout")
    if (target.suffix == SUFFIX) != (layout == "single"):
        right = f"must end in {SUFFIX}" if layout == "single" else f"is a folder and must not end in {SUFFIX}"
        raise InputError(f"the target {str(target)!r} {right}", argument="target")
    if layout == "folder" and (ending := _file_ending(target)):
        raise InputError(
            f"the target {str(target)!r} ends in {ending}; a file must end in {SUFFIX}, and a folder in nothing of the "
            "kind",
            argument="target",
        )
    if os.path.lexists(target):
        raise InputError(
            f"the target {str(target)!r} exists; give another name, or remove it first", argument="target"
        )
    checkpoint = open_checkpoint(
        source, checkpoint_families(), variant=variant, kind=kind, prediction=prediction
    )
    if merge:
        checkpoint, reports = with_loras(checkpoint, str(source), merge, partial=partial)
        for report in reports:
            on_report(report)
    write = write_file if layout == "single" else write_folder
    try:
        return write(checkpoint, target, dtype=dtype, on_progress=on_progress)
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if str(source) in told else f"{source}: {told}") from None


def _file_ending(target: Path) -> str:
    """The ending that makes a folder's name look like a file's, such as .ckpt or a misspelt .safetensor; else ""."""
    ending = target.suffix.lower()
    return ending if ending in FILES or difflib.get_close_matches(ending, [SUFFIX], cutoff=0.7) else ""
