"""What a model of pictures learns clips from: latents of clips, whole and in windows, and of their first frames."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfumato.autoencoder.causal import STRIDE, latents_of
from sfumato.data.buckets import Order
from sfumato.data.latents import LatentCache
from sfumato.data.source import Source
from sfumato.text import Tokenizer, pad
from sfumato.train.loop import seeded
from sfumato.train.video_recipe import VideoRecipe

TEXT_MULTIPLE = 32  # prompts are padded to multiples of this many tokens, so that few shapes are compiled
PICTURE, SHORT, WHOLE = range(3)  # kinds of microbatches, in the order of a recipe's `mix`


class ClipSource(Source, Protocol):
    """A source that moves. caption: of its first `frames` alone, where that is asked."""

    frames: int

    def caption(self, index: int, epoch: int = 0, frames: int | None = None) -> str: ...

    def stills(self) -> list[int]:
        """Clips whose first frame may be learnt as a picture."""
        ...


@dataclass(frozen=True)
class ClipBatch:
    """One microbatch. latents: (B, C, T, H, W); ids, mask: (B, N); known: (B,) int64, how many latents at the beginning
    of each are known.
    """

    latents: Tensor
    ids: Tensor
    mask: Tensor
    known: Tensor

    def first(self) -> ClipBatch:
        """Its first clip alone."""
        return ClipBatch(self.latents[:1], self.ids[:1], self.mask[:1], self.known[:1])


class Frames:
    """Windows of frames' latents, for the layers between frames: part p of step s, whenever it is asked for."""

    def __init__(self, cache: LatentCache, recipe: VideoRecipe, seed: int, device: torch.device):
        self.cache, self.recipe, self.seed, self.device = cache, recipe, seed, device
        self.order = Order(cache.buckets(), recipe.codec.batch, seed)

    def part(self, step: int, part: int) -> Tensor:
        """(B, C, short, H, W); a window begins where a latent of the clip begins."""
        chosen = self.order.batch_at(step - 1, part, self.recipe.codec.parts)
        frames = self.cache.batch(chosen.indices.tolist())
        starts = (self.recipe.frames - self.recipe.short) // STRIDE + 1
        at = STRIDE * int(torch.randint(starts, (), generator=seeded("cpu", self.seed, "window", step, part)))
        return frames[:, :, at : at + self.recipe.short].to(self.device)


class Clips:
    """Microbatches of a step of the denoiser: pictures, short windows and whole clips, as the recipe mixes them.

    latents: (M, C, 1 + k, H, W) of all clips. A window that does not begin a clip has its beginning known.
    """

    def __init__(
        self,
        source: ClipSource,
        latents: Tensor,
        tokenizer: Tokenizer,
        recipe: VideoRecipe,
        seed: int,
        device: torch.device,
    ):
        self.source, self.latents, self.tokenizer = source, latents, tokenizer
        self.recipe, self.seed, self.device = recipe, seed, device
        everything, stills = list(range(len(source))), source.stills()
        self.kinds = [kind for kind, count in enumerate(recipe.mix) for _ in range(count)]
        size = recipe.train.batch // recipe.train.parts
        self.orders = {
            kind: Order({(1, 1): stills if kind == PICTURE else everything}, size * count, seed + kind)
            for kind, count in enumerate(recipe.mix)
            if count
        }
        self._dealt = functools.lru_cache(maxsize=8)(self._deal)

    def part(self, step: int, part: int) -> ClipBatch:
        """Microbatch `part` of `step` (from 1), on the device: a function of both alone."""
        kind = self.kinds[part]
        size = self.recipe.train.batch // self.recipe.train.parts
        place = part - self.kinds.index(kind)
        rows = self._dealt(step, kind)[place * size : (place + 1) * size]
        ids, mask = pad([tokens for *_, tokens in rows], TEXT_MULTIPLE)
        count = self.lengths[kind]
        latents = torch.stack([self.latents[index, :, at : at + count] for index, at, _, _ in rows]).float()
        known = torch.tensor([known for _, _, known, _ in rows])
        return ClipBatch(*(tensor.to(self.device) for tensor in (latents, ids, mask, known)))

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Latents of a picture, of a short window, and of a whole clip."""
        return 1, latents_of(self.recipe.short), latents_of(self.recipe.frames)

    def _deal(self, step: int, kind: int) -> Sequence[tuple[int, int, int, list[int]]]:
        """(clip, first latent, how many are known, prompt's tokens) of all of a kind in a step, short prompts first."""
        batch = self.orders[kind].batch_at(step - 1)
        chance = seeded("cpu", self.seed, "clips", step, kind)
        draws = torch.rand(len(batch.indices), 3, generator=chance, dtype=torch.float64).tolist()
        rows = [
            self._row(int(index), int(epoch), kind, draw)
            for index, epoch, draw in zip(batch.indices, batch.epochs, draws, strict=True)
        ]
        return sorted(rows, key=lambda row: len(row[3]))

    def _row(self, index: int, epoch: int, kind: int, draw: list[float]) -> tuple[int, int, int, list[int]]:
        known = 0 if kind == PICTURE else _chosen(self.recipe.loss.known, draw[0])
        starts = self.lengths[WHOLE] - self.lengths[kind] + 1 if known and kind == SHORT else 1
        at = int(draw[1] * starts)
        frames = {PICTURE: 1, SHORT: None if at else self.recipe.short, WHOLE: None}[kind]
        text = "" if draw[2] < self.recipe.loss.drop_prompt else self.source.caption(index, epoch, frames)
        return index, at, known, self.tokenizer.encode(text)


def _chosen(shares: Sequence[float], u: float) -> int:
    """Which of `shares` a number in [0, 1) falls into."""
    at = u * sum(shares)
    for k, share in enumerate(shares):
        at -= share
        if at < 0:
            return k
    return len(shares) - 1
