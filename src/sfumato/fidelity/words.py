"""Words as test pictures, and reading them back by the shapes of their letters."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sfumato.errors import SfumatoError

Array = NDArray[np.floating]
FONTS = {"regular": "DejaVuSans.ttf", "bold": "DejaVuSans-Bold.ttf"}  # matplotlib brings them
OTHER_FONTS = (
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Bold.ttf",
)  # for pictures that judge the chart
CAPITALS = 0.729  # height of DejaVu's capitals, of its size
SMALL = 0.547  # height of its small x
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "quick", "jumpy", "vexed", "frost", "waltz", "bingo", "dwarf", "cable", "night", "proxy", "habit", "maze",
    "track", "fluid", "yolk", "seven",
)  # fmt: skip


@dataclass(frozen=True)
class Word:
    """A word on a sheet: text, weight, size (em) in pixels, contrast of ink and ground, the left upper corner of its
    box, and where that lies in a latent cell."""

    text: str
    weight: str
    size: int
    contrast: float
    x: int
    y: int
    position: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of its line: what a reader is shown, with room around."""
        width = round(font(self.weight, self.size).getlength(self.text))
        room = max(2, self.size // 4)
        return self.x - room, self.y - room, self.x + width + room, self.y + round(self.size * 1.2) + room


@functools.cache
def font_file(name: str) -> Path:
    """Where one of matplotlib's fonts lies. `SfumatoError` when there is none."""
    try:
        import matplotlib
    except ImportError:
        raise SfumatoError(
            "the chart draws its words with matplotlib's fonts: `pip install matplotlib`"
        ) from None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


@functools.lru_cache(256)
def font(weight: str, size: int) -> ImageFont.FreeTypeFont:
    """weight: a key of `FONTS`, or one of matplotlib's files. size: of the em, in pixels."""
    file = font_file(FONTS.get(weight, weight))
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def tones(contrast: float) -> tuple[float, float]:
    """(ink, ground) of dark text at that contrast."""
    return 0.5 - contrast / 2, 0.5 + contrast / 2


def sheets(
    weight: str, size: int, contrast: float, count: int, side: int, positions: tuple[int, ...], first: int = 0
) -> list[list[Word]]:
    """`count` words laid out on as many sheets as they need, each at the next place in the latent cells.

    first: how far along `WORDS` to begin.
    """
    room = max(2, size // 4)
    pages: list[list[Word]] = [[]]
    x, y = room, room
    for number in range(count):
        text = WORDS[(first + number) % len(WORDS)]
        width = round(font(weight, size).getlength(text))
        step = max(positions) + 1
        if x + step + width + room > side:
            x, y = room, y + round(size * 1.2) + 2 * room + step
        if y + step + round(size * 1.2) + room > side:
            pages.append([])
            x, y = room, room
        place = positions[number % len(positions)]
        cell = 2 * max(positions) - positions[-2] if len(positions) > 1 else 1
        left, top = (-(-value // cell) * cell + place for value in (x, y))
        if left + width + room > side:
            left = x
        if top + round(size * 1.2) + room > side:
            top = y
        pages[-1].append(Word(text, weight, size, contrast, left, top, place))
        x = left + width + 2 * room
    return pages


def draw(words: list[Word], side: int) -> Array:
    """A sheet of words of one contrast, (side, side, 3) in [0, 1]."""
    ink, ground = tones(words[0].contrast)
    sheet = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(sheet)
    for word in words:
        pen.text((word.x, word.y), word.text, fill=255, font=font(word.weight, word.size))
    cover = np.asarray(sheet, np.float64)[..., None] / 255
    return np.repeat(cover * ink + (1 - cover) * ground, 3, -1)


def read_by_shape(word: Word, picture: Array) -> str:
    """The letters that the picture (H, W, 3) resembles most where the word stands.

    Of each letter the place, font and size are known, and only which of the 26 it is has to be told: a reader that is
    better than any that has to find the text first.
    """
    face = font(word.weight, word.size)
    luma = picture.mean(-1)
    said = ""
    for index in range(len(word.text)):
        left = face.getlength(word.text[:index])
        right = face.getlength(word.text[: index + 1])
        x0, x1 = word.x + int(left), word.x + int(np.ceil(right))
        y0, y1 = word.y, word.y + round(word.size * 1.2)
        seen = -luma[y0:y1, x0:x1]
        templates = _templates(word.weight, word.size, x1 - x0, y1 - y0, round((left % 1) * 4) / 4)
        height, width = seen.shape
        seen = (seen - seen.mean()).ravel()
        cut = templates[:, :height, :width].reshape(len(LETTERS), -1)
        cut = cut - cut.mean(1, keepdims=True)
        score = cut @ seen / (np.linalg.norm(cut, axis=1) + 1e-9)
        said += LETTERS[int(np.argmax(score))] if np.ptp(seen) > 1e-3 else " "
    return said


@functools.lru_cache(4096)
def _templates(weight: str, size: int, width: int, height: int, shift: float) -> Array:
    """Each letter alone in a box of that size, (26, height, width), ink 1."""
    face = font(weight, size)
    drawn = []
    for letter in LETTERS:
        box = Image.new("L", (width, height), 0)
        centred = (width - face.getlength(letter)) / 2
        ImageDraw.Draw(box).text((max(0.0, centred), 0), letter, fill=255, font=face)
        drawn.append(np.asarray(box, np.float64) / 255)
    return np.stack(drawn)


def right_letters(truth: str, said: str) -> float:
    """The share of letters that were read right: 1 − edits / length, at least 0. Case and spaces do not count."""
    a, b = ("".join(text.lower().split()) for text in (truth, said))
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != other))
    return max(0.0, 1 - row[-1] / max(len(a), 1))
