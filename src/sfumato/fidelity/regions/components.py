"""Connected components of a mask, by runs of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Components:
    """Of each component: left, top, right, bottom (exclusive), pixels, and sides of pixels that border on others."""

    left: NDArray[np.int64]
    top: NDArray[np.int64]
    right: NDArray[np.int64]
    bottom: NDArray[np.int64]
    area: NDArray[np.int64]
    border: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.area)

    @property
    def width(self) -> NDArray[np.int64]:
        return self.right - self.left

    @property
    def height(self) -> NDArray[np.int64]:
        return self.bottom - self.top

    def pick(self, which: NDArray) -> Components:
        """Those of a mask or of indices."""
        return Components(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def components(mask: NDArray[np.bool_]) -> Components:
    """Eight-connected components of (H, W)."""
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    row, start = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1]
    count = len(row)
    first = np.searchsorted(row, np.arange(height + 1))  # where each row's runs begin
    above, below = _touching(first, start, end, height)
    label = _union(count, above, below)
    names, label = np.unique(label, return_inverse=True)
    n = len(names)
    left, top = np.full(n, width), np.full(n, height)
    right, bottom = np.zeros(n, np.int64), np.zeros(n, np.int64)
    np.minimum.at(left, label, start)
    np.maximum.at(right, label, end)
    np.minimum.at(top, label, row)
    np.maximum.at(bottom, label, row + 1)
    area = np.bincount(label, end - start, n).astype(np.int64)
    # sides: two ends for each run, and above and below all that no run of the neighbouring row covers
    shared = np.maximum(np.minimum(end[above], end[below]) - np.maximum(start[above], start[below]), 0)
    sides = np.bincount(label, 2 * (end - start) + 2, n) - 2 * np.bincount(label[above], shared, n)
    return Components(left, top, right, bottom, area, sides.astype(np.int64))


def joined(count: int, first: NDArray, second: NDArray) -> list[NDArray[np.int64]]:
    """Groups of 0 … count − 1 that pairs (first, second) join."""
    label = _union(count, first, second)
    order = np.argsort(label, kind="stable")
    cuts = np.nonzero(np.diff(label[order]))[0] + 1
    return np.split(order, cuts) if count else []


def _touching(first: NDArray, start: NDArray, end: NDArray, height: int) -> tuple[NDArray, NDArray]:
    """Pairs of runs of neighbouring rows that touch, also by a corner: a run touches those of the row below that begin
    no later than its end and end no earlier than its start."""
    above: list[NDArray] = []
    below: list[NDArray] = []
    for y in range(height - 1):
        a, b, c = first[y], first[y + 1], first[y + 2]
        if a == b or b == c:
            continue
        low = b + np.searchsorted(end[b:c], start[a:b], side="left")
        high = b + np.searchsorted(start[b:c], end[a:b], side="right")
        many = np.maximum(high - low, 0)
        if not many.any():
            continue
        above.append(np.repeat(np.arange(a, b), many))
        offset = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        below.append(np.repeat(low, many) + offset)
    if not above:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(above), np.concatenate(below)


def _union(count: int, first: NDArray, second: NDArray) -> NDArray[np.int64]:
    """The smallest member of the group of each of 0 … count − 1: labels pass along pairs until none changes."""
    label = np.arange(count)
    while len(first):
        low = np.minimum(label[first], label[second])
        new = label.copy()
        np.minimum.at(new, label[first], low)
        np.minimum.at(new, label[second], low)
        new = new[new]
        if (new == label).all():
            break
        label = new
    return label
