"""A small bidirectional transformer over a prompt's tokens, trained jointly with the denoiser it serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.nn.embed import rope_angles, turns
from sfumato.nn.transformer import Block, rms_norm


@dataclass(frozen=True)
class TextConfig:
    vocabulary: int  # token ids; the tokenizer's length
    width: int = 256  # channels of a token's features
    depth: int = 2  # blocks; the denoiser's own blocks go on reading the words
    heads: int = 4  # 64 channels each


class TextEncoder(nn.Module):
    """ids (B, N) and mask (B, N) → features (B, N, D); padding is neither read nor meaningful in the output."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocabulary, config.width)
        self.embedding = nn.Embedding(config.vocabulary, config.width, _weight=table)
        self.blocks = nn.ModuleList(
            [Block(config.width, config.heads, modulated=False) for _ in range(config.depth)]
        )
        self.gain = nn.Parameter(torch.ones(config.width))
        # on "meta" the weights are about to be read and need no chance, which is slow to import there
        if not table.is_meta:
            nn.init.normal_(table, std=0.02 * config.width**0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, ids: Tensor, mask: Tensor, more: Tensor | None = None) -> Tensor:
        """more: (W, D), rows for ids beyond the vocabulary, of words that were learnt later."""
        if more is None:
            h = self.embedding(ids)  # (B, N, D)
        else:
            h = functional.embedding(ids, torch.cat([self.embedding.weight, more]))
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None]
        angles = rope_angles(positions, self.config.width // self.config.heads, theta=1000.0)
        cos, sin = turns(angles)
        for block in self.blocks:
            h = block(h, cos, sin, mask)
        return rms_norm(h) * self.gain
