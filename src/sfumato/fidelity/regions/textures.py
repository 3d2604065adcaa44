"""Periodic patterns and fine detail, from the spectra of tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.regions.components import components
from sfumato.fidelity.regions.region import Box, Region, best, box_mean

Array = NDArray[np.floating]
TILES = (32, 64, 128)  # pixels; tiles overlap by half
FIRST = 4  # waves in a tile, at least, for a pattern to be one
PURE = 0.55  # share of what varies that two waves must hold
VISIBLE = 0.02  # RMS of a pattern, in display values
NEAR = 4  # pixels around, from whose mean fine detail differs
CELL = 16  # pixels of the squares in which it is looked for
WIDELY = 0.7  # of such a square, what must vary: more than an edge does
BUSY = 0.035  # RMS of fine detail that is told
FEWEST = 3  # tiles of a pattern
LARGEST = 128  # pixels of a side of one region of detail
BATCH = 64  # tiles transformed together


def patterns(planes: Array) -> list[Region]:
    """Where two waves hold most of what varies. planes: (3, H, W)."""
    found: list[Region] = []
    for side in TILES:
        height, width = planes.shape[1:]
        if min(height, width) < side:
            continue
        purity, period, angle, strength = _peaks(planes, side)
        found += _areas((purity > PURE) & (strength > VISIBLE), side, period, angle)
    return best(found, 0.5)


def fine_detail(planes: Array, taken: Sequence[Region]) -> list[Region]:
    """What is left that varies finely: away from what is named already, and from its edges."""
    height, width = planes.shape[1:]
    free = np.ones((height, width), bool)
    for region in taken:
        left, top, right, bottom = region.grown(2 * NEAR, width, height).box
        free[top:bottom, left:right] = False
    fine = np.sqrt(sum(np.square(plane - box_mean(plane, NEAR)) for plane in planes)) * free
    cells = fine[: height // CELL * CELL, : width // CELL * CELL]
    cells = cells.reshape(height // CELL, CELL, width // CELL, CELL)
    busy = (np.square(cells).mean((1, 3)) > BUSY**2) & ((cells > BUSY / 3).mean((1, 3)) > WIDELY)
    parts = [part for box in _of_cells(busy) for part in _cut(box)]
    return [Region("detail", part, float(max(part[2] - part[0], part[3] - part[1]))) for part in parts]


def _of_cells(mask: NDArray[np.bool_]) -> list[Box]:
    """Boxes in pixels of connected cells."""
    parts = components(mask)
    boxes = np.stack([parts.left, parts.top, parts.right, parts.bottom], 1) * CELL
    return [(left, top, right, bottom) for left, top, right, bottom in boxes.tolist()]


def _grid(length: int, side: int) -> int:
    return (length - side) // (side // 2) + 1


def _radius(side: int) -> Array:
    return np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])


def _spectra(planes: Array, side: int):
    """Energy (side, side // 2 + 1) of each tile, row by row: mean squares, that sum to the variance under a window."""
    window = np.hanning(side + 2)[1:-1]
    window = np.outer(window, window)
    window /= np.sqrt(np.square(window).mean())
    hop = side // 2
    double = np.full(side // 2 + 1, 2.0)
    double[[0, -1]] = 1
    views = np.lib.stride_tricks.sliding_window_view(planes, (side, side), (1, 2))[:, ::hop, ::hop]
    tiles = views.reshape(3, -1, side, side) if views.shape[1] * views.shape[2] <= BATCH else None
    if tiles is not None:
        yield from _energy(tiles, window, double)
        return
    for row in range(views.shape[1]):
        yield from _energy(views[:, row], window, double)


def _energy(tiles: Array, window: Array, double: Array) -> Array:
    tiles = (tiles - tiles.mean((-2, -1), keepdims=True)) * window
    side = tiles.shape[-1]
    return np.square(np.abs(np.fft.rfft2(tiles))).sum(0) * double / side**4


def _peaks(planes: Array, side: int) -> tuple[Array, Array, Array, Array]:
    """Of each tile (rows, columns): the share of its two strongest waves, the stronger one's period, angle, and RMS."""
    height, width = planes.shape[1:]
    shape = _grid(height, side), _grid(width, side)
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    radius = _radius(side)
    rows = []
    for energy in _spectra(planes, side):
        total = energy.sum()
        left, waves = energy.copy(), []
        for _ in range(2):
            allowed = np.where(radius * side >= FIRST - 0.01, left, 0)
            y, x = divmod(int(np.argmax(allowed)), left.shape[1])
            ys, xs = np.arange(y - 1, y + 2) % side, np.arange(max(x - 1, 0), min(x + 2, left.shape[1]))
            waves.append((float(left[np.ix_(ys, xs)].sum()), float(fy[y, x]), float(fx[y, x])))
            left[np.ix_(ys, xs)] = 0
        share = (waves[0][0] + waves[1][0]) / total if total > 0 else 0.0
        frequency = np.hypot(waves[0][1], waves[0][2])
        turn = np.degrees(np.arctan2(waves[0][1], waves[0][2])) % 180
        rows.append((share, 1 / max(frequency, 1e-6), turn, np.sqrt(total)))
    shares, periods, turns, strengths = np.array(rows).T.reshape(4, *shape)
    return shares, periods, turns, strengths


def _areas(mask: NDArray[np.bool_], side: int, period: Array, angle: Array) -> list[Region]:
    """Connected tiles of like period as regions."""
    found = []
    bands = np.where(mask, np.round(np.log2(np.maximum(period, 1)) * 2), -1)
    for band in np.unique(bands[mask]):
        for box, where in _boxes_with(mask & (np.abs(bands - band) <= 1), side):
            if mask[where].sum() < FEWEST:
                continue
            size = float(np.median(period[where][mask[where]]))
            turn = float(np.median(angle[where][mask[where]]))
            area = (box[2] - box[0]) * (box[3] - box[1])
            found.append(Region("pattern", box, size, turn, weight=float(area)))
    return found


def _boxes_with(mask: NDArray[np.bool_], side: int) -> list[tuple[Box, tuple[slice, slice]]]:
    """Boxes in pixels of the connected tiles of a mask (rows, columns), and where their tiles are."""
    parts, hop, found = components(mask), side // 2, []
    for left, top, right, bottom in zip(parts.left, parts.top, parts.right, parts.bottom, strict=True):
        box = int(left * hop), int(top * hop), int((right - 1) * hop + side), int((bottom - 1) * hop + side)
        found.append((box, (slice(int(top), int(bottom)), slice(int(left), int(right)))))
    return found


def _cut(box: Box) -> list[Box]:
    """A box in parts of about `LARGEST` pixels."""
    left, top, right, bottom = box
    columns = max(1, round((right - left) / LARGEST))
    rows = max(1, round((bottom - top) / LARGEST))
    xs = np.linspace(left, right, columns + 1).astype(int)
    ys = np.linspace(top, bottom, rows + 1).astype(int)
    return [
        (int(xs[i]), int(ys[j]), int(xs[i + 1]), int(ys[j + 1])) for j in range(rows) for i in range(columns)
    ]
