"""A checkpoint with LoRAs in its weights for good."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.adapters.fold import Adapters, Folded
from sfumato.checkpoint.header import UNUSABLE
from sfumato.checkpoint.layer import finite, told
from sfumato.checkpoint.rules import info
from sfumato.errors import CheckpointError


class Merged(Mapping[str, Tensor]):
    """A part with what is added to it, every tensor in the type it had; rounded once, from float32."""

    def __init__(self, part: Folded):
        self.part = part

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.part[name]
        if name not in self.part.now.changes:
            return tensor
        cast = tensor.to(self.info(name)[0])
        if not finite(cast):
            beyond = f"is beyond the range of {cast.dtype}; write it as bf16 or fp32"
            raise CheckpointError(told(self.part, name, beyond if finite(tensor) else UNUSABLE))
        return cast

    def __iter__(self):
        return iter(self.part)

    def __len__(self) -> int:
        return len(self.part)

    def __contains__(self, name: object) -> bool:
        return name in self.part

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return info(self.part.base, name)


def merged(adapters: Adapters) -> dict[str, Merged]:
    """The parts of a base with what is attached."""
    return {name: Merged(part) for name, part in adapters.parts.items()}
