"""The sections of a chart that show things: lines, small objects and words, and what is told of them.

Rows are as in `sections.py`. They also hold the loss of such things, and what the gratings foretell of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity import targets, words
from sfumato.fidelity.instrument import Instrument
from sfumato.fidelity.ocr import Reader
from sfumato.fidelity.predict import measured
from sfumato.fidelity.sheets import INNER, PATCH, SIDE, Row, Told, mean, spread, through
from sfumato.fidelity.signal import kept, lab, opponent

Array = NDArray[np.floating]
Foretell = Callable[[Array], float]  # what a picture (H, W, 3) is foretold to lose, see `predict.py`

THICK = (1, 1.5, 2, 3, 4, 6, 8)  # of lines
LINE_ANGLES = (0, 15, 45, 90)
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
            **spread("kept", [each[0] for each in all_of]),
            **spread("bend", [each[1] for each in all_of]),
            "foretold": mean(each[2] for each in all_of),
            "loss": mean(each[3] for each in all_of),
            "loss_at": [each[3] for each in all_of],
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
    rows = []
    for size, all_of in found.items():
        # (places, 4): shapes were shown in turn, each at all places
        at = np.array(all_of, np.float64).reshape(len(targets.SHAPES), len(places), 4).mean(0)
        shape, colour_told, told_before, lost = at.T
        rows.append(
            {"size": size}
            | spread("shape", shape)
            | spread("colour", colour_told)
            | {"foretold": mean(told_before), "loss": mean(lost), "loss_at": lost.tolist()}
        )
    return rows


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
        there = [[r for r in each if r["position"] == place] for place in places]
        at = {name: [mean(r[name] for r in some) for some in there if some] for name in each[0]}
        row: Row = {"weight": weight, "contrast": contrast, "size": size}
        for name in at.keys() - {"position"}:
            row |= spread(name, at[name]) if name in ("letters", "ocr") else {}
            row[name] = mean(r[name] for r in each)  # of all words: not all places have as many
        rows.append(row | {"loss_at": at["loss"]})
    return rows


def count_of(size: int) -> int:
    """How many words of a font size are shown."""
    return WORDS_EACH if size < 40 else OF_LARGE


def _around(size: float, offset: tuple[int, int]) -> tuple[slice, slice]:
    reach = int(np.ceil(size / 2)) + 2
    middle = PATCH // 2
    y, x = middle + offset[1], middle + offset[0]
    return slice(max(y - reach, 0), y + reach), slice(max(x - reach, 0), x + reach)
