"""Text lines, thin lines and small objects: groups of connected marks that stand out from what is around them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.regions.components import Components, components, joined
from sfumato.fidelity.regions.region import Box, Region, best, box_mean, covered

Array = NDArray[np.floating]
RADII = (5, 24)  # pixels around, of which a mark is darker or lighter
LEAST = 0.04  # contrast of a mark, in display values
LETTERS = (4, 96)  # pixels of height
MANY = 6000  # marks of one mask that are looked at
ONE_INK = 0.15  # deviation of the colours of one line's letters
CHIEFLY = 0.6  # of what is marked in the box of a line, what is its own
STRAY = 0.12  # of the strips above and below a line, what may be marked
UNEVEN = 0.4  # of the step from ground to mark, how much the ground may vary
CRISP = 0.2  # of the whole range of a line, what one step from pixel to pixel must reach
WORD_GAP = 1.4  # of the height of the letters beside it, what room there may be between two words
ASCENT = 0.75  # height of tall letters, of the font's size
SMALL = (3, 72)  # pixels of an object's longer side
THIN = 6.0  # pixels of a line's thickness
LONG = 24  # pixels of a line's length, at least
PIECE = 48  # pixels of the piece of a long line that stands for it
EXTENT = 0.3  # of the largest step from the ground, what counts as part of a thing
CALM = 0.25  # of a ring around a thing, what may differ from the rest of the ring
RIM = 0.55  # of a box that is mostly ground, what its border to the thing beside it may take at most
EDGE = 0.6  # of the step from the ground to that thing, what a pixel on their border may show at most
MOST = 60  # small objects that are told apart


@dataclass(frozen=True)
class Marks:
    """A mask (H, W) of what stands out in `planes` (3, H, W), and its components."""

    mask: NDArray[np.bool_]
    planes: Array

    @functools.cached_property
    def parts(self) -> Components:
        found = components(self.mask)
        if len(found) > MANY:
            found = found.pick(np.sort(np.argsort(-found.area, kind="stable")[:MANY]))
        return found

    @functools.cached_property
    def stroke(self) -> Array:
        """Thickness in pixels of each: of a long strip the area over half the border."""
        return 2 * self.parts.area / np.maximum(self.parts.border - 2, 1)

    @functools.cached_property
    def colours(self) -> Array:
        """(components, 3): the mean of what each one's box has in the mask."""
        inside = np.stack([self.mask, *(self.mask * plane for plane in self.planes)]).astype(np.float64)
        total = np.pad(inside, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
        p = self.parts
        sums = (
            total[:, p.bottom, p.right]
            - total[:, p.top, p.right]
            - total[:, p.bottom, p.left]
            + total[:, p.top, p.left]
        )
        return (sums[1:] / np.maximum(sums[0], 1)).T


def marks(planes: Array) -> list[Marks]:
    """What is lighter and what is darker than its surroundings, near and wide, and what is of another colour.

    planes: (3, H, W) opponent channels.
    """
    luma, found = planes[0], []
    for radius in RADII:
        middle = box_mean(luma, radius)
        spread = np.sqrt(np.maximum(box_mean(luma**2, radius) - middle**2, 0))
        away, least = luma - middle, np.maximum(LEAST, 0.4 * spread)
        found += [Marks(away > least, planes), Marks(-away > least, planes)]
    radius = RADII[-1]
    away = np.hypot(planes[1] - box_mean(planes[1], radius), planes[2] - box_mean(planes[2], radius))
    found.append(Marks(away > np.maximum(LEAST, box_mean(away, radius)), planes))
    return found


def text_lines(layers: Sequence[Marks], taken: Sequence[Region]) -> list[Region]:
    """Rows of letters: marks of like height and thin strokes, side by side on one line."""
    found = []
    for layer in layers[:4]:
        parts = layer.parts
        height, width = parts.height, parts.width
        fill = parts.area / np.maximum(height * width, 1)
        fits = (
            (height >= LETTERS[0])
            & (height <= LETTERS[1])
            & (width <= 10 * height)
            & (fill > 0.12)
            & (layer.stroke < 0.5 * height)
        )
        parts, stroke, colours = parts.pick(fits), layer.stroke[fits], layer.colours[fits]
        for group in joined(len(parts), *_neighbours(parts)):
            if np.linalg.norm(colours[group].std(0)) > ONE_INK:
                continue
            region = _line_of(parts.pick(group), stroke[group])
            if region is None or covered(region.box, taken, 0.7):
                continue
            own = int(parts.area[group].sum())
            if _crisp(layer, region.box) and _alone(layer, region.box, own) and _plain(layer, region.box):
                found.append(region)
    return best(found, 0.4)


def _crisp(layer: Marks, box: Box) -> bool:
    """Whether what varies in a box does so within a few pixels, as printed letters do."""
    left, top, right, bottom = box
    luma = layer.planes[0, top:bottom, left:right]
    steps = max(np.abs(np.diff(luma, axis=0)).max(initial=0), np.abs(np.diff(luma, axis=1)).max(initial=0))
    return bool(steps > CRISP * np.ptp(luma))


def _alone(layer: Marks, box: Box, own: int) -> bool:
    """Whether marks of `own` pixels are most of what is marked in their box, and little is marked just above and below:
    lines of text have room between them, and textures do not end where a line would."""
    left, top, right, bottom = box
    if own < CHIEFLY * layer.mask[top:bottom, left:right].sum():
        return False
    strip = max(1, round(0.1 * (bottom - top)))
    beside = np.concatenate(
        [layer.mask[max(top - strip, 0) : top, left:right], layer.mask[bottom : bottom + strip, left:right]]
    )
    return beside.size == 0 or bool(beside.mean() < STRAY)


def _plain(layer: Marks, box: Box) -> bool:
    """Whether the ground of marks in a box varies little beside the step from the ground to them."""
    left, top, right, bottom = (max(v + d, 0) for v, d in zip(box, (-2, -2, 2, 2), strict=True))
    mask = layer.mask[top:bottom, left:right]
    planes = layer.planes[:, top:bottom, left:right]
    ground = box_mean(mask.astype(np.float64), 1) == 0  # and no neighbour of a mark
    if ground.sum() < 0.05 * mask.size or not mask.any():
        return True
    step = np.linalg.norm(planes[:, mask].mean(1) - planes[:, ground].mean(1))
    return bool(np.sqrt(planes[:, ground].var(1).sum()) < UNEVEN * step)


def _neighbours(parts: Components) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that may be letters of one line, one after the other."""
    order = np.argsort(parts.left, kind="stable")
    left, right, top, bottom = (getattr(parts, name)[order] for name in ("left", "right", "top", "bottom"))
    height = bottom - top
    first, second = [], []
    reach = np.searchsorted(left, right + 2.4 * WORD_GAP * np.maximum(height, 4), side="right")
    for i in range(len(order)):
        j = np.arange(i + 1, min(reach[i], i + 200))
        if not len(j):
            continue
        low, high = np.minimum(height[i], height[j]), np.maximum(height[i], height[j])
        overlap = np.minimum(bottom[i], bottom[j]) - np.maximum(top[i], top[j])
        gap = left[j] - right[i]
        near = (overlap >= 0.5 * low) & (high <= 2.4 * low) & (gap <= WORD_GAP * high) & (gap > -0.5 * low)
        first.append(np.full(near.sum(), order[i]))
        second.append(order[j[near]])
    if not first:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(first), np.concatenate(second)


def _line_of(parts: Components, stroke: Array) -> Region | None:
    """The line that these letters make, if they look like letters."""
    left, right = int(parts.left.min()), int(parts.right.max())
    top, bottom = int(parts.top.min()), int(parts.bottom.max())
    tall = float(np.quantile(parts.height, 0.8))
    words = int((parts.width > 1.8 * parts.height).sum())  # letters that touch
    if (
        len(parts) < 2
        or len(parts) + 2 * words < 3
        or right - left < 1.6 * tall
        or bottom - top > 2.2 * tall
        or tall < 4
    ):
        return None
    if float(np.median(stroke)) > 0.36 * tall or np.std(stroke) > 0.6 * np.mean(stroke) + 0.5:
        return None
    alike = max(np.ptp(parts.width), np.ptp(parts.height)) <= 1
    if len(parts) >= 4 and alike and np.ptp(parts.area) <= 0.15 * parts.area.mean():
        return None  # a pattern
    gaps = np.sort(parts.left)[1:] - np.sort(parts.right)[:-1]
    filled = parts.area.sum() / ((right - left) * (bottom - top))
    if not 0.08 < filled < 0.75 or (len(gaps) and np.median(gaps) > 0.8 * tall):
        return None
    return Region(
        "text", (left, top, right, bottom), tall / ASCENT, weight=float(len(parts) + 3 * words) * tall
    )


def thin_lines(layers: Sequence[Marks], taken: Sequence[Region]) -> list[Region]:
    """Long strips of a few pixels. One that runs through much of the picture is told by a piece of it."""
    found = []
    for layer in layers[2:4]:  # in the near ones the outlines of all things are lines
        parts, stroke = layer.parts, layer.stroke
        length = np.maximum(parts.width, parts.height)
        fits = (stroke <= THIN) & (length >= np.maximum(LONG, 9 * stroke)) & (parts.area >= 12)
        for index in np.nonzero(fits)[0]:
            box = _box(parts, index)
            if covered(box, taken, 0.5) or not _plain(layer, box):
                continue
            if not _alone(layer, box, int(parts.area[index])):
                continue
            if min(parts.width[index], parts.height[index]) > PIECE:
                box = _piece(layer.mask, box)
            found.append(Region("line", box, float(stroke[index]), weight=float(parts.area[index])))
    return best(found, 0.4)


def small_objects(layers: Sequence[Marks], taken: Sequence[Region], planes: Array) -> list[Region]:
    """Compact marks, and those that touch or overlap as one, that stand apart from what is around them."""
    boxes: list[Box] = []
    for layer in (*layers[2:4], layers[4], *layers[:2]):
        parts = layer.parts
        longer, shorter = np.maximum(parts.width, parts.height), np.minimum(parts.width, parts.height)
        fill = parts.area / np.maximum(parts.width * parts.height, 1)
        fits = (longer <= SMALL[1]) & (shorter >= SMALL[0]) & (fill > 0.2) & (longer <= 5 * shorter)
        boxes += [_box(parts, i) for i in np.nonzero(fits)[0] if not covered(_box(parts, i), taken, 0.5)]
    drawn_in = (_tight(planes, box) for box in dict.fromkeys(boxes))
    boxes = [box for box in drawn_in if box is not None]
    found = []
    for box in _merged(boxes, 2):
        width, height = box[2] - box[0], box[3] - box[1]
        if max(width, height) > SMALL[1]:
            continue
        contrast = _apart(planes, box)
        if contrast >= 2 * LEAST:
            found.append(
                Region("object", box, float(max(width, height)), weight=contrast * np.sqrt(width * height))
            )
    return best(found, 0.5)[:MOST]


def _box(parts: Components, index: int | np.integer) -> Box:
    return int(parts.left[index]), int(parts.top[index]), int(parts.right[index]), int(parts.bottom[index])


def _piece(mask: NDArray[np.bool_], box: Box) -> Box:
    """The square of `PIECE` pixels within a box that holds most of a mask."""
    left, top, right, bottom = box
    inside = box_mean(mask[top:bottom, left:right].astype(np.float64), PIECE // 2)
    inner = inside[PIECE // 2 : -(PIECE // 2) or None, PIECE // 2 : -(PIECE // 2) or None]
    y, x = np.unravel_index(int(np.argmax(inner)), inner.shape)
    return left + int(x), top + int(y), left + int(x) + PIECE, top + int(y) + PIECE


def _merged(boxes: list[Box], gap: int) -> list[Box]:
    """Boxes that overlap or lie within `gap` pixels made one, until none do."""
    while boxes:
        table = np.array(boxes[:MANY])
        order = np.argsort(table[:, 0], kind="stable")
        table = table[order]
        first, second = [], []
        reach = np.searchsorted(table[:, 0], table[:, 2] + gap, side="right")
        for i in range(len(table)):
            j = np.arange(i + 1, reach[i])
            near = (table[j, 1] <= table[i, 3] + gap) & (table[j, 3] >= table[i, 1] - gap)
            first.append(np.full(near.sum(), i))
            second.append(j[near])
        groups = joined(len(table), np.concatenate(first), np.concatenate(second))
        new: list[Box] = []
        for group in groups:
            (left, top), (right, bottom) = table[group, :2].min(0), table[group, 2:].max(0)
            new.append((int(left), int(top), int(right), int(bottom)))
        if len(new) == len(boxes):
            return new
        boxes = new
    return []


def _tight(planes: Array, box: Box, ring: int = 4) -> Box | None:
    """A box drawn in to what differs from a ring around it, where that is calm, else as it was; None for a rim.

    What stands out from a mean of its surroundings pulls that mean: the ground beside a light thing is darker than it,
    and is marked as a thing of its own, a rim as wide as the mean reaches. It holds nothing but ground.
    """
    left, top, right, bottom = box
    above, before = max(top - ring, 0), max(left - ring, 0)
    outer = planes[:, above : bottom + ring, before : right + ring]
    around = np.ones(outer.shape[1:], bool)
    around[top - above : bottom - above, left - before : right - before] = False
    if not around.any():
        return box
    ground = np.median(outer[:, around], axis=1)
    away = np.linalg.norm(outer - ground[:, None, None], axis=0)
    inside = away[top - above : bottom - above, left - before : right - before]
    least = max(EXTENT * float(inside.max()), LEAST / 2)
    if (inside > LEAST).mean() < RIM and inside.max() < max(LEAST, EDGE * float(away[around].max())):
        return None
    if (away[around] > least).mean() > CALM:
        return box
    rows, columns = (np.nonzero((inside > least).any(axis))[0] for axis in (1, 0))
    if not len(rows):
        return box
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _apart(planes: Array, box: Box, ring: int = 4) -> float:
    """How far the colours in a box lie from those of a ring around it, where the ring itself is calm."""
    height, width = planes.shape[1:]
    left, top, right, bottom = box
    outer = planes[:, max(top - ring, 0) : bottom + ring, max(left - ring, 0) : right + ring]
    inner = planes[:, top:bottom, left:right]
    if min(height, width) < 3 or outer.shape[1:] == inner.shape[1:]:
        return 0.0
    count = outer[0].size - inner[0].size
    mean = (outer.sum((1, 2)) - inner.sum((1, 2))) / count
    square = (np.square(outer).sum((1, 2)) - np.square(inner).sum((1, 2))) / count
    calm = float(np.sqrt(np.maximum(square - mean**2, 0).sum()))
    contrast = float(np.sqrt(np.square(inner - mean[:, None, None]).sum(0).mean()))
    return contrast if calm < 0.6 * contrast else 0.0
