"""Noise that belongs to a picture: a function of (its seed, the step, the draw) and of nothing else.

Batch size, order, device and dtype do not enter. The numbers come from Philox4x64-10 (Salmon et al. 2011), a
counter cipher: key = (seed, a constant of ours), counter = (running, draw, step, 0). Pairs of raw 64-bit
words become normals by Box and Muller in float64 on the CPU and only then move and round. numpy guarantees
the raw stream of a bit generator, so a seed means the same picture in every later version; a test holds the
first draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import InputError

GENERATOR = {"generator": "philox4x64-10", "normals": "box-muller", "device": "cpu"}  # as recipes name it
DOMAIN = 0x5F75_6D61_746F_0001  # second half of the key, so that no other use of a seed repeats these draws
INITIAL = 0  # counter word of the initial noise; step k uses k + 1
SEEDS = 2**64  # a seed is taken modulo this; picture k of a request has seed request.seed + k


@dataclass(frozen=True)
class SeededNoise:
    """Standard normal noise (B, C, T, H, W) for B = len(seeds) pictures; `noise(step, draw)` while sampling.

    seeds: integers, one per picture, taken modulo 2**64; shape: (C, T, H, W), or any shape of one sample.
    """

    seeds: Sequence[int]
    shape: Sequence[int]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def initial(self, draw: int = 0) -> Tensor:
        """The noise a picture starts from, before it is scaled to the first level. draw: other noise for its
        beginning.
        """
        return self._stack(INITIAL, draw)

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        """Fresh noise for step 0, 1, …; a sampler that needs several per step numbers them by `draw`."""
        if step < 0 or draw < 0:
            raise InputError(f"step and draw must not be negative, not {step} and {draw}", argument="step")
        return self._stack(step + 1, draw)

    def _stack(self, word: int, draw: int) -> Tensor:
        count = math.prod(self.shape)
        rows = (
            np.stack([normals(seed, word, draw, count) for seed in self.seeds])
            if self.seeds
            else np.empty((0, count))
        )
        return torch.from_numpy(rows).to(self.dtype).to(self.device).view(len(self.seeds), *self.shape)


class Noise(Protocol):
    """The noise that drawing begins with, and that of each step; see `SeededNoise`."""

    def initial(self, draw: int = 0) -> Tensor: ...

    def __call__(self, step: int, draw: int = 0) -> Tensor: ...


COMMON = 1 << 20  # draws from here on are the parts that all frames have in common


@dataclass(frozen=True)
class SharedNoise:
    """Noise of clips whose frames have a share of it in common, so that they begin alike (the mixed noise of PYoCo, Ge
    et al. 2023, 2305.10474, sec. 4.1).

    share: of the variance, 0 … 1. own: the noise that frames do not share; its seeds give what they do.
    """

    own: SeededNoise
    share: float

    def initial(self, draw: int = 0) -> Tensor:
        return mixed(self.own.initial(draw), self.own.initial(COMMON + draw)[:, :, :1], self.share)

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        return mixed(self.own(step, draw), self.own(step, COMMON + draw)[:, :, :1], self.share)


def mixed(own: Tensor, common: Tensor, share: float) -> Tensor:
    """Standard normals again: own (B, C, T, H, W) of each frame, and common (B, C, 1, H, W) of all."""
    return math.sqrt(1 - share) * own + math.sqrt(share) * common


def normals(seed: int, word: int, draw: int, count: int) -> np.ndarray:
    """(count,) float64 standard normals at Philox key (seed, DOMAIN), counter (·, draw, word, 0)."""
    raw = philox(seed, word, draw, count + count % 2).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log(((raw[:, 0] >> 11) + 1) * 2.0**-53))  # log of (0, 1]
    angle = (raw[:, 1] >> 11) * (2.0**-53 * 2.0 * math.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def philox(seed: int, word: int, draw: int, count: int) -> np.ndarray:
    """(count,) raw uint64 words of the stream."""
    key = np.array([seed % SEEDS, DOMAIN], dtype=np.uint64)
    counter = np.array([0, draw, word, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
