"""Why a region is lost, in the chart's numbers, and what would keep it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfumato.fidelity.chart import Chart, limits
from sfumato.fidelity.predict import LOST, WORN, Transfer, Waves, predict
from sfumato.fidelity.regions.region import Region

SCALES = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
OVERLAY = "leave the words out of the picture and set them over it afterwards"
MASK = "if it is in a picture you begin with, keep it by a mask: what lies outside comes back byte for byte"
CLEARLY = 0.15  # less loss, for another model to be worth a word


def pixels(value: float | None) -> str:
    return "no size measured" if value is None else f"{value:.3g} px"


def reason(region: Region, chart: Chart) -> str:
    """One sentence on what the region is and where this model's limit lies."""
    limit, size = limits(chart), f"{region.size:.3g} px"
    if region.kind == "text":
        who = chart.reader or "a matcher of letter shapes"
        return (
            f"letters of about {size} (font size); {who} reads this model's from {pixels(limit['text'])} on"
        )
    if region.kind == "pattern":
        return (
            f"it repeats every {size}; of gratings half the contrast is kept from {pixels(limit['finest_luma'])} on, "
            f"of coloured ones from {pixels(limit['finest_red_green'])}"
        )
    if region.kind == "line":
        return f"about {size} thick; of lines half the contrast is kept from {pixels(limit['line'])} on"
    if region.kind == "object":
        return f"{size} across; shapes are told apart from {pixels(limit['object'])} on"
    if region.kind == "face":
        least = pixels(limit["object"])
        return f"a face of {size}; eyes and mouth are a fifth of it, shapes are told apart from {least} on"
    return f"varies finely; of gratings half the contrast is kept from a period of {pixels(limit['finest_luma'])} on"


def helps(
    region: Region,
    waves: Waves,
    loss: float,
    chart: Chart,
    transfer: Transfer,
    size: tuple[int, int],
    others: Sequence[tuple[str, Transfer]],
) -> tuple[str, ...]:
    """What would keep a region that is foretold to be worn; nothing for others. size: of the picture."""
    if loss < WORN:
        return ()
    found = []
    limit = limits(chart)["text"] if region.kind == "text" else None
    unread = limit is not None and region.size < limit
    for scale in SCALES:
        then, tall = predict(waves, transfer, region.kind, scale), region.size * scale
        if tall >= limit if unread and limit is not None else then < WORN:
            width, height = (up_to(side * scale, chart.factor) for side in size)
            does = "which is read" if unread else f"and lose {then:.2f}"
            found.append(f"at {width}x{height} (×{scale:g}) it would be {tall:.3g} px, {does}")
            break
    for name, other in others:
        then = predict(waves, other, region.kind)
        if then < min(loss - CLEARLY, LOST):
            found.append(f"{name} would lose {then:.2f} of it")
    return (*found, *((OVERLAY,) if region.kind == "text" else ()), MASK)


def up_to(side: float, factor: int) -> int:
    """The next side that is drawn, whatever draws over the autoencoder: transformers take cells two by two."""
    multiple = 2 * max(factor, 8)
    return int(np.ceil(side / multiple) * multiple)
