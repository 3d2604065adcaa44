"""Charts in words: the table of limits, who read the words, and what is to be known of it."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.fidelity.chart import Chart
from sfumato.fidelity.ocr import MISSING

SHAPES = "letter shapes"  # the reader that is always there
ROWS = (  # of the table of limits: name, words, unit
    ("text", "words are read from a font size of", "px"),
    ("text_bold", "bold words from a font size of", "px"),
    ("text_quarter_contrast", "faint words from a font size of", "px"),
    ("object", "shapes told apart from", "px"),
    ("object_colour", "colours told apart from", "px"),
    ("line", "lines kept by half from", "px"),
    ("finest_luma", "finest pattern, light and dark", "px a period"),
    ("finest_red_green", "finest pattern, red and green", "px a period"),
    ("finest_blue_yellow", "finest pattern, blue and yellow", "px a period"),
    ("checker", "finest checkerboard, cells of", "px"),
    ("edge", "an edge spreads over", "px"),
    ("overshoot", "and swings beyond by", "of the step"),
    ("bend", "straight lines move by up to", "px"),
    ("colour_mean", "plain colours move by", "ΔE"),
    ("colour_worst", "at worst by", "ΔE"),
    ("noise_kept", "grain kept", "of it"),
    ("position", "place in the cell changes contrast by up to", ""),
)


def rows_of(charts: Sequence[Chart]) -> list[tuple[str, list[str]]]:
    """The table of limits: words, and what is said of each chart. Where different readers read the words, each limit of
    words says whose it is."""
    marked = len({reader_of(chart) for chart in charts}) > 1
    rows = [("words are read by", [reader_of(chart) for chart in charts])]
    for name, words, unit in ROWS:
        cells = [told(chart, name, unit) for chart in charts]
        if marked and name.startswith("text"):
            cells = [f"{cell} ({reader_of(chart)})" for cell, chart in zip(cells, charts, strict=True)]
        rows.append((words, cells))
    return rows


def told(chart: Chart, name: str, unit: str) -> str:
    """A limit as a reader sees it."""
    value = chart.limits[name]
    if value is None:
        return "not at any size"
    return f"{value:.3g} {unit}".strip()


def reader_of(chart: Chart) -> str:
    """Who read the words of a chart."""
    return chart.reader or SHAPES


def notes_of(charts: Sequence[Chart]) -> list[str]:
    """What is to be known of the readers: which is missing where, and that different ones are not to be compared."""
    without = [short(chart.model) for chart in charts if not chart.reader]
    notes = [MISSING if len(charts) == 1 else f"{', '.join(without)}: {MISSING}"] if without else []
    if len({reader_of(chart) for chart in charts}) > 1:
        notes.append(
            "the words were read by different readers: what one reads another may not, compare by letter shapes"
        )
    return notes


def short(name: str) -> str:
    """A model's name as it fits: of a path the end."""
    last = name.rstrip("/").split("/")[-1] or name
    return last if len(last) <= 28 else f"{last[:26]}…"
