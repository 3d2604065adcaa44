"""Charts as figures: plots that say in pixels what is kept, one colour for each model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sfumato.errors import SfumatoError
from sfumato.fidelity.chart import HALF, READ, Chart, text_score
from sfumato.fidelity.specimens import Specimen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INKS = ("#1f5a92", "#b4431f", "#3d7d3a", "#7a4a9e", "#9a7b12", "#2a8f91")
GREY = "#8a8a8a"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}
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


def told(chart: Chart, name: str, unit: str) -> str:
    """A limit as a reader sees it."""
    value = chart.limits[name]
    if value is None:
        return "not at any size"
    return f"{value:.3g} {unit}".strip()


def plots(charts: Sequence[Chart]) -> Figure:
    """Eight plots of one or more charts."""
    return _figure(charts, ())


def page(charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]]) -> Figure:
    """The whole page: limits, plots, and what came back of test pictures, a row for each model."""
    return _figure(charts, seen)


def _figure(charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]]) -> Figure:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SfumatoError(
            "charts are drawn with matplotlib: `pip install matplotlib`, or write JSON"
        ) from None
    with rc_context(cast(Any, STYLE)):
        lines = len(ROWS) / 2 if len(charts) == 1 else len(ROWS)
        table = 0.24 * (lines + 5) if seen else 0.0
        pictures = 2.35 * (len(seen) + 1) if seen else 0.0
        height = 5.8 + table + pictures
        figure = Figure(figsize=(13, height), layout="constrained")
        if not seen:
            _plots(figure, charts)
            return figure
        parts: Any = figure.subfigures(3, 1, height_ratios=[table, 5.8, pictures])
        _table(parts[0], charts)
        _plots(parts[1], charts)
        _pictures(parts[2], charts, seen)
        return figure


def _plots(figure: Any, charts: Sequence[Chart]) -> None:
    draw = (_mtf, _colour_mtf, _text, _text_faint, _objects, _lines, _edge, _checkers)
    for axes, each in zip(figure.subplots(2, 4).flat, draw, strict=True):
        each(axes, charts)


def _mtf(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        for angle, dash in ((0, "-"), (90, "--"), (45, ":")):
            rows = chart.rows("gratings", channel="luma", contrast=0.9, angle=angle)
            x = [row["frequency"] for row in rows]
            axes.plot(
                x,
                [row["mtf"] for row in rows],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, f"{angle}°"),
            )
            if angle == 0:
                low, high = ([row[name] for row in rows] for name in ("mtf_low", "mtf_high"))
                axes.fill_between(x, low, high, color=ink, alpha=0.15, lw=0)
        spokes = chart.rows("star")
        x, y = ([row[name] for row in spokes] for name in ("frequency", "kept"))
        axes.plot(x, y, "o", color=ink, ms=3, label=_label(charts, chart, "star"))
    _periods(axes)
    axes.set(title="Fine patterns, light and dark", ylabel="contrast kept")
    axes.legend()


def _colour_mtf(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        for channel, dash in (("red-green", "-"), ("blue-yellow", "--")):
            rows = chart.rows("gratings", channel=channel, contrast=0.9, angle=0)
            axes.plot(
                [row["frequency"] for row in rows],
                [row["mtf"] for row in rows],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, channel),
            )
    _periods(axes)
    axes.set(title="Fine patterns in colour", ylabel="contrast kept")
    axes.legend()


def _text(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        for weight, dash in (("regular", "-"), ("bold", "--")):
            rows = chart.rows("text", weight=weight, contrast=1.0)
            sizes = [row["size"] for row in rows]
            axes.plot(
                sizes,
                [r[text_score(chart)] for r in rows],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, weight),
            )
    _sizes(axes, "font size, px", READ)
    who = charts[0].reader.split()[0] if charts[0].reader else "letter shapes"
    axes.set(title=f"Words, read by {who}", ylabel="letters read right")
    axes.legend(loc="lower right")


def _text_faint(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        for contrast, dash in ((1.0, "-"), (0.5, "--"), (0.25, ":")):
            rows = chart.rows("text", weight="regular", contrast=contrast)
            axes.plot(
                [row["size"] for row in rows],
                [row["letters"] for row in rows],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, f"contrast {contrast:g}"),
            )
        rows = chart.rows("text", weight="regular", contrast=1.0)
        low, high = ([row[name] for row in rows] for name in ("letters_low", "letters_high"))
        axes.fill_between([row["size"] for row in rows], low, high, color=ink, alpha=0.12, lw=0)
    _sizes(axes, "font size, px", READ)
    axes.set(title="Words, told by the shape of letters", ylabel="letters told right")
    axes.legend(loc="lower right")


def _objects(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        rows = chart.rows("objects")
        for name, dash in (("shape", "-"), ("colour", "--")):
            axes.plot(
                [row["size"] for row in rows],
                [row[name] for row in rows],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, name),
            )
    axes.axhline(1 / 8, color=GREY, lw=0.8, ls=":")
    _sizes(axes, "size across, px", READ)
    axes.set(title="Small objects", ylabel="told right, of 8 shapes and 6 colours")
    axes.legend(loc="lower right")


def _lines(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        for contrast, dash in ((0.9, "-"), (0.3, "--")):
            rows = chart.rows("lines", contrast=contrast)
            thick = sorted({row["thickness"] for row in rows})
            of = [[row for row in rows if row["thickness"] == t] for t in thick]
            axes.plot(
                thick,
                [np.mean([row["kept"] for row in each]) for each in of],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, f"contrast {contrast:g}"),
            )
            if contrast == 0.9:
                low = [min(row["kept_low"] for row in each) for each in of]
                high = [max(row["kept_high"] for row in each) for each in of]
                axes.fill_between(thick, low, high, color=ink, alpha=0.15, lw=0)
    _sizes(axes, "thickness, px", HALF)
    axes.set(title="Thin lines, all directions", ylabel="contrast kept")
    axes.legend(loc="lower right")


def _edge(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        for channel, dash in (("luma", "-"), ("red-green", "--"), ("blue-yellow", ":")):
            row = chart.rows("edges", channel=channel, contrast=0.8, angle=5)[0]
            profile = np.array(row["profile"])
            low, high = profile[: len(profile) // 8].mean(), profile[-len(profile) // 8 :].mean()
            level = (profile - low) / (high - low if abs(high - low) > 1e-6 else 1)
            axes.plot(row["position"], level, dash, color=ink, lw=1.5, label=_label(charts, chart, channel))
    axes.set(title="An edge", xlabel="px from the edge", ylabel="level", xlim=(-12, 12))
    axes.legend(loc="upper left")


def _checkers(axes: Axes, charts: Sequence[Chart]) -> None:
    for ink, chart in zip(_inks(charts), charts, strict=True):
        rows = chart.rows("checkers")
        for name, dash, words in (("kept", "-", "kept"), ("moire", ":", "false bands")):
            axes.plot(
                [row["cell"] for row in rows],
                [row[name] for row in rows],
                dash,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, words),
            )
    _sizes(axes, "side of a cell, px", HALF)
    axes.set(title="Checkerboards", ylabel="share of the contrast")
    axes.legend()


def _table(figure: Any, charts: Sequence[Chart]) -> None:
    """The limits: of one model in two halves, of several in a column for each."""
    figure.suptitle("What the autoencoder keeps", fontsize=15, x=0.01, ha="left")
    halves = (ROWS[: len(ROWS) // 2 + 1], ROWS[len(ROWS) // 2 + 1 :]) if len(charts) == 1 else (ROWS,)
    for axes, rows in zip(figure.subplots(1, len(halves), squeeze=False)[0], halves, strict=True):
        axes.set_axis_off()
        _columns(axes, charts, rows, 0.45 if len(halves) == 2 else 0.22)


def _columns(axes: Any, charts: Sequence[Chart], rows: Sequence[tuple[str, str, str]], left: float) -> None:
    head = [
        f"{_short(chart.model)}\n{chart.factor}×{chart.factor} px a cell, {chart.channels} channels"
        for chart in charts
    ]
    table = axes.table(
        [[told(chart, name, unit) for chart in charts] for name, _, unit in rows],
        rowLabels=[words for _, words, _ in rows],
        colLabels=head,
        cellLoc="left",
        rowLoc="left",
        colLoc="left",
        edges="horizontal",
        bbox=(left, 0, min(1 - left, 0.5 * len(charts)), 1),
    )
    table.auto_set_font_size(False)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("#dddddd")
        cell.set_fontsize(8.5)
        if row == 0:
            cell.set_text_props(weight="bold")
            cell.set_height(cell.get_height() * 1.8)


def _pictures(figure: Any, charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]]) -> None:
    names = [specimen.name for specimen in seen[0]]
    grid = figure.subplots(len(seen) + 1, len(names), squeeze=False)
    rows = [("as drawn", [s.before for s in seen[0]])]
    rows += [(_short(chart.model), [s.after for s in each]) for chart, each in zip(charts, seen, strict=True)]
    for line, (title, pictures) in zip(grid, rows, strict=True):
        for axes, picture, name in zip(line, pictures, names, strict=True):
            axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            axes.set_title(f"{name}: {title}", fontsize=8, weight="normal")


def _periods(axes: Axes) -> None:
    """A logarithmic axis of frequencies that reads as periods in pixels, coarse to fine."""
    ticks = (64, 32, 16, 12, 8, 6, 4, 3, 2)
    axes.set_xscale("log")
    axes.set_xticks([1 / t for t in ticks], [str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="period, px (finer →)", xlim=(1 / 64, 0.5), ylim=(0, 1.25))
    axes.axhline(HALF, color=GREY, lw=0.8, ls=":")


def _sizes(axes: Axes, label: str, level: float) -> None:
    axes.set(xlabel=label, ylim=(-0.02, 1.08))
    axes.set_xlim(left=0)
    axes.axhline(level, color=GREY, lw=0.8, ls=":")


def _inks(charts: Sequence[Chart]) -> list[str]:
    return [INKS[number % len(INKS)] for number in range(len(charts))]


def _label(charts: Sequence[Chart], chart: Chart, what: str) -> str:
    return what if len(charts) == 1 else f"{_short(chart.model)}: {what}"


def _short(name: str) -> str:
    """A model's name as it fits: of a path the end."""
    last = name.rstrip("/").split("/")[-1] or name
    return last if len(last) <= 28 else f"{last[:26]}…"
