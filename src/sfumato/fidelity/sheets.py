"""Sheets of test pictures that go through an instrument together, and rows of what was measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.instrument import Instrument

Array = NDArray[np.floating]
Row = dict[str, Any]
Told = Callable[[int, int], None]  # how many of how many pictures are done

SIDE, PATCH = 256, 64  # pixels of a sheet and of a patch on it: 16 go together
BORDER = 8  # pixels of a patch that are not measured
INNER = np.s_[BORDER : PATCH - BORDER]  # of a patch, what is measured


def through(
    instrument: Instrument, patches: Sequence[Array], told: Told | None = None, side: int = PATCH
) -> list[Array]:
    """Patches (side, side, 3) through the instrument, as many on a sheet as go there."""
    many = (SIDE // side) ** 2
    sheets = []
    for start in range(0, len(patches), many):
        sheet = np.full((SIDE, SIDE, 3), 0.5, np.float32)
        for place, patch in enumerate(patches[start : start + many]):
            sheet[_of(place, side)] = patch
        sheets.append(sheet)
    back = instrument.pictures(sheets, None if told is None else lambda done: told(done, len(sheets)))
    return [
        back[number // many][_of(number % many, side)].astype(np.float64) for number in range(len(patches))
    ]


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def spread(name: str, at: Sequence[float]) -> Row:
    """A measure at each place in a latent cell, as its mean and its extremes over them."""
    return {name: mean(at), f"{name}_low": float(min(at)), f"{name}_high": float(max(at))}


def _of(place: int, side: int) -> tuple[slice, slice]:
    row, column = divmod(place, SIDE // side)
    return slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
