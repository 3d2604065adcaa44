"""What a prompt asks for that a model cannot resolve at a size: told from its chart, nothing is drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.fidelity.advice import pixels, up_to
from sfumato.fidelity.chart import Chart, limits, text_score
from sfumato.fidelity.language import counted, quoted, unquoted
from sfumato.fidelity.preflight import verdict

LETTER = 0.6  # width of a letter, of the font's size
LEADING = 1.25  # distance of lines, of the font's size
ROOM = 0.8  # of the picture's sides, what words may take
LARGER = 8  # times larger is the most that is proposed
CROWDED = 0.35  # of the picture's area, what the things counted take together
# things that consist of detail: what a part of it is, and what it measures as a share of the picture's shorter side
PRINT, THIN, PATTERN = "print", "thin lines", "a pattern"
FINE = {
    "newspaper": (PRINT, 0.012),
    "contract": (PRINT, 0.012),
    "sheet music": (PRINT, 0.012),
    "spreadsheet": (PRINT, 0.012),
    "document": (PRINT, 0.015),
    "map": (PRINT, 0.015),
    "screenshot": (PRINT, 0.015),
    "diagram": (PRINT, 0.02),
    "menu": (PRINT, 0.02),
    "label": (PRINT, 0.025),
    "keyboard": (PRINT, 0.03),
    "watch face": (PRINT, 0.03),
    "clock face": (PRINT, 0.04),
    "book cover": (PRINT, 0.05),
    "circuit board": (THIN, 0.01),
    "blueprint": (THIN, 0.012),
    "barcode": (PATTERN, 0.006),
    "lace": (PATTERN, 0.01),
    "mesh": (PATTERN, 0.01),
    "pinstripe": (PATTERN, 0.01),
    "halftone": (PATTERN, 0.01),
    "qr code": (PATTERN, 0.02),
    "houndstooth": (PATTERN, 0.02),
    "chain-link": (PATTERN, 0.02),
    "mosaic": (PATTERN, 0.02),
    "plaid": (PATTERN, 0.03),
    "brick wall": (PATTERN, 0.03),
    "chessboard": (PATTERN, 0.1),
}
TINY = {
    "tiny": 0.06,
    "minuscule": 0.03,
    "distant": 0.05,
    "far away": 0.05,
    "faraway": 0.05,
    "on the horizon": 0.04,
}


@dataclass(frozen=True)
class Wish:
    """Something that a prompt asks for. size: in pixels, as large as it will be at best; limit: from which the model
    shows it. loss: the share of it that is foretold to be told wrong, 0 to 1."""

    kind: str
    what: str
    size: float
    limit: float | None
    loss: float
    reason: str
    helps: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": self.kind,
            "what": self.what,
            "size": round(self.size, 1),
            "limit": None if self.limit is None else round(self.limit, 1),
            "predicted_loss": round(self.loss, 3),
            "verdict": verdict(self.loss),
            "reason": self.reason,
            "helps": list(self.helps),
        }


def examine(prompt: str, size: tuple[int, int], chart: Chart) -> list[Wish]:
    """What a prompt asks for that takes room, worst first. size: (width, height) in pixels."""
    wishes = [_words(text, size, chart) for text in quoted(prompt)]
    plain = unquoted(prompt).lower()
    if (count := counted(plain)) > 1:
        wishes.append(_objects(count, size, chart))
    for word, share in TINY.items():
        if re.search(rf"\b{word}\b", plain):
            side = share * min(size)
            wishes.append(_thing("object", f"something {word}", side, size, chart))
    for word, (parts, share) in FINE.items():
        if re.search(rf"\b{re.escape(word)}s?\b", plain):
            kind = {PRINT: "text", THIN: "line"}.get(parts, "pattern")
            wishes.append(_thing(kind, f"{parts} of a {word}", share * min(size), size, chart))
    return sorted(wishes, key=lambda wish: -wish.loss)


def score(wishes: list[Wish]) -> float:
    """0 to 100: of the worst wish; 100 where nothing takes much room."""
    return round(100 * (1 - max((wish.loss for wish in wishes), default=0.0)), 1)


def largest_type(text: str, size: tuple[int, int]) -> tuple[float, int]:
    """(font size in pixels, lines) of the largest setting of a text in `ROOM` of a picture, broken between words."""
    words = text.split() or [""]
    best = (0.0, 1)
    # the lines at which width and height bind alike; of many lines, those near it are tried, a step apart
    even = np.sqrt(LETTER * len(text) * size[1] / (LEADING * size[0]))
    step = max(1, int(even) // 20)
    counts = range(1, len(words) + 1) if step == 1 else range(int(even) // 2, len(words) + 1, step)
    for count in counts:
        if ROOM * size[1] / (LEADING * count) < best[0]:
            break  # more lines are lower still
        longest = max(len(line) for line in _broken(words, count))
        fitting = min(ROOM * size[0] / (LETTER * max(longest, 1)), ROOM * size[1] / (LEADING * count))
        best = max(best, (fitting, count))
    return best


def _broken(words: list[str], count: int) -> list[str]:
    """Words in at most `count` lines of about equal length."""
    target = (sum(map(len, words)) + len(words)) / count
    lines: list[str] = []
    line = ""
    for word in words:
        if line and len(line) + len(word) / 2 > target and len(lines) < count - 1:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def _words(text: str, size: tuple[int, int], chart: Chart) -> Wish:
    tall, count = largest_type(text, size)
    shown = text if len(text) <= 40 else f"{text[:37]}…"
    in_lines = "on one line" if count == 1 else f"on {count} lines"
    what = f"the words “{shown}” ({len(text)} letters)"
    where = f"{in_lines}, filling four fifths of {size[0]}x{size[1]}, its letters are {tall:.3g} px (font size) at most"
    return _wish("text", what, tall, where, size, chart)


def _objects(count: int, size: tuple[int, int], chart: Chart) -> Wish:
    side = float(np.sqrt(CROWDED * size[0] * size[1] / count))
    where = f"{count} things that fill a third of {size[0]}x{size[1]} are about {side:.3g} px each"
    return _wish("object", f"about {count} things", side, where, size, chart)


def _thing(kind: str, what: str, side: float, size: tuple[int, int], chart: Chart) -> Wish:
    return _wish(kind, what, side, f"at {size[0]}x{size[1]} that is about {side:.2g} px", size, chart)


def _wish(kind: str, what: str, side: float, where: str, size: tuple[int, int], chart: Chart) -> Wish:
    limit, loss, does = _known(kind, side, chart)
    helps = []
    scale = 1.0 if limit is None else limit / side
    if 1 < scale <= LARGER:
        helps.append(
            f"at {up_to(size[0] * scale, chart.factor)}x{up_to(size[1] * scale, chart.factor)} (×{scale:.2g}) it would "
            f"reach {limit:.3g} px"
        )
    if loss > 0.1:
        if kind == "text":
            helps.append("draw the picture without the words and set them over it afterwards")
            if len(what.split()) > 4:
                helps.append("ask for fewer words")
        elif kind == "object":
            helps.append("ask for fewer things, or nearer ones")
    return Wish(kind, what, side, limit, loss, f"{where}; {does} from {pixels(limit)} on", tuple(helps))


def _known(kind: str, side: float, chart: Chart) -> tuple[float | None, float, str]:
    """(limit in pixels, share told wrong at that size, what the model does from the limit on)."""
    limit = limits(chart)
    if kind == "text":
        rows = chart.rows("text", weight="regular", contrast=1.0)
        points = [(row["size"], 1 - row[text_score(chart)]) for row in rows]
        return limit["text"], _between(points, side), "this model's words are read"
    if kind == "object":
        points = [(row["size"], 1 - row["shape"]) for row in chart.rows("objects")]
        return limit["object"], _between(points, side), "shapes are told apart"
    if kind == "line":
        rows = chart.rows("lines", contrast=0.9)
        points = [
            (t, float(np.mean([1 - row["kept"] for row in rows if row["thickness"] == t])))
            for t in sorted({row["thickness"] for row in rows})
        ]
        return limit["line"], _between(points, side), "half a line's contrast is kept"
    rows = chart.rows("gratings", channel="luma", contrast=0.9, angle=0)
    points = sorted((1 / row["frequency"], 1 - min(row["mtf"], 1.0)) for row in rows)
    return limit["finest_luma"], _between(points, side), "half a pattern's contrast is kept"


def _between(points: list[tuple[float, float]], side: float) -> float:
    xs, ys = zip(*sorted(points), strict=True)
    return float(np.clip(np.interp(side, xs, ys), 0, 1))
