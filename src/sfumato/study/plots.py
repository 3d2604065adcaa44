"""A study's curves as figures, and what its arms drew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image, ImageDraw

from sfumato.errors import SfumatoError
from sfumato.fidelity.draw import GREY, STYLE
from sfumato.storage import atomic_file
from sfumato.study.recipe import Arm
from sfumato.study.results import Curve, Results, mean
from sfumato.study.run import place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INKS = ("#1f5a92", "#b4431f", "#3d7d3a", "#7a4a9e", "#9a7b12", "#2a8f91", "#c2528b", "#5d6b2f", "#444444")
SHOWN = 96  # pixels a side that pictures are enlarged to, by whole numbers
LABEL = 70  # pixels left of a row of pictures for the arm's name


def curves(results: Results) -> Figure:
    """Strict score and kernel distance against compute, a line for each arm through the means of its seeds."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SfumatoError("curves are drawn with matplotlib: `pip install matplotlib`") from None
    with rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, measure, scale in ((left, "strict", 100.0), (right, "kernel_distance", 1.0)):
            for ink, arm in zip(_inks(results), results.study.ranged, strict=True):
                _line(axes, ink, arm, [c for c in results.curves if c.arm.name == arm.name], measure, scale)
            if results.scenes.get(measure, 0) > 0:
                axes.axhline(scale * results.scenes[measure], color=GREY, linewidth=0.8)
            axes.set_xlabel("FLOPs of training, the autoencoder's included")
            axes.set_xscale("log")
        left.set_title("pictures that show exactly what was asked, per cent")
        right.set_title("kernel distance to unseen scenes (lower is better)")
        right.set_yscale("log")
        left.legend(ncols=2)
        return figure


def _line(axes: Any, ink: str, arm: Arm, of_arm: Sequence[Curve], measure: str, scale: float) -> None:
    """Every seed's points, the line through their means, and the ceiling as a short mark at the right edge."""
    at: dict[float, list[float]] = {}
    for curve in of_arm:
        for point in curve.points:
            at.setdefault(point["compute"], []).append(scale * point[measure])
    if not at:
        return
    x = sorted(at)
    axes.plot(
        x,
        [mean(at[c]) for c in x],
        color=ink,
        linestyle="--" if arm.pixels else "-",
        label=arm.name,
        linewidth=1.4,
    )
    for c in x:
        axes.plot([c] * len(at[c]), at[c], ".", color=ink, markersize=4)
    ceilings = [scale * c.ceiling[measure] for c in of_arm if c.ceiling]
    if ceilings:
        axes.plot(
            [1.0],
            [mean(ceilings)],
            "_",
            color=ink,
            markersize=12,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )


def _inks(results: Results) -> list[str]:
    return [INKS[i % len(INKS)] for i in range(len(results.study.arms))]


def drawn(results: Results, out: Path) -> Image.Image | None:
    """The first row of each arm's last sheet of its first complete seed, one below the other; None without any."""
    rows = []
    for arm in results.study.ranged:
        for curve in results.of(arm)[:1]:
            sheets = sorted((place_of(out, arm, curve.seed) / "sheets").glob("denoiser-*.png"))
            if sheets:
                with Image.open(sheets[-1]) as sheet:
                    side = sheet.height // 2
                    row = sheet.convert("RGB").crop((0, 0, sheet.width, side))
                    enlarged = max(1, SHOWN // side)
                    rows.append(
                        (
                            arm.name,
                            row.resize(
                                (row.width * enlarged, row.height * enlarged), Image.Resampling.NEAREST
                            ),
                        )
                    )
    if not rows:
        return None
    page = Image.new(
        "RGB", (LABEL + max(row.width for _, row in rows), sum(row.height for _, row in rows)), "white"
    )
    y = 0
    for name, row in rows:
        ImageDraw.Draw(page).text((4, y + row.height // 2 - 6), name, fill="black")
        page.paste(row, (LABEL, y))
        y += row.height
    return page


def save(results: Results, out: Path, folder: Path, stem: str) -> list[Path]:
    """Write the figures into a folder: STEM.png and STEM.svg, and STEM-drawn.png where pictures were drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, written = curves(results), []
    from matplotlib import rc_context  # it is there: the figure is

    for kind, more in (("png", {}), ("svg", {"Date": None})):  # no date, and names from a salt of ours
        path = folder / f"{stem}.{kind}"
        with atomic_file(path) as temporary, rc_context({"svg.hashsalt": stem}):
            figure.savefig(temporary, format=kind, dpi=110, metadata=more)
        written.append(path)
    if picture := drawn(results, out):
        path = folder / f"{stem}-drawn.png"
        with atomic_file(path) as temporary:
            picture.save(temporary, format="PNG")
        written.append(path)
    return written
