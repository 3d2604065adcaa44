"""What pocket's modules are called in LoRAs' files: as in its own weights, with PEFT's prefix or none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sfumato.adapters.config import adapter_file
from sfumato.adapters.names import WEIGHT, Names, PartNames, same
from sfumato.checkpoint.header import read_header
from sfumato.errors import CheckpointError
from sfumato.families.lora import TITLES, describe

DOTTED = ("", "base_model.model.", "denoiser.", "base_model.model.denoiser.")
BLOCKS = {"dit": ("denoiser.dit",), "text": ("denoiser.text",), "blocks": ("denoiser.dit.blocks",)}


def names_of(tensors: Iterable[str]) -> Names:
    """All spellings of the modules of a denoiser with these tensors."""
    paths = (name.removesuffix(WEIGHT) for name in tensors if name.endswith(WEIGHT))
    return Names("pocket", (PartNames("denoiser", (same(paths),), DOTTED),), BLOCKS)


def check(path: Path) -> None:
    """`CheckpointError` that says whose LoRA it is, if it is plainly another family's."""
    file = adapter_file(path)
    header = read_header(file)
    found = describe({name: entry.shape for name, entry in header.tensors.items()}, header.metadata)
    if found is None:
        raise CheckpointError(
            f"{file} is no LoRA: none of its {len(header.tensors)} tensors is a part of one"
        )
    if found.family not in ("", "pocket"):
        raise CheckpointError(
            f"{file} is a LoRA for {TITLES[found.family]} ({found.why}); this model is pocket"
        )
