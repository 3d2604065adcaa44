"""Test pictures as pure functions: float arrays (H, W, 3) of display values in [0, 1], on a ground of middle grey.

`offset` moves a pattern by whole pixels against the grid of latent cells, which begins at the picture's corner.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.signal import channel_axis

Array = NDArray[np.floating]
SHAPES = ("disc", "square", "triangle", "ring", "cross", "star", "diamond", "bar")
FINE = 8  # samples per pixel and axis of what has sharp borders


def positions(factor: int) -> tuple[int, ...]:
    """Four places in a latent cell, or as many as it has pixels; in factor 1 places mean nothing, and two stay."""
    return tuple(sorted({round(k * factor / 4) for k in range(4)})) if factor > 1 else (0, 1)


def shifts(factor: int) -> tuple[int, ...]:
    """The same places as moves from the middle of a picture, as short as they can be: half a cell at most."""
    return tuple(
        (place + factor // 2) % factor - factor // 2 if factor > 1 else place for place in positions(factor)
    )


def grating(
    side: int,
    frequency: float,
    angle: float,
    *,
    channel: str = "luma",
    contrast: float = 1.0,
    offset: tuple[int, int] = (0, 0),
) -> Array:
    """A sine grating. frequency: cycles per pixel. angle: degrees of its direction of change from the x axis."""
    x, y = _grid(side, offset)
    wave = np.cos(2 * np.pi * frequency * (x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))))
    return _swing(wave, channel, contrast)


def edge(
    side: int, angle: float, *, channel: str = "luma", contrast: float = 1.0, offset: tuple[int, int] = (0, 0)
) -> Array:
    """A step through the middle, with the exact mean of each pixel. angle: of its normal, degrees from the x axis."""
    distance = _distance(side, angle, offset)
    return _swing(2 * _step(distance, angle) - 1, channel, contrast)


def line(
    side: int, thickness: float, angle: float, *, contrast: float = 1.0, offset: tuple[int, int] = (0, 0)
) -> Array:
    """A dark line through the middle. angle: of its direction, degrees from the x axis."""
    distance = _distance(side, angle + 90, offset)
    inside = _step(distance + thickness / 2, angle + 90) - _step(distance - thickness / 2, angle + 90)
    return _swing(1 - 2 * inside, "luma", contrast)


def siemens_star(
    side: int, cycles: int = 36, contrast: float = 1.0, offset: tuple[int, int] = (0, 0)
) -> Array:
    """Spokes that narrow to the middle: at radius r pixels, cycles / (2 π r) cycles per pixel."""
    x, y = _grid(side, offset)
    x, y = x - (side - 1) / 2, y - (side - 1) / 2
    radius = np.hypot(x, y)
    wave = np.cos(cycles * np.arctan2(y, x)) * (radius < side * 0.48) * (radius > cycles / (2 * np.pi * 0.5))
    return _swing(wave, "luma", contrast)


def zone_plate(side: int, contrast: float = 1.0) -> Array:
    """Rings whose frequency grows from 0 in the middle to 0.5 cycles per pixel at the nearest borders."""
    x, y = _grid(side, (0, 0))
    squared = (x - (side - 1) / 2) ** 2 + (y - (side - 1) / 2) ** 2
    return _swing(np.cos(np.pi * 0.5 * squared / (side / 2)), "luma", contrast)


def checkerboard(side: int, cell: int, *, contrast: float = 1.0, offset: tuple[int, int] = (0, 0)) -> Array:
    """Squares of `cell` pixels."""
    x, y = _grid(side, offset)
    return _swing(1 - 2.0 * ((x // cell + y // cell) % 2), "luma", contrast)


def flat(side: int, colour: tuple[float, float, float]) -> Array:
    """One colour."""
    return np.broadcast_to(np.asarray(colour, np.float64), (side, side, 3)).copy()


def noise(side: int, deviation: float, seed: int) -> Array:
    """Grey, independent normal noise of that deviation, in display values."""
    wave = np.random.default_rng(seed).standard_normal((side, side)) * deviation
    return np.clip(0.5 + np.repeat(wave[..., None], 3, -1), 0, 1)


@functools.lru_cache(2048)
def shape_mask(side: int, kind: str, size: float, offset: tuple[int, int] = (0, 0)) -> Array:
    """How much of each pixel (side, side) a shape covers: one of `SHAPES`, `size` pixels across, in the middle.

    It must lie within, moved by `offset` pixels.
    """
    reach = min(int(np.ceil(size / 2)) + 1, side // 2)
    samples = ((np.arange(2 * reach * FINE) + 0.5) / FINE - reach) * 2 / size
    x, y = samples[None, :], samples[:, None]
    radius, inside = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y)) <= 1
    turn = np.arctan2(x, -y)
    spike = 0.45 + 0.55 * np.abs(((turn * 5 / (2 * np.pi)) % 1) * 2 - 1) ** 1.5
    masks = {
        "disc": radius <= 1,
        "square": np.maximum(np.abs(x), np.abs(y)) <= 0.9,
        "triangle": inside & (np.abs(x) <= (y + 1) / 2),
        "ring": (radius <= 1) & (radius >= 0.5),
        "cross": inside & (np.minimum(np.abs(x), np.abs(y)) <= 0.3),
        "star": radius <= spike,
        "diamond": np.abs(x) + np.abs(y) <= 1,
        "bar": (np.abs(x) <= 1) & (np.abs(y) <= 0.4),
    }
    cover = np.zeros((side, side), np.float32)
    left, top = (side // 2 - reach + shift for shift in offset)
    inner = masks[kind].reshape(2 * reach, FINE, 2 * reach, FINE).mean((1, 3))
    cover[top : top + 2 * reach, left : left + 2 * reach] = inner
    return cover


def small_object(
    side: int,
    kind: str,
    size: float,
    colour: tuple[float, float, float],
    ground: tuple[float, float, float],
    offset: tuple[int, int] = (0, 0),
) -> Array:
    """A coloured shape on a plain ground."""
    mask = shape_mask(side, kind, size, offset)[..., None]
    return mask * np.asarray(colour, np.float64) + (1 - mask) * np.asarray(ground, np.float64)


def _grid(side: int, offset: tuple[int, int]) -> tuple[Array, Array]:
    y, x = np.mgrid[:side, :side].astype(np.float64)
    return x - offset[0], y - offset[1]


def _distance(side: int, angle: float, offset: tuple[int, int]) -> Array:
    """Signed distance of each pixel's centre from a line through the middle; angle: of its normal."""
    x, y = _grid(side, offset)
    middle = side // 2 - 0.5
    return (x - middle) * np.cos(np.radians(angle)) + (y - middle) * np.sin(np.radians(angle))


def _step(distance: Array, angle: float) -> Array:
    """The share of a pixel at `distance` from an edge that lies beyond it: of a square, seen at an angle."""
    a, b = sorted((abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))), reverse=True)
    if b < 1e-9:
        return np.clip(distance / a + 0.5, 0, 1)

    def ramp(t: Array) -> Array:
        return np.clip(t, 0, None) ** 2 / 2

    return (
        ramp(distance + (a + b) / 2)
        - ramp(distance + (a - b) / 2)
        - ramp(distance - (a - b) / 2)
        + ramp(distance - (a + b) / 2)
    ) / (a * b)


def _swing(wave: Array, channel: str, contrast: float) -> Array:
    """A wave in [-1, 1] as a swing of one channel around middle grey."""
    return 0.5 + 0.5 * contrast * wave[..., None] * channel_axis(channel)
