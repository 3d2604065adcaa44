"""A person's pose drawn as OpenPose draws it, from heat maps of the 17 points that COCO knows.

The picture is taken for one person's: nothing looks for people here. Points, limbs and colours are those of OpenPose's
18 points (Cao et al. 2018, 1812.08008), whose neck lies between the shoulders.
"""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sfumato.errors import CheckpointError

POINTS = 17  # of COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, left before right
SURE = 0.3  # of a heat map's top, from which a point counts as seen
SHOULDERS = 5, 6
# OpenPose's points by COCO's numbers; -1 is the neck
ORDER = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
THICK = 4 / 512  # half a limb's width, and a point's radius, of the shorter side
FAINT = 0.6  # of a limb's colour beside its points'


def _hue(share: float) -> tuple[int, ...]:
    """RGB of full colours around the circle."""
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(share, 1, 1))


COLORS = tuple(_hue(k / len(ORDER)) for k in range(len(ORDER)))


def points_of(heat: Tensor) -> np.ndarray:
    """(17, 3) of heat maps (17, h, w): x and y as shares of the sides, and how sure.

    Between cells by a quarter towards the higher neighbour (Newell et al. 2016, 1603.06937, sec. 3.4).
    """
    if heat.ndim != 3 or len(heat) != POINTS:
        raise CheckpointError(f"a pose of {len(heat)} points, where COCO's {POINTS} are right")
    heat = heat.float()
    _, high, wide = heat.shape
    top, place = heat.flatten(1).max(1)
    found = np.zeros((POINTS, 3))
    for k, (value, at) in enumerate(zip(top.tolist(), place.tolist(), strict=True)):
        y, x = divmod(at, wide)
        shift = [0.0, 0.0]
        if 0 < x < wide - 1:
            shift[0] = 0.25 * float(torch.sign(heat[k, y, x + 1] - heat[k, y, x - 1]))
        if 0 < y < high - 1:
            shift[1] = 0.25 * float(torch.sign(heat[k, y + 1, x] - heat[k, y - 1, x]))
        found[k] = (x + 0.5 + shift[0]) / wide, (y + 0.5 + shift[1]) / high, value
    return found


def pose_picture(heat: Tensor, size: tuple[int, int]) -> Image.Image:
    """The pose of heat maps (17, h, w) of a whole picture, in RGB of that (width, height), on black."""
    found = points_of(heat)
    neck = found[list(SHOULDERS)].mean(0)
    neck[2] = found[list(SHOULDERS), 2].min()
    placed = [neck if k < 0 else found[k] for k in ORDER]
    width, height = size
    at = [(x * width, y * height) if sure >= SURE else None for x, y, sure in placed]
    picture = Image.new("RGB", size)
    pen, thick = ImageDraw.Draw(picture), max(1, round(THICK * min(size)))
    for color, (start, end) in zip(COLORS, LIMBS, strict=False):
        first, second = at[start], at[end]
        if first is not None and second is not None:
            pen.line([first, second], tuple(round(FAINT * value) for value in color), 2 * thick)
    for color, point in zip(COLORS, at, strict=True):
        if point is not None:
            x, y = point
            pen.ellipse((x - thick, y - thick, x + thick, y + thick), color)
    return picture
