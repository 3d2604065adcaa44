"""Positions and times as vectors: sinusoids and rotary embeddings over time, height and width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def sinusoid(values: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(…,) → (…, width): cosines then sines at geometrically spaced frequencies (Vaswani et al. 2017, sec. 3.5)."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, device=values.device, dtype=torch.float32) / half
    )
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    """linear_2(silu(linear_1(x))): (B, width) → (B, out). `cond_width` adds a projection of a second vector to x.

    inner: width between the two; 0 means `out`.
    """

    def __init__(self, width: int, out: int, cond_width: int = 0, inner: int = 0):
        super().__init__()
        self.linear_1 = nn.Linear(width, inner or out)
        self.cond_proj = nn.Linear(cond_width, width, bias=False) if cond_width else None
        self.linear_2 = nn.Linear(inner or out, out)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(functional.silu(self.linear_1(x)))


def grid_positions(frames: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(T·H·W, 3): the (t, y, x) index of every cell, in the order in which a latent is flattened to tokens."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def grid_sinusoid(positions: Tensor, width: int) -> Tensor:
    """(…, 3) → (…, width): each axis gets a share of the channels, so that a cell's absolute place can be read."""
    share = 2 * (width // 6)
    parts = [sinusoid(positions[..., 1], share, 100.0), sinusoid(positions[..., 2], share, 100.0)]
    parts.append(sinusoid(positions[..., 0], width - 2 * share, 100.0))
    return torch.cat(parts, dim=-1)


def rope_angles(positions: Tensor, head_width: int, theta: float = 100.0) -> Tensor:
    """Rotation angles of axial rotary embeddings (Su et al. 2021, one share of the head per axis).

    positions: (…, A) indices on A axes → (…, head_width / 2) angles. With three axes time gets a quarter of the
    pairs and height and width share the rest; a pair not given to any axis does not turn.
    """
    pairs = head_width // 2
    axes = positions.shape[-1]
    shares = [pairs] if axes == 1 else [pairs // 4, (pairs - pairs // 4) // 2, (pairs - pairs // 4) // 2]
    angles = []
    for axis, share in enumerate(shares):
        frequencies = theta ** (
            -torch.arange(share, device=positions.device, dtype=torch.float32) / max(share, 1)
        )
        angles.append(positions[..., axis, None] * frequencies)
    rest = pairs - sum(shares)
    angles.append(positions.new_zeros(*positions.shape[:-1], rest))
    return torch.cat(angles, dim=-1)


def turns(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Angles (…, D/2) → what `rotate` multiplies by, twice (…, D): cosines, and sines of either sign."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x: (B, N, K, D) by the `turns` of their angles, (N, D) or (B, N, D)."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2))
