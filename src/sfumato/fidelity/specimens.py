"""Test pictures to look at: as they are, and as they come back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sfumato.fidelity import targets, words
from sfumato.fidelity.instrument import Instrument, Picture
from sfumato.fidelity.sheets import PATCH, SIDE
from sfumato.fidelity.things import COLOURS, GROUNDS

SIZES = (8, 10, 12, 16, 20, 24, 32, 48)


@dataclass(frozen=True)
class Specimen:
    """A test picture (H, W, 3) and what came back of it."""

    name: str
    before: Picture
    after: Picture


def specimens(instrument: Instrument) -> list[Specimen]:
    """Words, small objects, a Siemens star and a zone plate, through the instrument."""
    shown = {
        "words of 8 to 48 px": text_sheet(),
        "objects of 4 to 32 px": object_sheet(),
        "Siemens star": targets.siemens_star(SIDE),
        "zone plate": targets.zone_plate(SIDE),
    }
    before = [picture.astype(np.float32) for picture in shown.values()]
    after = instrument.pictures(before)
    return [Specimen(name, *pair) for name, *pair in zip(shown, before, after, strict=True)]


def text_sheet() -> np.ndarray:
    """A word in each size, black on white."""
    y, placed = 6, []
    for number, size in enumerate(SIZES):
        text = f"{words.WORDS[number]} {words.WORDS[number + 8]}" if size < 40 else words.WORDS[number]
        placed.append(words.Word(text, "regular", size, 1.0, 8, y, 0))
        y += round(size * 1.22) + 4
    return words.draw(placed, SIDE)


def object_sheet() -> np.ndarray:
    """Shapes in rows of one size each."""
    sheet = np.empty((SIDE, SIDE, 3))
    sheet[:] = GROUNDS[1]
    for row, size in enumerate((4, 6, 8, 12, 16, 20, 24, 32)):
        for column, kind in enumerate(targets.SHAPES):
            colour = tuple(COLOURS.values())[(row + column) % len(COLOURS)]
            patch = targets.small_object(PATCH, kind, size, colour, GROUNDS[1])
            inner = patch[16:48, 16:48]
            sheet[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = inner
    return sheet
