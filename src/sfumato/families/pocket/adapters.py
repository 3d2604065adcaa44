"""What pocket's modules are called in LoRAs' files: as in its own weights, with PEFT's prefix or none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sfumato.adapters.names import WEIGHT, Names, PartNames, same
from sfumato.families.lora import require_family

DOTTED = ("", "base_model.model.", "denoiser.", "base_model.model.denoiser.")
BLOCKS = {"dit": ("denoiser.dit",), "text": ("denoiser.text",), "blocks": ("denoiser.dit.blocks",)}


def names_of(tensors: Iterable[str]) -> Names:
    """All spellings of the modules of a denoiser with these tensors."""
    paths = (name.removesuffix(WEIGHT) for name in tensors if name.endswith(WEIGHT))
    return Names("pocket", (PartNames("denoiser", (same(paths),), DOTTED),), BLOCKS)


def check(path: Path) -> None:
    """`CheckpointError` that says whose LoRA it is, if it is plainly another family's."""
    require_family(path, "pocket")
