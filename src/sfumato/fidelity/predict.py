"""What a region will lose, told from the chart and the region's own spectrum: the autoencoder does not run.

The loss of a region is the RMS of the error over the RMS of what varies in it, from 0 (the same) to 1 (nothing that
stood there is left; more is called 1). A region is a sum of waves; of a wave, the chart says how large its error is, by
channel, contrast, direction and frequency, and errors of different waves add as energies; so does what even a plain
patch of the region's colour is off.

Autoencoders are no linear instruments: of an edge they keep more than of the waves that it consists of, since few
numbers say where it is. So the chart also holds what was foretold of its own words, objects and lines beside what they
lost, and a prediction for a region of such a kind is corrected by that curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.signal import CHANNELS, channel_axis, opponent, spectrum

Array = NDArray[np.floating]
LOST, WORN = 0.5, 0.25  # losses from which a region is called lost, and worn
CURVES = {  # kind of region to the chart's sections that correct what is foretold of it
    "text": ("text",),
    "line": ("lines",),
    "object": ("objects", "text", "lines"),  # things have outlines, and small parts within
}
TRUST = 0.5  # how far the correction is followed: things in pictures are less plain than those of a chart
FAINT = 2 / 255  # RMS below which nothing that varies can be seen


@dataclass(frozen=True)
class Transfer:
    """Errors of waves from a chart.

    errors: by channel, (contrasts, angles, frequencies), for an amplitude of 1. curves: by kind of region, what it is
    foretold to lose and what such things lost, both rising. floor: RMS of the error of plain patches, by `tones` of
    red, green and blue.
    """

    frequencies: Array
    contrasts: Mapping[str, Array]
    angles: Mapping[str, Array]
    errors: Mapping[str, Array]
    curves: Mapping[str, tuple[Array, Array]]
    tones: Array
    floor: Array

    @classmethod
    def of(cls, sections: Mapping[str, list[dict[str, Any]]]) -> Transfer:
        """From the sections of a chart; those that are not measured yet correct nothing."""
        contrasts, angles, errors = {}, {}, {}
        rows = sections["gratings"]
        frequencies = np.array(sorted({row["frequency"] for row in rows}))
        for channel in CHANNELS:
            mine = {
                (r["contrast"], r["angle"], r["frequency"]): r["error"]
                for r in rows
                if r["channel"] == channel
            }
            contrasts[channel] = np.array(sorted({key[0] for key in mine}))
            turned = sorted({key[1] for key in mine})
            table = [[[mine[c, a, f] for f in frequencies] for a in turned] for c in contrasts[channel]]
            if 90 not in turned:  # was not measured: as at 0
                turned.append(90)
                table = [[*by_angle, by_angle[0]] for by_angle in table]
            angles[channel], errors[channel] = np.array(turned, float), np.array(table)
        curves = {
            kind: rising([(row["foretold"], row["loss"]) for name in names for row in sections[name]])
            for kind, names in CURVES.items()
            if all(name in sections for name in names)
        }
        plain = sections.get("colour", [])
        tones = np.array(sorted({tone for row in plain for tone in row["colour"]}) or [0.0, 1.0])
        floor = np.zeros((len(tones),) * 3)
        for row in plain:
            floor[tuple(int(np.argmin(np.abs(tones - tone))) for tone in row["colour"])] = row["floor"]
        return cls(frequencies, contrasts, angles, errors, curves, tones, floor)

    def error(self, channel: str, contrast: float, frequency: Array, angle: Array) -> Array:
        """Of waves of a channel at these frequencies (cycles per pixel) and angles (0 to 90 degrees)."""
        table = self.errors[channel]
        known = np.log(self.contrasts[channel])
        at = np.clip(np.log(max(contrast, 1e-6)), known[0], known[-1])
        low = int(np.clip(np.searchsorted(known, at) - 1, 0, max(len(known) - 2, 0)))
        share = (at - known[low]) / (known[low + 1] - known[low]) if len(known) > 1 else 0.0
        plane = (
            table[low] * (1 - share) + table[min(low + 1, len(known) - 1)] * share
        )  # (angles, frequencies)
        place = np.log(np.clip(frequency, self.frequencies[0], self.frequencies[-1]))
        by_angle = np.stack([np.interp(place, np.log(self.frequencies), row) for row in plane])
        turns = self.angles[channel]
        first = np.clip(np.searchsorted(turns, angle, side="right") - 1, 0, len(turns) - 2)
        weight = np.clip((angle - turns[first]) / (turns[first + 1] - turns[first]), 0, 1)
        lower = np.take_along_axis(by_angle, first[None], 0)[0]
        upper = np.take_along_axis(by_angle, first[None] + 1, 0)[0]
        return lower * (1 - weight) + upper * weight

    def shift(self, colour: Array) -> float:
        """RMS of the error of a plain patch of that colour (3,), from those of the colours around it."""
        place = np.interp(colour, self.tones, np.arange(len(self.tones)))
        low = np.clip(place.astype(int), 0, len(self.tones) - 2)
        share, total = place - low, 0.0
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, share, 1 - share))
            total += float(weight * self.floor[tuple(low + np.array(corner))])
        return total

    def corrected(self, loss: float, kind: str) -> float:
        """What is foretold of a region of that kind, by what such things in the chart lost."""
        if kind not in self.curves:
            return loss
        foretold, lost = self.curves[kind]
        return loss + TRUST * (float(np.interp(loss, foretold, lost)) - loss)


@dataclass(frozen=True)
class Waves:
    """The spectrum of a region, and what else a prediction needs of it."""

    frequency: Array  # (H, W) cycles per pixel
    angle: Array  # (H, W) degrees, 0 to 90
    energy: Array  # (3, H, W) mean squares
    colour: Array  # (3,) red, green and blue of the mean

    @classmethod
    def of(cls, picture: Array) -> Waves:
        return cls(*spectrum(opponent(picture)), picture.mean((0, 1)))

    @property
    def contrast(self) -> float:
        """RMS of all that varies, in display values."""
        return float(np.sqrt(self.energy.sum()))


def predict(waves: Waves, transfer: Transfer, kind: str = "", scale: float = 1.0) -> float:
    """The loss of a region, 0 to 1. kind: of `CURVES`, or another. scale: how many times larger it would be drawn."""
    energy = waves.energy.sum()
    if waves.contrast < FAINT:
        return 0.0
    error = transfer.shift(waves.colour) ** 2
    for number, channel in enumerate(CHANNELS):
        mine = waves.energy[number]
        if mine.sum() < 1e-3 * energy:
            continue
        unit = abs(float(opponent(channel_axis(channel)[None, None])[number, 0, 0]))
        contrast = np.sqrt(mine.sum()) * 2 * np.sqrt(2) / unit
        each = transfer.error(channel, float(contrast), waves.frequency / scale, waves.angle)
        error += float((np.square(np.minimum(each, 1)) * mine).sum())
    return transfer.corrected(float(min(1.0, np.sqrt(error / energy))), kind)


def rising(points: list[tuple[float, float]]) -> tuple[Array, Array]:
    """The curve that never falls and comes nearest to the points (least squares, by pooling neighbours).

    It begins at (0, 0), and beyond the last point grows as what is foretold does.
    """
    pools: list[list[float]] = []  # foretold, lost, how many
    for x, y in sorted(points):
        pools.append([x, y, 1])
        while len(pools) > 1 and (pools[-2][1] >= pools[-1][1] or pools[-1][0] - pools[-2][0] < 1e-6):
            x1, y1, n1 = pools.pop()
            x0, y0, n0 = pools.pop()
            n = n0 + n1
            pools.append([(x0 * n0 + x1 * n1) / n, (y0 * n0 + y1 * n1) / n, n])
    xs, ys = [0.0, *(p[0] for p in pools)], [0.0, *(p[1] for p in pools)]
    if xs[-1] < 1:
        xs.append(1.0)
        ys.append(min(1.0, ys[-1] + 1 - xs[-2]))
    return np.array(xs), np.minimum(np.array(ys), 1)


def measured(before: Array, after: Array) -> float:
    """The loss that a region (H, W, 3) had, in the same measure as `predict`."""
    a, b = opponent(before), opponent(after)
    varies = float(np.square(a - a.mean((-2, -1), keepdims=True)).sum(0).mean())
    if np.sqrt(varies) < FAINT:
        return 0.0
    return float(min(1.0, np.sqrt(np.square(b - a).sum(0).mean() / varies)))
