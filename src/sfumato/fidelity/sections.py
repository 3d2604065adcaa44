"""The sections of a chart: each shows the instrument its targets and says what came back, as rows of plain numbers.

Every target is shown at several places relative to the latent cells; rows hold the mean over places and the extremes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity import targets, words
from sfumato.fidelity.instrument import Instrument
from sfumato.fidelity.ocr import Reader
from sfumato.fidelity.predict import measured
from sfumato.fidelity.signal import (
    CHANNELS,
    delta_e,
    edge_mtf,
    edge_spread,
    grating_response,
    kept,
    lab,
    opponent,
    overshoot,
    relative_error,
    rise,
)

Array = NDArray[np.floating]
Row = dict[str, Any]
Told = Callable[[int, int], None]  # how many of how many pictures are done
Foretell = Callable[[Array], float]  # what a picture (H, W, 3) is foretold to lose, see `predict.py`

SIDE, PATCH = 256, 64  # pixels of a sheet and of a patch on it: 16 go together
INNER = np.s_[8 : PATCH - 8]  # of a patch, what is measured
FREQUENCIES = (1 / 64, 1 / 32, 1 / 24, 1 / 16, 1 / 12, 1 / 10, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 0.45)
ANGLES = {"luma": (0, 45, 90), "red-green": (0, 45), "blue-yellow": (0, 45)}
CONTRASTS = {"luma": (0.9, 0.3, 0.1), "red-green": (0.9, 0.3), "blue-yellow": (0.9, 0.3)}
CELLS = (1, 2, 3, 4, 6, 8, 12, 16)  # of checkerboards
THICK = (1, 1.5, 2, 3, 4, 6, 8)  # of lines
LINE_ANGLES = (0, 15, 45, 90)
EDGE = 16  # pixels on either side of an edge that a chart shows
SIZES = (3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48)  # of objects
COLOURS = {
    "red": (0.8, 0.15, 0.15),
    "green": (0.15, 0.55, 0.2),
    "blue": (0.15, 0.3, 0.8),
    "yellow": (0.95, 0.8, 0.1),
    "white": (1.0, 1.0, 1.0),
    "black": (0.05, 0.05, 0.05),
}
GROUNDS = ((0.5, 0.5, 0.5), (0.75, 0.7, 0.6))
FONT_SIZES = (6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64)
TEXTS = (("regular", 1.0), ("bold", 1.0), ("regular", 0.5), ("regular", 0.25))  # weight and contrast
WORDS_EACH, OF_LARGE = 8, 4  # words of each size, and of those from 40 px on, of which few go on a sheet
DEVIATIONS = (2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255)


def through(instrument: Instrument, patches: Sequence[Array], told: Told | None = None) -> list[Array]:
    """Patches (64, 64, 3) through the instrument, 16 on a sheet."""
    many = (SIDE // PATCH) ** 2
    sheets = []
    for start in range(0, len(patches), many):
        sheet = np.full((SIDE, SIDE, 3), 0.5, np.float32)
        for place, patch in enumerate(patches[start : start + many]):
            sheet[_of(place)] = patch
        sheets.append(sheet)
    back = instrument.pictures(sheets, None if told is None else lambda done: told(done, len(sheets)))
    return [back[number // many][_of(number % many)].astype(np.float64) for number in range(len(patches))]


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
                "mtf": _mean(mtf),
                "mtf_low": min(mtf),
                "mtf_high": max(mtf),
                "error": float(np.sqrt(np.mean(np.square(error)))),
                "moire": _mean(moire) if frequency > 1 / 16 else 0.0,
            }
        )
    return rows


def edges(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Slanted edges: rise and overshoot, and the MTF they tell, by channel and direction."""
    asked = [
        (channel, contrast, angle) for channel in CHANNELS for contrast in (0.8, 0.3) for angle in (5, 95)
    ]
    half = SIDE // 2
    shown = [
        targets.edge(half, angle, channel=channel, contrast=contrast) for channel, contrast, angle in asked
    ]
    sheets = []
    for start in range(0, len(shown), 4):
        four = shown[start : start + 4]
        sheets.append(np.concatenate([np.concatenate(four[:2], 1), np.concatenate(four[2:], 1)], 0))
    back = instrument.pictures(
        [sheet.astype(np.float32) for sheet in sheets],
        None if told is None else lambda n: told(n, len(sheets)),
    )
    rows = []
    for number, (channel, contrast, angle) in enumerate(asked):
        top, left = divmod(number % 4, 2)
        patch = back[number // 4][top * half : (top + 1) * half, left * half : (left + 1) * half]
        before, after = (
            opponent(each[16:-16, 16:-16])[CHANNELS.index(channel)] for each in (shown[number], patch)
        )
        position, profile = edge_spread(after, angle)
        frequency, mtf = edge_mtf(position, profile)
        mtf = mtf / edge_mtf(*edge_spread(before, angle))[1]  # a pixel has a response of its own
        near = np.abs(position) <= EDGE
        rows.append(
            {
                "channel": channel,
                "contrast": contrast,
                "angle": angle,
                "rise": rise(position, profile),
                "overshoot": overshoot(profile),
                "position": position[near][::2].tolist(),
                "profile": profile[near][::2].tolist(),
                "frequency": frequency[::2].tolist(),
                "mtf": mtf[::2].tolist(),
            }
        )
    return rows


def star(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """The Siemens star: how much of the spokes' contrast is kept at each frequency, that is, radius."""
    before = targets.siemens_star(SIDE).astype(np.float32)
    after = instrument.pictures([before])[0]
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius = np.hypot(x, y)
    rows = []
    for frequency in (0.055, 0.065, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.33):
        middle = 36 / (2 * np.pi * frequency)
        ring = np.abs(radius - middle) < 1.5
        rows.append(
            {
                "frequency": frequency,
                "kept": kept(before[ring].mean(-1), after[ring].mean(-1).astype(np.float64)),
            }
        )
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
            "kept": _mean(k for k, _, _ in each),
            "kept_low": min(k for k, _, _ in each),
            "kept_high": max(k for k, _, _ in each),
            "error": _mean(e for _, e, _ in each),
            "moire": _mean(m for _, _, m in each),
        }
        for cell, each in found.items()
    ]


def lines(instrument: Instrument, foretell: Foretell, told: Told | None = None) -> list[Row]:
    """Lines by thickness, angle and contrast: contrast kept, error, and how far they leave the straight, in pixels."""
    places = targets.shifts(instrument.factor)
    asked = [
        (thick, angle, contrast, place)
        for thick in THICK
        for angle in LINE_ANGLES
        for contrast in (0.9, 0.3)
        for place in places
    ]
    shown = [
        targets.line(PATCH, thick, angle, contrast=contrast, offset=(place, place))
        for thick, angle, contrast, place in asked
    ]
    found = defaultdict(list)
    for (thick, angle, contrast, place), before, after in zip(
        asked, shown, through(instrument, shown, told), strict=True
    ):
        inner = before[INNER, INNER], after[INNER, INNER]
        strength = kept(*(opponent(patch)[0] for patch in inner))
        moved = bend(before, after, angle, place)
        found[thick, angle, contrast].append((strength, moved, foretell(inner[0]), measured(*inner)))
    return [
        {
            "thickness": thick,
            "angle": angle,
            "contrast": contrast,
            "kept": _mean(each[0] for each in all_of),
            "kept_low": min(each[0] for each in all_of),
            "kept_high": max(each[0] for each in all_of),
            "bend": _mean(each[1] for each in all_of),
            "foretold": _mean(each[2] for each in all_of),
            "loss": _mean(each[3] for each in all_of),
        }
        for (thick, angle, contrast), all_of in found.items()
    ]


def bend(before: Array, after: Array, angle: float, place: int) -> float:
    """RMS distance, in pixels, of a dark line's centre of mass from where it was, along it."""
    wanted, found = (_centres(picture, angle, place) for picture in (before, after))
    there = np.isfinite(wanted) & np.isfinite(found)
    return float(np.sqrt(np.mean(np.square(found - wanted)[there]))) if there.any() else float(PATCH)


def _centres(picture: Array, angle: float, place: int) -> Array:
    """The centre of mass across a dark line, in each of its pieces of 4 pixels; NaN where it is gone."""
    side = len(picture)
    y, x = np.mgrid[:side, :side].astype(np.float64)
    x, y = x - (side // 2 - 0.5) - place, y - (side // 2 - 0.5) - place
    turn = np.radians(angle)
    along, across = x * np.cos(turn) + y * np.sin(turn), -x * np.sin(turn) + y * np.cos(turn)
    dark = np.clip(np.median(picture) - picture.mean(-1), 0, None)
    near = (np.abs(across) < 8) & (np.abs(along) < side * 0.35)
    bins = (along[near] // 4).astype(int)
    bins -= bins.min()
    weight = np.bincount(bins, dark[near])
    moment = np.bincount(bins, (dark * across)[near])
    gone = weight <= max(0.05 * weight.max(), 1e-3)
    return np.where(gone, np.nan, moment / np.where(gone, 1, weight))


def objects(instrument: Instrument, foretell: Foretell, told: Told | None = None) -> list[Row]:
    """Small coloured shapes by size: how many of eight shapes, and how many of six colours, are told right."""
    places = targets.shifts(instrument.factor)
    asked = []
    for size in SIZES:
        room = PATCH // 2 - int(np.ceil(size / 2)) - 1  # or a large object would leave its patch
        for number, kind in enumerate(targets.SHAPES):
            for turn, place in enumerate(places):
                colour = tuple(COLOURS)[(number + turn) % len(COLOURS)]
                other = places[(turn + number) % len(places)]
                offset = int(np.clip(place, -room, room)), int(np.clip(other, -room, room))
                asked.append((size, kind, colour, GROUNDS[(number + turn) % 2], offset))
    shown = [
        targets.small_object(PATCH, kind, size, COLOURS[colour], ground, offset)
        for size, kind, colour, ground, offset in asked
    ]
    found = defaultdict(list)
    for (size, kind, colour, ground, offset), before, after in zip(
        asked, shown, through(instrument, shown, told), strict=True
    ):
        shape_right = told_shape(after, size, ground, offset) == kind
        colour_right = told_colour(after, kind, size, ground, offset) == colour
        around = _around(size, offset)
        loss = measured(before[around], after[around])
        found[size].append((shape_right, colour_right, foretell(before[around]), loss))
    names = ("shape", "colour", "foretold", "loss")
    return [
        {"size": size} | {name: _mean(each[n] for each in all_of) for n, name in enumerate(names)}
        for size, all_of in found.items()
    ]


def told_shape(picture: Array, size: float, ground: Sequence[float], offset: tuple[int, int]) -> str:
    """Which of `SHAPES` of that size and place the picture resembles most, whatever its colour."""
    where = _around(size, offset)
    away = (picture[where] - np.asarray(ground)).reshape(-1, 3)
    axis = np.linalg.eigh(away.T @ away)[1][:, -1]  # the colour along which it differs most from the ground
    seen = away @ axis
    best, name = -1.0, ""
    for kind in targets.SHAPES:
        mask = targets.shape_mask(PATCH, kind, size, offset)[where].ravel()
        mask = mask - mask.mean()
        length = float(np.linalg.norm(mask) * np.linalg.norm(seen - seen.mean()))
        score = abs(float(mask @ seen)) / (length + 1e-12)
        if score > best:
            best, name = score, kind
    return name


def told_colour(
    picture: Array, kind: str, size: float, ground: Sequence[float], offset: tuple[int, int]
) -> str:
    """Which of `COLOURS` lies nearest, in CIE L*a*b*, to what the picture has in the middle of the object."""
    mask = targets.shape_mask(PATCH, kind, size, offset)
    core = mask >= min(0.99, mask.max())
    colour = np.median(picture[core], axis=0)
    return min(COLOURS, key=lambda name: float(np.linalg.norm(lab(colour) - lab(np.asarray(COLOURS[name])))))


def text(
    instrument: Instrument, foretell: Foretell, reader: Reader | None = None, told: Told | None = None
) -> list[Row]:
    """Words by weight, contrast and size: the share of letters that is read right, by shape, and by `reader`.

    `…_before` is what the same reader gets from the words as they were drawn.
    """
    places = targets.positions(instrument.factor)
    pages = [
        (weight, contrast, size, page)
        for weight, contrast in TEXTS
        for size in FONT_SIZES
        for page in words.sheets(weight, size, contrast, count_of(size), SIDE, places, first=size)
    ]
    shown = [words.draw(page, SIDE).astype(np.float32) for *_, page in pages]
    back = instrument.pictures(shown, None if told is None else lambda done: told(done, len(shown)))
    found: dict[tuple[str, float, int], list[Row]] = defaultdict(list)
    for (weight, contrast, size, page), before, after in zip(pages, shown, back, strict=True):
        for word in page:
            left, top, right, bottom = word.box
            box = slice(max(top, 0), bottom), slice(max(left, 0), right)
            one: Row = {
                "position": word.position,
                "letters": words.right_letters(word.text, words.read_by_shape(word, after)),
                "foretold": foretell(before[box]),
                "loss": measured(before[box], after[box]),
            }
            if reader is not None:
                one["ocr_before"] = words.right_letters(word.text, reader.read(before[box])[0])
                one["ocr"] = words.right_letters(word.text, reader.read(after[box])[0])
            found[weight, contrast, size].append(one)
    rows = []
    for (weight, contrast, size), each in found.items():
        by_place = [
            _mean(row["letters"] for row in each if row["position"] == p)
            for p in {row["position"] for row in each}
        ]
        row: Row = {"weight": weight, "contrast": contrast, "size": size}
        row |= {name: _mean(r[name] for r in each) for name in each[0] if name != "position"}
        rows.append(row | {"letters_low": min(by_place), "letters_high": max(by_place)})
    return rows


def count_of(size: int) -> int:
    """How many words of a font size are shown."""
    return WORDS_EACH if size < 40 else OF_LARGE


def colour(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Plain patches, three tones of each of red, green and blue: how far the colour moves (ΔE*ab 1976), and how much
    the patch begins to vary (`floor`, RMS in display values)."""
    tones = (0.1, 0.5, 0.9)
    asked = [(r, g, b) for r in tones for g in tones for b in tones]
    shown = [targets.flat(PATCH, each) for each in asked]
    rows = []
    for rgb, before, after in zip(asked, shown, through(instrument, shown, told), strict=True):
        inner = after[INNER, INNER]
        moved = float(delta_e(before[0, 0], inner.mean((0, 1))))
        floor = float(np.sqrt(np.square(opponent(inner) - opponent(before[INNER, INNER])).sum(0).mean()))
        rows.append({"colour": list(rgb), "delta_e": moved, "floor": floor})
    return rows


def noise(instrument: Instrument, told: Told | None = None) -> list[Row]:
    """Noise by its deviation: how much of it comes back in place, and how much comes back at all."""
    asked = [(deviation, seed) for deviation in DEVIATIONS for seed in range(3)]
    shown = [targets.noise(PATCH, deviation, seed) for deviation, seed in asked]
    found = defaultdict(list)
    for (deviation, _), before, after in zip(asked, shown, through(instrument, shown, told), strict=True):
        a, b = opponent(before[INNER, INNER])[0], opponent(after[INNER, INNER])[0]
        found[deviation].append((kept(a, b), float(b.std() / a.std())))
    return [
        {"deviation": deviation, "kept": _mean(k for k, _ in each), "left": _mean(s for _, s in each)}
        for deviation, each in found.items()
    ]


def _of(place: int) -> tuple[slice, slice]:
    row, column = divmod(place, SIDE // PATCH)
    return slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH)


def _around(size: float, offset: tuple[int, int]) -> tuple[slice, slice]:
    reach = int(np.ceil(size / 2)) + 2
    middle = PATCH // 2
    y, x = middle + offset[1], middle + offset[0]
    return slice(max(y - reach, 0), y + reach), slice(max(x - reach, 0), x + reach)


def _whole_error(before: Array, after: Array, channel: int) -> float:
    """RMS of the error in all channels over the RMS of the grating in its own."""
    varies = before[channel] - before[channel].mean()
    return float(np.sqrt(np.square(after - before).sum(0).mean() / np.square(varies).mean()))


def _coarse(error: Array, block: int = 12) -> float:
    """RMS of what is left of an error when it is averaged over blocks: what was not there and is no detail."""
    height, width = (side // block * block for side in error.shape)
    cut = error[:height, :width].reshape(height // block, block, width // block, block).mean((1, 3))
    return float(np.sqrt(np.square(cut).mean()))


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
