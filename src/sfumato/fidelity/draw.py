"""Charts as figures: plots that say in pixels what is kept, one colour for each model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sfumato.errors import SfumatoError
from sfumato.fidelity import targets
from sfumato.fidelity.chart import HALF, READ, Chart, text_score
from sfumato.fidelity.specimens import Specimen
from sfumato.fidelity.table import SHAPES, notes_of, reader_of, rows_of, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = 8.6  # inches that they are high
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


def plots(charts: Sequence[Chart]) -> Figure:
    """Nine plots of one or more charts."""
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
        lines = (len(rows_of(charts))) / 2 if len(charts) == 1 else len(rows_of(charts))
        table = 0.24 * (lines + 5 + len(notes_of(charts))) if seen else 0.0
        pictures = 2.35 * (len(seen) + 1) if seen else 0.0
        height = PLOTS + table + pictures
        figure = Figure(figsize=(13, height), layout="constrained")
        if not seen:
            _plots(figure, charts)
            return figure
        parts: Any = figure.subfigures(3, 1, height_ratios=[table, PLOTS, pictures])
        _table(parts[0], charts)
        _plots(parts[1], charts)
        _pictures(parts[2], charts, seen)
        return figure


def _plots(figure: Any, charts: Sequence[Chart]) -> None:
    draw = (_mtf, _colour_mtf, _checkers, _text, _text_faint, _objects, _lines, _edge, _places)
    for axes, each in zip(figure.subplots(3, 3).flat, draw, strict=True):
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
    readers = {reader_of(chart) for chart in charts}
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
                label=_label(
                    charts, chart, f"{weight}, by {reader_of(chart)}" if len(readers) > 1 else weight
                ),
            )
    _sizes(axes, "font size, px", READ)
    who = " or ".join(sorted(reader if reader == SHAPES else reader.split()[0] for reader in readers))
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


def _places(axes: Axes, charts: Sequence[Chart]) -> None:
    """What is lost of the same targets at each place in a latent cell: of those that are nearest to the limits."""
    for ink, chart in zip(_inks(charts), charts, strict=True):
        x = targets.positions(chart.factor)
        waves = chart.rows("gratings", channel="luma", contrast=0.9, frequency=1 / 8)
        shown = (
            ("waves of 8 px", "-", [row["error_at"] for row in waves if row["angle"] != 45]),
            ("lines to 3 px", "--", [r["loss_at"] for r in chart.rows("lines") if r["thickness"] <= 3]),
            ("objects to 12 px", "-.", [r["loss_at"] for r in chart.rows("objects") if r["size"] <= 12]),
            ("words to 24 px", ":", [r["loss_at"] for r in chart.rows("text") if r["size"] <= 24]),
        )
        for name, dash, rows in shown:
            axes.plot(
                x,
                np.mean(rows, 0),
                dash,
                marker="o",
                ms=3,
                color=ink,
                lw=1.5,
                label=_label(charts, chart, name),
            )
    axes.set(title="Loss by the place in a latent cell", xlabel="px from the corner of a cell", ylabel="loss")
    axes.set_ylim(0, 1.25)
    axes.legend(loc="lower right", ncols=2)


def _table(figure: Any, charts: Sequence[Chart]) -> None:
    """The limits: of one model in two halves, of several in a column for each."""
    figure.suptitle("What the autoencoder keeps", fontsize=15, x=0.01, ha="left")
    table = rows_of(charts)
    middle = (len(table) + 1) // 2
    halves = (table[:middle], table[middle:]) if len(charts) == 1 else (table,)
    for axes, rows in zip(figure.subplots(1, len(halves), squeeze=False)[0], halves, strict=True):
        axes.set_axis_off()
        _columns(axes, charts, rows, 0.45 if len(halves) == 2 else 0.22)
    if notes := notes_of(charts):
        figure.supxlabel("\n".join(notes), fontsize=8.5, x=0.01, ha="left", color="#666666")


def _columns(axes: Any, charts: Sequence[Chart], rows: Sequence[tuple[str, list[str]]], left: float) -> None:
    head = [
        f"{short(chart.model)}\n{chart.factor}×{chart.factor} px a cell, {chart.channels} channels"
        for chart in charts
    ]
    table = axes.table(
        [cells for _, cells in rows],
        rowLabels=[words for words, _ in rows],
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
    rows += [(short(chart.model), [s.after for s in each]) for chart, each in zip(charts, seen, strict=True)]
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
    return what if len(charts) == 1 else f"{short(chart.model)}: {what}"
