"""A region of a picture, and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # left, top, right, bottom (exclusive), in pixels
KINDS = {
    "text": "line of text",
    "pattern": "periodic pattern",
    "line": "thin line",
    "object": "small object",
    "face": "face",
    "detail": "fine detail",
}


@dataclass(frozen=True)
class Region:
    """kind: of `KINDS`. size: in pixels, of text its font (em), of a pattern its period, of a line its thickness, of
    the others the longer side. angle: of a pattern's direction of change, degrees from the x axis. weight: of ties."""

    kind: str
    box: Box
    size: float
    angle: float = 0.0
    weight: float = 0.0

    def grown(self, margin: int, width: int, height: int) -> Region:
        """With a margin, within the picture."""
        left, top, right, bottom = self.box
        box = (
            max(left - margin, 0),
            max(top - margin, 0),
            min(right + margin, width),
            min(bottom + margin, height),
        )
        return replace(self, box=box)


def area(box: Box) -> int:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def shared(first: Box, second: Box) -> int:
    """Pixels in both."""
    return area(
        (
            max(first[0], second[0]),
            max(first[1], second[1]),
            min(first[2], second[2]),
            min(first[3], second[3]),
        )
    )


def covered(box: Box, others: Sequence[Region], share: float = 0.5) -> bool:
    """Whether one of the others covers that share of it."""
    return any(shared(box, other.box) >= share * area(box) for other in others)


def best(regions: Sequence[Region], share: float = 0.5) -> list[Region]:
    """Those that no heavier one covers by that share of the smaller of the two."""
    chosen: list[Region] = []
    for region in sorted(regions, key=lambda r: -r.weight):
        if not any(
            shared(region.box, other.box) >= share * min(area(region.box), area(other.box))
            for other in chosen
        ):
            chosen.append(region)
    return chosen


def box_mean(values: NDArray[np.floating], radius: int) -> NDArray[np.float64]:
    """The mean over a square of 2·radius + 1 pixels around each, (H, W); beyond the border nothing counts."""
    height, width = values.shape
    total = np.pad(np.asarray(values, np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    y, x = np.arange(height), np.arange(width)
    top, bottom = np.maximum(y - radius, 0), np.minimum(y + radius + 1, height)
    left, right = np.maximum(x - radius, 0), np.minimum(x + radius + 1, width)
    inside = total[bottom][:, right] - total[top][:, right] - total[bottom][:, left] + total[top][:, left]
    return inside / ((bottom - top)[:, None] * (right - left)[None])
