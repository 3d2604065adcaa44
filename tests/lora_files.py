"""Files of LoRAs for small Stable Diffusions, and what it takes to read them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.adapters.lora import Lora, read_lora
from sfumato.checkpoint.rules import shapes
from sfumato.families.published.adapters import names_of
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.families.sd.family import FAMILY
from small_sd import SMALL, write

KINDS = ("sd1", "sd2", "sdxl")
RANK = 3


def lora_bases(place: Path):
    """kind → (its names, the parts of a small model)."""
    return {
        kind: (
            names_of(FAMILY, kind, SMALL[kind]),
            open_checkpoint(write(kind, place / kind), systems=SMALL).parts,
        )
        for kind in KINDS
    }


def layers(part) -> list[str]:
    """Modules with matrices and kernels, without tables."""
    return [
        name.removesuffix(".weight")
        for name in part
        if name.endswith(".weight") and len(part.info(name)[1]) > 1 and "_embedding.weight" not in name
    ]


def factors(part, module: str) -> tuple[Tensor, Tensor]:
    """(up, down) for a module, always the same."""
    shape = part.info(f"{module}.weight")[1]
    generator = torch.Generator().manual_seed(sum(map(ord, module)))
    up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
    return up, torch.randn(RANK, *shape[1:], generator=generator)


def read(bases, kind: str, tensors: dict[str, Tensor], place: Path, metadata=None, **options) -> Lora:
    names, parts = bases[kind]
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "ink.safetensors", metadata=metadata)
    return read_lora(place / "ink.safetensors", names, {n: shapes(p) for n, p in parts.items()}, **options)
