"""A ControlNet for the DiT: a copy of its first blocks that reads a picture too, and adds to the tokens further on.

Source: Zhang et al. 2023 (arXiv 2302.05543), sec. 3, for the trainable copy and outputs that begin as zeros; Chen et
al. 2024 (arXiv 2401.05252) for copying the first blocks of a transformer alone. What the network does before
its blocks (tokens, time, modulation) is the base's own, so that a small one has few weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.errors import InputError
from sfumato.nn.dit import DiT, to_patches
from sfumato.nn.transformer import Block, rms_norm
from sfumato.types import Conditioning


@dataclass(frozen=True)
class DiTControlConfig:
    """hint: numbers of a token's piece of the encoded picture. width, heads: the base's. blocks: how many of its first
    are copied. outputs: before how many of its blocks something is added.
    """

    hint: int
    width: int
    heads: int
    blocks: int = 1
    outputs: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            checks.integer(name, value, 1, 100_000)
        if self.width % self.heads:
            raise InputError(f"width {self.width} is no multiple of heads {self.heads}", argument="heads")


class DiTControl(nn.Module):
    """(base, noisy latent, time, text, encoded picture) → what is added to the base's tokens, (B, N, D) each."""

    def __init__(self, config: DiTControlConfig):
        super().__init__()
        self.config = config
        D = config.width
        self.hint_in = nn.Linear(config.hint, D)
        self.blocks = nn.ModuleList([Block(D, config.heads, modulated=True) for _ in range(config.blocks)])
        self.outputs = nn.ModuleList([nn.Linear(D, D) for _ in range(config.outputs)])

    @classmethod
    def of(cls, base: DiT, blocks: int = 1, outputs: int = 4) -> DiTControl:
        """A fresh one for a DiT: its first blocks copied, the rest such that it begins by changing nothing."""
        shape = base.config
        if not (1 <= blocks <= shape.depth and 1 <= outputs <= shape.depth):
            raise InputError(
                f"blocks and outputs must be from 1 to the base's {shape.depth} blocks, not {blocks} and {outputs}",
                argument="blocks",
            )
        cell = shape.latent_channels * shape.patch**2
        made = cls(DiTControlConfig(cell, shape.width, shape.heads, blocks, outputs))
        for own, theirs in zip(made.blocks, base.blocks, strict=False):
            own.load_state_dict(theirs.state_dict())
        for layer in made.outputs:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return made

    def forward(
        self, base: DiT, x: Tensor, time: Tensor, cond: Conditioning, hint: Tensor
    ) -> tuple[Tensor, ...]:
        """x, time, cond: as the base has them. hint: (B or 1, C, T, H, W), the encoded picture."""
        h, c, positions = base.enter(x, time, cond)  # (B, M + N, D)
        M = h.shape[1] - len(positions)
        shown = self.hint_in(to_patches(hint, base.config.patch))  # (B or 1, N, D)
        h = torch.cat([h[:, :M], h[:, M:] + shown], dim=1)
        cos, sin, mask = base.turns(h, positions, cond)
        shared = base.modulation(c).view(len(h), 6, -1)
        for i, block in enumerate(self.blocks):
            h = block(h, cos, sin, mask, shared + base.offsets[i])
        read = rms_norm(h[:, M:])
        return tuple(layer(read) for layer in self.outputs)
