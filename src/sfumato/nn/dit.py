"""A single-stream diffusion transformer: text and latent tokens in one sequence, told the time by shared adaLN.

Sources: DiT (Peebles & Xie 2023) for adaLN-zero; PixArt-α (Chen et al. 2023, sec. 2.3) for one modulation shared by
all blocks plus a learned offset each; DiT-Air (2503.10618) for the single stream; QK-norm and 3D rotary positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.nn.embed import grid_positions, grid_sinusoid, rope_angles, sinusoid, turns
from sfumato.nn.transformer import Block, rms_norm
from sfumato.types import Conditioning

KEPT = (  # parts of names whose layers stay as they are in eight bits: what enters and leaves, times, modulations
    "latent_in",
    "latent_out",
    "text_in",
    "time_in",
    "pooled_in",
    "modulation",
    "final_modulation",
    "label_out",
)


@dataclass(frozen=True)
class DiTConfig:
    latent_channels: int  # channels of the latent; 3 for pixels
    patch: int = 1  # latent cells per token and side; 1 for compressed latents, more for pixels
    width: int = 320  # channels of a token
    depth: int = 8  # blocks
    heads: int = 5  # attention heads; 64 channels each keep a matrix tile full
    text_width: int = 256  # channels of the text features
    time_width: int = 256  # sinusoids that encode the time
    label_classes: tuple[int, ...] = ()  # per-cell attributes a middle layer learns to name; () for none


class DiT(nn.Module):
    """Network of a denoiser: (x, time, conditioning) → a field shaped like x (velocity, noise or picture)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        D = config.width
        cell = config.latent_channels * config.patch**2
        self.latent_in = nn.Linear(cell, D)
        self.text_in = nn.Linear(config.text_width, D)
        self.time_in = nn.Sequential(nn.Linear(config.time_width, D), nn.SiLU(), nn.Linear(D, D))
        self.pooled_in = nn.Linear(config.text_width, D)
        self.modulation = nn.Linear(D, 6 * D)
        self.blocks = nn.ModuleList([Block(D, config.heads, modulated=True) for _ in range(config.depth)])
        self.offsets = nn.Parameter(torch.zeros(config.depth, 6, D))
        self.final_modulation = nn.Linear(D, 2 * D)
        self.latent_out = nn.Linear(D, cell)
        self.label_out = nn.Linear(D, sum(config.label_classes)) if config.label_classes else None
        self._initialise()

    def _initialise(self) -> None:
        """Linear layers as in ViT; everything that gates or ends the residual stream starts at zero (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.modulation, self.final_modulation, self.latent_out):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def label_depth(self) -> int:
        """Number of blocks before the label head reads the latent tokens."""
        return max(1, self.config.depth // 2)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Conditioning,
        skip_layers: Collection[int] = (),
        control: Sequence[Tensor] = (),
        seen: Tensor | None = None,
    ) -> Tensor:
        """x: (B, C, T, H, W); time: (B,) or scalar in [0, 1], or (B, T), a level of its own for each frame as in
        diffusion forcing (Chen et al. 2024, 2407.01392); returns (B, C, T, H, W).

        skip_layers: blocks to leave out, counted from 0. control: what is added to the latent's tokens, (B, N, D) each,
        before as many blocks at equal distances, the first among them (`nn/dit_control.py`). seen: (B, S) int64, those
        of the latent's tokens that there are, by their place in the whole, as in the encoder of MaskDiT (Zheng et al.
        2023, 2306.09305); the others are answered with zero.
        """
        h, c, positions = self.enter(x, time, cond, seen)
        h, _ = self._run_blocks(h, c, positions, cond, skip_layers, control)
        return self._leave(h, c, x, positions, seen)

    def forward_with_labels(
        self, x: Tensor, time: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, with the label head's logits (B, T·H·W, Σ classes), or None without a head."""
        h, c, positions = self.enter(x, time, cond)
        h, labels = self._run_blocks(h, c, positions, cond)
        return self._leave(h, c, x, positions), labels

    def forward_with_deep(
        self, x: Tensor, time: Tensor, cond: Conditioning, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with what all blocks together add to the tokens, (B, M + N, D).

        deep: such a sum of other calls, to add instead of running the blocks: the deviation that Δ-DiT keeps (Chen et
        al. 2024, 2406.01125, sec. 3), of the whole trunk. What reads sample, text and time is computed anew.
        """
        start, c, positions = self.enter(x, time, cond)
        if deep is None:
            h, _ = self._run_blocks(start, c, positions, cond)
            deep = h - start
        else:
            h = start + deep
        return self._leave(h, c, x, positions), deep

    def enter(
        self, x: Tensor, time: Tensor, cond: Conditioning, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of text and latent (B, M + N, D), what all are told (B, D), and places in the latent (N, 3), or
        (B, N, 3) where only some are `seen`.

        With a time for each frame, (B, 1 + T, D): what the words are told, which is the latest of the times, and each
        frame.
        """
        B, _, T, H, W = x.shape
        p = self.config.patch
        patches = to_patches(x, p)
        positions = grid_positions(T, H // p, W // p, x.device)
        if seen is not None:
            patches, positions = patches.take_along_dim(seen[..., None], 1), positions[seen]
        tokens = self.latent_in(patches)  # (B, N, D)
        tokens = tokens + grid_sinusoid(positions, tokens.shape[-1]).to(tokens.dtype)
        text = self.text_in(cond.tokens)  # (B, M, D)

        pooled = self._pooled(cond)  # (B, text_width)
        pooled_c = self.pooled_in(pooled)
        if time.ndim == 2:
            time, pooled_c = torch.cat([time.amax(1, keepdim=True), time], 1), pooled_c[:, None]
        else:
            time = time.expand(B)
        c = self.time_in(sinusoid(1000 * time, self.config.time_width)) + pooled_c
        return torch.cat([text, tokens], dim=1), functional.silu(c), positions

    def _pooled(self, cond: Conditioning) -> Tensor:
        """The mean (B, text_width) of the tokens that are real."""
        if cond.mask is None:
            return cond.tokens.mean(1)
        weight = cond.mask[..., None].to(cond.tokens.dtype)
        return (cond.tokens * weight).sum(1) / weight.sum(1).clamp(min=1)

    def turns(self, h: Tensor, positions: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the blocks need of places and words: cosines and sines, and the mask (B, M + N)."""
        B, N = len(h), positions.shape[-2]
        M = h.shape[1] - N
        angles = rope_angles(positions, self.config.width // self.config.heads)
        angles = functional.pad(angles, (0, 0, M, 0))  # words do not turn
        cos, sin = turns(angles)
        mask = None if cond.mask is None else torch.cat([cond.mask, cond.mask.new_ones(B, N)], dim=1)
        return cos, sin, mask

    def _run_blocks(
        self,
        h: Tensor,
        c: Tensor,
        positions: Tensor,
        cond: Conditioning,
        skipped: Collection[int] = (),
        control: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """(B, M + N, D) → the same after all blocks but the `skipped`, and the label head's logits."""
        M = h.shape[1] - positions.shape[-2]
        cos, sin, mask = self.turns(h, positions, cond)
        added = dict(zip(places(len(self.blocks), len(control)), control, strict=True))
        shared = self.modulation(c).unflatten(-1, (6, -1))  # (B, 6, D), or (B, 1 + T, 6, D)
        owner = None if c.ndim == 2 else owners(M, positions)

        labels = None
        for i, block in enumerate(self.blocks):
            if i in added:
                h = torch.cat([h[:, :M], h[:, M:] + added[i].to(h.dtype)], dim=1)
            if i not in skipped:
                told = shared + self.offsets[i]
                if owner is not None:
                    told = of_owners(told, owner).transpose(1, 2)  # (B, 6, M + N, D)
                h = block(h, cos, sin, mask, told)
            if self.label_out is not None and i + 1 == self.label_depth:
                labels = self.label_out(rms_norm(h[:, M:]))
        return h, labels

    def _leave(
        self, h: Tensor, c: Tensor, x: Tensor, positions: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """(B, M + N, D) → a field shaped like x, in its type."""
        p, N = self.config.patch, positions.shape[-2]
        T, H, W = x.shape[-3:]
        told = self.final_modulation(c)
        told = told[:, None] if c.ndim == 2 else of_owners(told, owners(0, positions))  # (B, N, 2D)
        shift, scale = told.chunk(2, dim=-1)
        out = self.latent_out(rms_norm(h[:, -N:]) * (1 + scale) + shift)  # (B, N, C·p²)
        if seen is not None:
            whole = out.new_zeros(len(out), T * (H // p) * (W // p), out.shape[-1])
            out = whole.scatter(1, seen[..., None].expand_as(out), out)
        return from_patches(out, (T, H, W), p).to(x.dtype)


def owners(words: int, positions: Tensor) -> Tensor:
    """(…, M + N) of M words and N cells at `positions` (…, N, 3): 0 for a word, and 1 + t for a cell of frame t."""
    return functional.pad(1 + positions[..., 0].long(), (words, 0))


def of_owners(told: Tensor, owner: Tensor) -> Tensor:
    """What each token is told, (B, N, …), of what frames are, (B, 1 + T, …). owner: (N,) or (B, N)."""
    if owner.ndim == 1:
        return told[:, owner]
    return told.take_along_dim(owner.view(*owner.shape, *[1] * (told.ndim - 2)), 1)


def places(depth: int, count: int) -> list[int]:
    """`count` of `depth` blocks at equal distances, the first among them."""
    return [k * depth // count for k in range(count)]


def to_patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) → (B, T·H/p·W/p, C·p²): frames in order, rows, then columns."""
    B, C, T, H, W = x.shape
    x = x.view(B, C, T, H // patch, patch, W // patch, patch).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(B, T * (H // patch) * (W // patch), C * patch * patch)


def from_patches(tokens: Tensor, shape: tuple[int, int, int], patch: int) -> Tensor:
    """The inverse of `to_patches` for a latent of `shape` (T, H, W)."""
    T, H, W = shape
    B, _, cell = tokens.shape
    C = cell // patch**2
    x = tokens.view(B, T, H // patch, W // patch, C, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(B, C, T, H, W)
