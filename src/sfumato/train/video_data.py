"""What a model of pictures learns clips from: latents of clips, whole and in windows, and of their first frames."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from sfumato.autoencoder.causal import STRIDE, latents_of
from sfumato.data.buckets import Order
from sfumato.data.latents import LatentCache
from sfumato.data.source import Source
from sfumato.text import Tokenizer, pad
from sfumato.train.loop import seeded
from sfumato.train.video_recipe import VideoRecipe

TEXT_MULTIPLE = 24  # prompts are padded to multiples of this many tokens, so that few shapes are compiled
PICTURE, SHORT, WHOLE = range(3)  # kinds of microbatches, in the order of a recipe's `mix`
ASKED = 0.5  # share of the pictures that are learnt with a clip's caption, where a clip's first frame is drawn as one
MOVED = 0.2  # of `changed`, from which on something has moved there


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
    of each are known, seen or not; seen: (B, S) int64, the tokens of the latents that there are, or None for all;
    shown: (B, T, H, W) bool, the cells that are theirs.
    """

    latents: Tensor
    ids: Tensor
    mask: Tensor
    known: Tensor
    seen: Tensor | None = None
    shown: Tensor | None = None

    def first(self) -> ClipBatch:
        """Its first clip alone."""
        return self.change(lambda tensor: tensor[:1])

    def change(self, change: Callable[[Tensor], Tensor]) -> ClipBatch:
        """The same with `change` applied to every tensor that is there."""
        return ClipBatch(*(None if tensor is None else change(tensor) for tensor in vars(self).values()))


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

    latents: (M, C, 1 + k, H, W) of all clips. A window that does not begin a clip has its beginning known. Where the
    recipe shows some `rows`, a short window is not cut out: it is the whole clip, of which as many latents as it would
    have are seen. patch: cells of the latent per token and side.
    """

    def __init__(
        self,
        source: ClipSource,
        latents: Tensor,
        tokenizer: Tokenizer,
        recipe: VideoRecipe,
        seed: int,
        device: torch.device,
        patch: int,
    ):
        self.source, self.latents, self.tokenizer = source, latents, tokenizer
        self.recipe, self.seed, self.device, self.patch = recipe, seed, device, patch
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
        thin = kind == SHORT and self.recipe.rows
        count = self.lengths[WHOLE if thin else kind]
        latents = torch.stack([self.latents[index, :, at : at + count] for index, at, _, _ in rows]).float()
        known = torch.tensor([known for _, _, known, _ in rows])
        batch = ClipBatch(latents, ids, mask, known)
        if thin:
            batch = self._thinned(batch, seeded("cpu", self.seed, "thinned", step, part))
        return batch.change(lambda tensor: tensor.to(self.device))

    def _thinned(self, batch: ClipBatch, chance: torch.Generator) -> ClipBatch:
        """The batch with some latents of each clip seen, its first and others by chance, and the same rows of tokens of
        each: first those in which something moves. Rows are whole, or their ends would tell where it goes.
        """
        B, _, T, H, W = batch.latents.shape
        high, wide = H // self.patch, W // self.patch
        others = torch.rand(B, T - 1, generator=chance).argsort(1)[:, : self.lengths[SHORT] - 1]
        frames = functional.pad(1 + others.sort(1).values, (1, 0))  # (B, F)
        moved = changed(batch.latents).amax((1, 3)).unflatten(1, (high, self.patch)).amax(2)  # (B, high)
        rank = torch.where(moved > MOVED, 1 + moved, torch.rand(B, high, generator=chance))
        rows = rank.topk(min(self.recipe.rows, high), 1).indices.sort(1).values  # (B, R)
        places = frames[:, :, None, None] * high + rows[:, None, :, None]
        seen = (places * wide + torch.arange(wide)).flatten(1)
        shown = torch.zeros(B, T, high, dtype=torch.bool).flatten(1).scatter(1, places.flatten(1), True)
        shown = shown.view(B, T, high, 1).repeat_interleave(self.patch, 2).expand(B, T, H, W)
        last = frames.gather(1, (batch.known - 1).clamp(min=0)[:, None])[:, 0]
        return replace(batch, known=torch.where(batch.known > 0, last + 1, 0), seen=seen, shown=shown)

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
        begins = kind != SHORT or not known or self.recipe.rows
        at = 0 if begins else int(draw[1] * (self.lengths[WHOLE] - self.lengths[SHORT] + 1))
        frames: int | None = None
        if kind == PICTURE and not (self.recipe.first_alone and draw[1] < ASKED):
            frames = 1
        elif kind == SHORT and not at and not self.recipe.rows:
            frames = self.recipe.short
        text = "" if draw[2] < self.recipe.loss.drop_prompt else self.source.caption(index, epoch, frames)
        return index, at, known, self.tokenizer.encode(text)


def changed(x0: Tensor) -> Tensor:
    """(B, T, H, W) in [0, 1): how far each cell of clips (B, C, T, H, W) is from what it is in the first frame."""
    distance = (x0 - x0[:, :, :1]).square().mean(1)
    return distance / (1 + distance)


def _chosen(shares: Sequence[float], u: float) -> int:
    """Which of `shares` a number in [0, 1) falls into."""
    at = u * sum(shares)
    for k, share in enumerate(shares):
        at -= share
        if at < 0:
            return k
    return len(shares) - 1
