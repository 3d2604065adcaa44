"""The sections of a chart that show plain targets: waves, edges, stars, squares, colours and grain.

Those that show things are in `things.py`.

Every target is shown at several places relative to the latent cells; of a measure `x`, a row holds the mean `x` over
places and the extremes `x_low` and `x_high`, and of a loss also what it is `…_at` each place.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity import targets
from sfumato.fidelity.instrument import Instrument
from sfumato.fidelity.sheets import BORDER, INNER, PATCH, SIDE, Row, Told, mean, spread, through
from sfumato.fidelity.signal import (
    CHANNELS,
    delta_e,
    edge_mtf,
    edge_spread,
    grating_response,
    kept,
    opponent,
    overshoot,
    relative_error,
    rise,
)

Array = NDArray[np.floating]

FREQUENCIES = (1 / 64, 1 / 32, 1 / 24, 1 / 16, 1 / 12, 1 / 10, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 0.45)
ANGLES = {"luma": (0, 45, 90), "red-green": (0, 45), "blue-yellow": (0, 45)}
CONTRASTS = {"luma": (0.9, 0.3, 0.1), "red-green": (0.9, 0.3), "blue-yellow": (0.9, 0.3)}
CELLS = (1, 2, 3, 4, 6, 8, 12, 16)  # of checkerboards
EDGE = 16  # pixels on either side of an edge that a chart shows, and at the border of its picture that are cut off
DEVIATIONS = (2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255)
SEEDS = 2  # of grain


def gratings(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """MTF, and the error that is left of it, by channel, contrast, angle and frequency."""
    asked = [
        (channel, contrast, angle, frequency)
        for channel in CHANNELS
        for contrast in CONTRASTS[channel]
        for angle in ANGLES[channel]
        for frequency in FREQUENCIES
    ]
    places = targets.shifts(instrument.factor)
    shown = [
        targets.grating(PATCH, frequency, angle, channel=channel, contrast=contrast, offset=(place, place))
        for channel, contrast, angle, frequency in asked
        for place in places
    ]
    back = iter(zip(shown, through(instrument, shown, told), strict=True))
    rows = []
    for channel, contrast, angle, frequency in asked:
        mtf, error, moire = [], [], []
        for _ in places:
            before, after = (opponent(patch[INNER, INNER]) for patch in next(back))
            number = CHANNELS.index(channel)
            response = grating_response(before[number], after[number], frequency, angle)
            mtf.append(abs(response))
            error.append(_whole_error(before, after, number))
            moire.append(_coarse(after[number] - before[number]) / before[number].std())
        rows.append(
            {
                "channel": channel,
                "contrast": contrast,
                "angle": angle,
                "frequency": frequency,
                **spread("mtf", mtf),
                "error": float(np.sqrt(np.mean(np.square(error)))),
                "error_at": error,
                "moire": mean(moire) if frequency > 1 / 16 else 0.0,
            }
        )
    return rows


def edges(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Slanted edges: rise and overshoot, and the MTF they tell, by channel and direction."""
    places = [int(np.clip(place, -EDGE, EDGE)) for place in targets.shifts(instrument.factor)]
    asked = [
        (channel, contrast, angle) for channel in CHANNELS for contrast in (0.8, 0.3) for angle in (5, 95)
    ]
    half = SIDE // 2
    shown = [
        targets.edge(half, angle, channel=channel, contrast=contrast, offset=(place, place))
        for channel, contrast, angle in asked
        for place in places
    ]
    back = iter(zip(shown, through(instrument, shown, told, half), strict=True))
    rows = []
    for channel, contrast, angle in asked:
        profiles, transfers = [], []
        for place in places:  # cut out so that the edge runs through the middle
            where = np.s_[EDGE + place : half - EDGE + place]
            before, after = (opponent(each[where, where])[CHANNELS.index(channel)] for each in next(back))
            position, profile = edge_spread(after, angle)
            frequency, mtf = edge_mtf(position, profile)
            profiles.append(profile)  # a pixel has a response of its own, that of the edge as it was drawn
            transfers.append(mtf / edge_mtf(*edge_spread(before, angle))[1])
        near = np.abs(position) <= EDGE
        rows.append(
            {
                "channel": channel,
                "contrast": contrast,
                "angle": angle,
                **spread("rise", [rise(position, profile) for profile in profiles]),
                **spread("overshoot", [overshoot(profile) for profile in profiles]),
                "position": position[near][::2].tolist(),
                "profile": np.mean(profiles, 0)[near][::2].tolist(),
                "frequency": frequency[::2].tolist(),
                "mtf": np.mean(transfers, 0)[::2].tolist(),
            }
        )
    return rows


def star(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """The Siemens star: how much of the spokes' contrast is kept at each frequency, that is, radius."""
    places = targets.shifts(instrument.factor)
    shown = [targets.siemens_star(SIDE, offset=(place, place)).astype(np.float32) for place in places]
    back = instrument.pictures(shown, None if told is None else lambda done: told(done, len(shown)))
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    rows = []
    for frequency in (0.055, 0.065, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.33):
        middle = 36 / (2 * np.pi * frequency)
        found = []
        for place, before, after in zip(places, shown, back, strict=True):
            ring = np.abs(np.hypot(x - place, y - place) - middle) < 1.5
            found.append(kept(before[ring].mean(-1), after[ring].mean(-1).astype(np.float64)))
        rows.append({"frequency": frequency, **spread("kept", found)})
    return rows


def checkers(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Checkerboards by the side of their cells: contrast kept, error, and moiré."""
    places = targets.shifts(instrument.factor)
    asked = [(cell, (x, y)) for cell in CELLS for x, y in zip(places, (*places[1:], places[0]), strict=True)]
    shown = [targets.checkerboard(PATCH, cell, offset=offset) for cell, offset in asked]
    found = defaultdict(list)
    for (cell, _), before, after in zip(asked, shown, through(instrument, shown, told), strict=True):
        a, b = opponent(before[INNER, INNER])[0], opponent(after[INNER, INNER])[0]
        found[cell].append((kept(a, b), relative_error(a, b), _coarse(b - a) / a.std()))
    return [
        {
            "cell": cell,
            **spread("kept", [k for k, _, _ in each]),
            "error": mean(e for _, e, _ in each),
            "error_at": [e for _, e, _ in each],
            "moire": mean(m for _, _, m in each),
        }
        for cell, each in found.items()
    ]


def colour(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Plain patches, three tones of each of red, green and blue: how far the colour moves (ΔE*ab 1976), and how much
    the patch begins to vary (`floor`, RMS in display values). What is plain stands at all places at once: the extremes
    are those of the pixels at each."""
    tones = (0.1, 0.5, 0.9)
    asked = [(r, g, b) for r in tones for g in tones for b in tones]
    shown = [targets.flat(PATCH, each) for each in asked]
    rows, places = [], _quarters(instrument.factor)
    for rgb, before, after in zip(asked, shown, through(instrument, shown, told), strict=True):
        inner = after[INNER, INNER]
        moved = float(delta_e(before[0, 0], inner.mean((0, 1))))
        floor = float(np.sqrt(np.square(opponent(inner) - opponent(before[INNER, INNER])).sum(0).mean()))
        at = [float(delta_e(before[0, 0], inner[where].mean(0))) for where in places]
        rows.append({"colour": list(rgb), **spread("delta_e", at), "delta_e": moved, "floor": floor})
    return rows


def _quarters(factor: int) -> list[Array]:
    """Masks of the pixels of `INNER` that stand at each place of their cells, on the diagonal."""
    count = min(factor, 4)
    place = np.arange(BORDER, PATCH - BORDER) % factor * count // factor
    return [(place[:, None] == each) & (place[None] == each) for each in range(count)]


def noise(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Noise by its deviation: how much of it comes back in place, and how much comes back at all."""
    places = targets.shifts(instrument.factor)
    asked = [
        (deviation, place, seed) for deviation in DEVIATIONS for place in places for seed in range(SEEDS)
    ]
    shown = [
        np.roll(targets.noise(PATCH, deviation, seed), (place, place), (0, 1))
        for deviation, place, seed in asked
    ]
    found = defaultdict(list)
    for (deviation, _, _), before, after in zip(asked, shown, through(instrument, shown, told), strict=True):
        a, b = opponent(before[INNER, INNER])[0], opponent(after[INNER, INNER])[0]
        found[deviation].append((kept(a, b), float(b.std() / a.std())))
    rows = []
    for deviation, each in found.items():
        at = np.array(each).reshape(len(places), SEEDS, 2).mean(1)
        rows.append({"deviation": deviation, **spread("kept", at[:, 0]), **spread("left", at[:, 1])})
    return rows


def _whole_error(before: Array, after: Array, channel: int) -> float:
    """RMS of the error in all channels over the RMS of the grating in its own."""
    varies = before[channel] - before[channel].mean()
    return float(np.sqrt(np.square(after - before).sum(0).mean() / np.square(varies).mean()))


def _coarse(error: Array, block: int = 12) -> float:
    """RMS of what is left of an error when it is averaged over blocks: what was not there and is no detail."""
    height, width = (side // block * block for side in error.shape)
    cut = error[:height, :width].reshape(height // block, block, width // block, block).mean((1, 3))
    return float(np.sqrt(np.square(cut).mean()))
