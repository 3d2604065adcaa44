"""A picture or clip made again from its recipe: how near the new one comes, and which ingredients are others now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.receipts.digests import drawn, of_pixels, of_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

NEAR = 4  # of 255: what other kernels of the same model may differ by in a value
NEAR_SHARE = 0.02  # of the values that may differ by more, where few do
FURTHEST = 40  # of 255: none of those few may be further off (bounds by `benchmarks/nearness.py`)
SIDE, PATCH = 8, 8.0  # of a square of so many pixels a side: what its values may be off by in the mean
HASHED = ("weights", "embeddings", "loras", "controlnets", "annotators")  # of a recipe: names to hashes
EDITED = {
    "pixels": "the file's pixels, after they were drawn",
    "recipe": "the file's recipe, after it was written",
}
SAID = ("dtype", "text_dtype", "engine", "device", "sfumato", "torch", "python")  # single values


@dataclass(frozen=True)
class Difference:
    """Between two pictures of one size, or two clips of as many frames. most, mean: of the values, of 255. share: of
    those that differ at all.

    far: the share of those that differ by more than `NEAR`. patch: of 255, the mean of the square of `SIDE` pixels that
    is off most. psnr: dB, infinite for equal ones.
    """

    most: int
    mean: float
    share: float
    far: float
    patch: float
    psnr: float

    @property
    def verdict(self) -> str:
        """identical, near (rounding of other kernels may do so) or different."""
        if self.most == 0:
            return "identical"
        near = self.far <= NEAR_SHARE and self.most <= FURTHEST and self.patch <= PATCH
        return "near" if near else "different"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; psnr is None for equal pictures."""
        psnr = None if math.isinf(self.psnr) else round(self.psnr, 2)
        values = {"most": self.most, "mean": round(self.mean, 4), "share": round(self.share, 6)}
        shares = {"far": round(self.far, 6), "patch": round(self.patch, 3)}
        return {"verdict": self.verdict, **values, **shares, "psnr": psnr}


@dataclass(frozen=True)
class Changed:
    """One ingredient of a recipe that is another now. before, now: None where it was not, or is not."""

    name: str
    before: str | None
    now: str | None

    def describe(self) -> str:
        """For people."""
        if self.name in EDITED:
            return EDITED[self.name]
        if self.before is None or self.now is None:
            return f"{self.name} was {self.before or 'none'} and is {self.now or 'none'}"
        before, now = (_short(value) for value in (self.before, self.now))
        return f"{self.name}: {before} then, {now} now"


def difference(before: Image, now: Image) -> Difference | None:
    """Between two pictures as RGB; None where they have other sizes."""
    return difference_of_clips([before], [now])


def difference_of_clips(before: Sequence[Image], now: Sequence[Image]) -> Difference | None:
    """Between the frames of two clips as RGB, over all of them; None of other sizes, or of another number of them."""
    if [frame.size for frame in before] != [frame.size for frame in now]:
        return None
    count = most = total = square = off_at_all = far = 0
    patch = 0.0
    for one, other in zip(before, now, strict=True):
        first, second = (np.asarray(frame.convert("RGB"), dtype=np.int64) for frame in (one, other))
        off = np.abs(first - second)
        count, most = count + off.size, max(most, int(off.max()))
        total, square = total + int(off.sum()), square + int(np.square(off).sum())
        off_at_all, far = off_at_all + int((off > 0).sum()), far + int((off > NEAR).sum())
        patch = max(patch, _worst_square(off))
    psnr = math.inf if square == 0 else 10 * math.log10(255**2 * count / square)
    return Difference(most, total / count, off_at_all / count, far / count, patch, psnr)


def _worst_square(off: np.ndarray) -> float:
    """The largest mean over squares of `SIDE` pixels. off: (H, W, 3). Squares touch; those at the right and the lower
    edge are laid so that they end there.
    """
    height, width = off.shape[:2]
    sides = min(SIDE, height), min(SIDE, width)
    at = [
        [*range(0, whole - side, side), whole - side]
        for whole, side in zip((height, width), sides, strict=True)
    ]
    sums = np.zeros((height + 1, width + 1), dtype=np.int64)
    sums[1:, 1:] = off.sum(2).cumsum(0).cumsum(1)
    top, left = np.ix_(*at)
    low, right = top + sides[0], left + sides[1]
    squares = sums[low, right] - sums[top, right] - sums[low, left] + sums[top, left]
    return float(squares.max()) / (sides[0] * sides[1] * 3)


def edited(
    recipe: Mapping[str, Any],
    held: Sequence[Image],
    now: Sequence[Image],
    found: Difference | None,
    *,
    exact: bool,
) -> list[Changed]:
    """What of a file was changed after it was drawn, as the digests in its recipe tell; nothing of a file without.

    held: the pictures in the file. exact: it keeps every value, as PNG and WebP do. now: what is drawn by the recipe
    today. found: between the file and the same written today: of a file that is not exact, an edit shows where the
    drawing is the one that the digest names and yet they differ. So do they where another version of the codec wrote.
    """
    changes = []
    said = drawn(recipe, "recipe")
    if said is not None and said != (own := of_recipe(recipe)):
        changes.append(Changed("recipe", said, own))
    said = drawn(recipe, "pixels")
    if said is not None and exact and said != (own := of_pixels(held)):
        changes.append(Changed("pixels", said, own))
    elif said is not None and not exact and (found is None or found.most) and said == of_pixels(now):
        changes.append(Changed("pixels", said, of_pixels(held)))
    return changes


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Changed]:
    """The ingredients of two recipes that differ, those that decide most first: weights, then types, then versions.

    A recipe may be a stranger's: what is of another form than ours counts as absent. What an older recipe does not
    name is not compared.
    """
    found: list[Changed] = []
    refiners = [_object(recipe.get("refiner")) for recipe in (before, now)]
    for name in HASHED:
        found += _hashes(name, _object(before.get(name)), _object(now.get(name)))
    found += _hashes("refiner", *(_object(refiner.get("weights")) for refiner in refiners))
    for name in SAID:
        if name in before:
            found += _compared(name, before.get(name), now.get(name))
    for group, told in (("noise", "noise "), ("kernels", "")):
        values = [_object(recipe.get(group)) for recipe in (before, now)]
        for name in values[0]:
            found += _compared(f"{told}{name}", values[0][name], values[1].get(name))
    return found


def _hashes(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Changed]:
    found = []
    for name in (*before, *(other for other in now if other not in before)):
        found += _compared(f"{what} {name}", before.get(name), now.get(name))
    return found


def _compared(name: str, before: Any, now: Any) -> list[Changed]:
    texts = [None if value is None else str(value) for value in (before, now)]
    return [] if texts[0] == texts[1] else [Changed(name, *texts)]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _short(value: str) -> str:
    return f"{value[:12]}…" if len(value) > 40 else value
