"""Pictures of many shapes in batches of one shape, in an order that is a function of (seed, step) alone.

Aspect-ratio buckets: NovelAI's method as SDXL describes it (Podell et al. 2023, section 2.3): a few sizes
of about equal area, each picture scaled to cover the nearest and cropped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from sfumato.data.source import Size
from sfumato.errors import InputError

AREA_SLACK = 0.1  # a bucket's area differs from size² by at most this part


class Batch(NamedTuple):
    """indices: int64 (B,); epochs: int64 (B,), how often each of these pictures has been drawn before."""

    indices: np.ndarray
    epochs: np.ndarray


def bucket_sizes(size: int, multiple: int, max_ratio: float = 2.0) -> list[Size]:
    """(height, width) pairs, multiples of `multiple`, area within 10 % of size², ratio up to `max_ratio`
    either way.

    `multiple` is the autoencoder's factor times the denoiser's patch. Raises `InputError` when `size` is no
    multiple.
    """
    if multiple < 1 or size < multiple or size % multiple:
        near = max(multiple, round(size / max(multiple, 1)) * multiple)
        raise InputError(
            f"size {size} is not a multiple of {multiple}; the nearest is {near}", argument="size"
        )
    if not max_ratio >= 1.0:
        raise InputError(f"max_ratio must be at least 1, not {max_ratio}", argument="max_ratio")
    sizes = {(size, size)}
    for short in range(multiple, size, multiple):
        long = round(size * size / short / multiple) * multiple
        if long / short <= max_ratio and abs(short * long / size**2 - 1) <= AREA_SLACK:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_bucket(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest on a logarithmic scale; the first of equals."""
    ratio = math.log(height / width)
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), s))


def fit(picture: Image.Image, size: Size, position: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Crop to the shape of `size` (height, width) and scale to it by Lanczos, which averages when it shrinks.

    position: (down, across) in [0, 1]: where the crop lies in what is too long; (0.5, 0.5) is the centre.
    """
    height, width = size
    scale = min(picture.width / width, picture.height / height)
    box_width, box_height = min(width * scale, picture.width), min(height * scale, picture.height)
    top, left = (picture.height - box_height) * position[0], (picture.width - box_width) * position[1]
    box = (left, top, min(left + box_width, picture.width), min(top + box_height, picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def raw_bits(count: int, *key: object) -> np.ndarray:
    """`count` uint64 words, a function of `key` alone: Philox, whose raw output numpy keeps stable."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def shuffled(count: int, *key: object) -> np.ndarray:
    """A permutation of range(count) that is a function of `key` alone."""
    return np.argsort(raw_bits(count, count, *key), kind="stable")


class Order:
    """Which pictures make up the batch of any step, without having made those before it.

    Every batch is full and of one bucket. A bucket is an endless row of shuffled passes over its n members;
    by the end of epoch e it has given ⌊(e + 1)·n / batch⌋ batches, and what is left over opens its next
    one. So no picture is dropped or favoured: after any whole number of epochs the counts of two pictures
    of a bucket differ by at most one. Within an epoch the buckets' batches are shuffled among each other.
    """

    def __init__(self, buckets: Mapping[Size, Sequence[int]], batch: int, seed: int = 0):
        if batch < 1:
            raise InputError(f"batch must be at least 1, not {batch}", argument="batch")
        self.batch, self.seed = batch, seed
        self._sizes = sorted(size for size, members in buckets.items() if len(members))
        self._members = [np.asarray(buckets[size], dtype=np.int64) for size in self._sizes]
        if not self._members:
            raise InputError("there is no picture to draw batches from", argument="buckets")
        self._pass = lru_cache(maxsize=4 * len(self._members))(self._shuffled_pass)
        self._epoch = lru_cache(maxsize=2)(self._epoch_plan)

    def __len__(self) -> int:
        """Pictures in one epoch."""
        return sum(len(m) for m in self._members)

    def steps_before(self, epoch: int) -> int:
        """Batches in the epochs 0 … epoch − 1."""
        return sum(epoch * len(m) // self.batch for m in self._members)

    def epoch_at(self, step: int) -> int:
        """The epoch to which a step belongs."""
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:  # steps_before(low) ≤ step < steps_before(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def bucket_at(self, step: int) -> Size:
        """(height, width) of the batch of `step`."""
        return self._sizes[self._locate(step)[0]]

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of `step` ≥ 0, or the slice of it that belongs to process `rank` of `world`.

        Raises `InputError` when the batch does not divide by `world`.
        """
        if step < 0:
            raise InputError(f"step must not be negative, but is {step}", argument="step")
        if world < 1 or not 0 <= rank < world or self.batch % world:
            raise InputError(
                f"a batch of {self.batch} cannot be split for process {rank} of {world}", argument="world"
            )
        bucket, number = self._locate(step)
        share = self.batch // world
        places = np.arange(share, dtype=np.int64) + number * self.batch + rank * share
        count = len(self._members[bucket])
        epochs, within = np.divmod(places, count)
        indices = np.empty(share, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._pass(bucket, int(epoch))[within[here]]
        return Batch(indices, epochs)

    def _locate(self, step: int) -> tuple[int, int]:
        epoch = self.epoch_at(step)
        return self._epoch(epoch)[step - self.steps_before(epoch)]

    def _shuffled_pass(self, bucket: int, epoch: int) -> np.ndarray:
        members = self._members[bucket]
        return members[shuffled(len(members), "pass", self.seed, self._sizes[bucket], epoch)]

    def _epoch_plan(self, epoch: int) -> list[tuple[int, int]]:
        plan = [
            (bucket, number)
            for bucket, members in enumerate(self._members)
            for number in range(epoch * len(members) // self.batch, (epoch + 1) * len(members) // self.batch)
        ]
        return [plan[i] for i in shuffled(len(plan), "plan", self.seed, epoch)]
