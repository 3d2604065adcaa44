"""Noise between two seeds: near the first, a picture like the first's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.sampling.noise import SeededNoise


@dataclass(frozen=True)
class VariedNoise:
    """As `SeededNoise`, of two seeds for each picture: every draw is theirs, spherically interpolated.

    seeds, others: one of each per picture; strength: 0 gives the noise of `seeds` and 1 that of `others`, to the bit.
    """

    seeds: Sequence[int]
    others: Sequence[int]
    strength: float
    shape: Sequence[int]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def initial(self, draw: int = 0) -> Tensor:
        """The noise a picture starts from, before it is scaled to the first level; see `SeededNoise`."""
        first, second = self._pair()
        return self._between(first.initial(draw), second.initial(draw))

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        """Fresh noise for a step; see `SeededNoise`."""
        first, second = self._pair()
        return self._between(first(step, draw), second(step, draw))

    def _pair(self) -> tuple[SeededNoise, SeededNoise]:
        return (
            SeededNoise(self.seeds, self.shape, "cpu", torch.float64),
            SeededNoise(self.others, self.shape, "cpu", torch.float64),
        )

    def _between(self, first: Tensor, second: Tensor) -> Tensor:
        return slerp(first, second, self.strength).to(self.dtype).to(self.device)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(sin((1 − t) ω) a + sin(t ω) b) / sin ω for each sample, ω the angle between them (Shoemake 1985, eq. 1).

    a, b: (B, …) floating point; t in [0, 1]. Unlike a straight mixture it keeps the length, and so noise stays as
    strong as noise. Samples of one direction are mixed straight.
    """
    rows = [-1, *[1] * (a.ndim - 1)]
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1)).clamp(min=1e-30)
    angle = torch.arccos(cosine.clamp(-1, 1)).view(rows)
    sine = torch.sin(angle)
    parallel = sine < 1e-6
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    of_a = torch.where(parallel, torch.full_like(sine, 1 - t), torch.sin((1 - t) * angle) / safe)
    of_b = torch.where(parallel, torch.full_like(sine, t), torch.sin(t * angle) / safe)
    return of_a * a + of_b * b
