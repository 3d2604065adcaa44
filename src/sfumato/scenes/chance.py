"""Draws from the one generator whose stream Python promises to keep, by its `random()` alone."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def pick(random: Random, values: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of `values`, all as likely or by `weights`."""
    if weights is None:
        return values[int(random.random() * len(values))]
    at = random.random() * sum(weights)
    for value, weight in zip(values, weights, strict=True):
        at -= weight
        if at < 0:
            return value
    return values[-1]


def between(random: Random, low: float, high: float) -> float:
    """A number evenly between the two."""
    return low + (high - low) * random.random()
