"""What training asks of any collection of captioned pictures, and how their pixels enter the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True)
class Problem:
    """A member that was set aside, and why, in words a person can act on."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@runtime_checkable
class Source(Protocol):
    """Captioned pictures, numbered 0 … len − 1. Every method is a pure function of its arguments."""

    def __len__(self) -> int: ...

    def buckets(self) -> dict[Size, list[int]]:
        """(height, width) in pixels → indices of that size, each index in exactly one, sizes in ascending
        order.
        """
        ...

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3), or (B, T, H, W, 3) when the source moves. All indices are of one bucket."""
        ...

    def caption(self, index: int, epoch: int) -> str:
        """The caption of one picture; a source that can phrase things differently does so from epoch to
        epoch.
        """
        ...

    def digest(self, index: int) -> str:
        """Hex digest of everything that decides the pixels of `index`: equal digests mean equal pixels."""
        ...

    def name(self, index: int) -> str:
        """What an error message calls this picture."""
        ...

    def labels(self, indices: Sequence[int], factor: int) -> Tensor | None:
        """int64 (B, A, H/factor, W/factor): A attributes of what each cell shows; None if the source knows
        none.
        """
        ...


def to_float(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) or (B, T, H, W, 3) → float32 (B, 3, T, H, W) in [−1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    if tensor.ndim == 4:
        tensor = tensor[:, None]  # (B, T, H, W, 3)
    return tensor.permute(0, 4, 1, 2, 3).contiguous().float().div_(127.5).sub_(1.0)
