"""Measuring on arrays: opponent colours, fits of gratings, slanted edges, spectra. Nothing here knows a model.

Values are display values, as autoencoders see them: contrast and MTF are those of the encoded signal, not of light.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
# luma, red against green-blue, blue against yellow: the rows of Y'CbCr (BT.601), Cr before Cb, of unit range
OPPONENT = ((0.299, 0.587, 0.114), (0.5, -0.4187, -0.0813), (-0.1687, -0.3313, 0.5))
CHANNELS = ("luma", "red-green", "blue-yellow")


def opponent(picture: Array) -> Array:
    """(H, W, 3) of red, green and blue in [0, 1] → (3, H, W): luma in [0, 1], two chromas in [-0.5, 0.5]."""
    return np.einsum("ij,hwj->ihw", OPPONENT, np.asarray(picture, np.float64))


def channel_axis(channel: str) -> Array:
    """The direction (3,) in RGB along which that channel alone changes, its largest entry 1."""
    axis = np.linalg.inv(OPPONENT)[:, CHANNELS.index(channel)]
    return axis / np.abs(axis).max()


def grating_response(before: Array, after: Array, frequency: float, angle: float) -> complex:
    """The complex amplitude of a grating in `after` over that in `before`, both (H, W): modulus is the MTF, argument
    the phase shift. Least squares on cosine, sine and a constant, so that the patch need not hold whole periods.

    frequency: cycles per pixel. angle: degrees of its direction of change from the x axis.
    """
    height, width = before.shape
    y, x = np.mgrid[:height, :width]
    phase = 2 * np.pi * frequency * (x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle)))
    basis = np.stack([np.cos(phase), np.sin(phase), np.ones_like(phase)], -1).reshape(-1, 3)
    fit = np.linalg.lstsq(basis, np.stack([before.ravel(), after.ravel()], -1), rcond=1e-9)[0]
    first, second = (complex(a, -b) for a, b in (fit[:2, 0], fit[:2, 1]))
    return second / first if abs(first) > 1e-9 else 0j


def relative_error(before: Array, after: Array) -> float:
    """RMS of the difference over the RMS of what varies in `before`: 0 is the same picture, 1 nothing of it left.

    Both (..., H, W); the mean over H and W is what does not vary. Infinite where nothing does and they differ.
    """
    varies = float(np.square(before - before.mean((-2, -1), keepdims=True)).mean())
    error = float(np.square(after - before).mean())
    if varies < 1e-12:
        return 0.0 if error < 1e-12 else float("inf")
    return float(np.sqrt(error / varies))


def kept(before: Array, after: Array) -> float:
    """How much of the contrast of `before` stands in `after` in the same place: the slope of one over the other."""
    a, b = before - before.mean(), after - after.mean()
    energy = float(np.square(a).sum())
    return float((a * b).sum() / energy) if energy > 1e-12 else 1.0


def edge_spread(picture: Array, angle: float, bins: int = 4) -> tuple[Array, Array]:
    """(position in pixels, mean value) across an edge through the middle of (H, W), oversampled `bins` times.

    angle: degrees of the edge's normal from the x axis. Bins without a pixel are interpolated (ISO 12233, e-SFR).
    """
    height, width = picture.shape
    y, x = np.mgrid[:height, :width]
    normal = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    distance = (x - (width - 1) / 2) * normal[0] + (y - (height - 1) / 2) * normal[1]
    reach = min(height, width) / 2 * 0.8
    edges = np.arange(-reach, reach + 1e-9, 1 / bins)
    inside = np.abs(distance) < reach
    place = np.clip(np.digitize(distance[inside], edges) - 1, 0, len(edges) - 2)
    count = np.bincount(place, minlength=len(edges) - 1)
    total = np.bincount(place, picture[inside], len(edges) - 1)
    centre = (edges[:-1] + edges[1:]) / 2
    there = count > 0
    return centre, np.interp(centre, centre[there], total[there] / count[there])


def edge_mtf(position: Array, profile: Array) -> tuple[Array, Array]:
    """(cycles per pixel up to 0.5, MTF) of an edge's profile: the transform of its windowed derivative (ISO 12233),
    with the response of pixels, bins and differences in it; divide by that of the edge as it was drawn."""
    step = position[1] - position[0]
    line = np.gradient(profile, step)
    centre = np.argmax(np.abs(line))
    window = np.zeros_like(line)
    half = int(min(centre, len(line) - 1 - centre))
    window[centre - half : centre + half + 1] = np.hamming(2 * half + 1)
    spectrum = np.abs(np.fft.rfft(line * window))
    frequency = np.fft.rfftfreq(len(line), step)
    shown = frequency <= 0.5
    return frequency[shown], spectrum[shown] / max(spectrum[0], 1e-12)


def rise(position: Array, profile: Array) -> float:
    """Pixels between 10 and 90 per cent of an edge, of the best monotone reading of its profile."""
    low, high = profile[: len(profile) // 8].mean(), profile[-len(profile) // 8 :].mean()
    if abs(high - low) < 1e-6:
        return float("inf")
    level = (profile - low) / (high - low)
    first = position[np.argmax(level > 0.1)]
    last = position[len(level) - 1 - np.argmax(level[::-1] < 0.9)]
    return float(max(last - first, 0.0))


def overshoot(profile: Array) -> float:
    """How far an edge's profile swings beyond its two levels, as a share of the step."""
    low, high = profile[: len(profile) // 8].mean(), profile[-len(profile) // 8 :].mean()
    level = (profile - low) / (high - low) if abs(high - low) > 1e-6 else np.zeros_like(profile)
    return float(max(level.max() - 1, -level.min(), 0.0))


def spectrum(region: Array) -> tuple[Array, Array, Array]:
    """(frequency, angle, energy), of the parts of a region (C, H, W) that vary: cosine transform, so that the region's
    borders add nothing that is not in it. Energies (C, H, W) are mean squares and sum to the variance.

    frequency: (H, W) cycles per pixel. angle: (H, W) degrees from the x axis, 0 to 90; a cosine transform does not tell
    45 from 135.
    """
    channels, height, width = region.shape
    energy = np.empty((channels, height, width))
    for plane, found in zip(region, energy, strict=True):  # one at a time: a picture may be large
        found[:] = np.square(dct(dct(plane - plane.mean(), -1), -2)) / (height * width)
    fy, fx = np.arange(height)[:, None] / (2 * height), np.arange(width)[None] / (2 * width)
    return np.hypot(fx, fy), np.degrees(np.arctan2(fy, fx)), energy


def dct(values: Array, axis: int) -> Array:
    """The orthonormal cosine transform (type II) along an axis: energies before and after are equal."""
    values = np.moveaxis(np.asarray(values, np.float64), axis, -1)
    n = values.shape[-1]
    mirrored = np.concatenate([values, values[..., ::-1]], -1)
    k = np.arange(n)
    cosine = np.real(np.fft.rfft(mirrored, axis=-1)[..., :n] * np.exp(-0.5j * np.pi * k / n)) / 2
    scale = np.full(n, np.sqrt(2 / n))
    scale[0] = np.sqrt(1 / n)
    return np.moveaxis(cosine * scale, -1, axis)


def lab(picture: Array) -> Array:
    """sRGB (..., 3) in [0, 1] → CIE L*a*b*, white D65."""
    values = np.asarray(picture, np.float64)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(before: Array, after: Array) -> Array:
    """The distance of two sRGB colours (..., 3) in CIE L*a*b* (1976); about 2 is just seen side by side."""
    return np.linalg.norm(lab(before) - lab(after), axis=-1)
