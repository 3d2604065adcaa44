"""Exact labels of latent cells, free with every render: what a network may be asked besides the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.scenes.graph import COLORS, MATERIALS, SHAPES, SIZES, Scene

ATTRIBUTES = (("shape", SHAPES), ("color", COLORS), ("material", MATERIALS), ("size", SIZES))


def cell_labels(scenes: Sequence[Scene], instances: Tensor, cell: int) -> Tensor:
    """(B, A, H/cell, W/cell) int64, A = shape, colour, material, size: 0 for background, else 1 + its place.

    instances: (B, H, W) uint8 as rendered, or (B, 1, H, W). A cell belongs to the object that covers most of it,
    if that is at least a quarter of the cell.
    """
    masks = instances.reshape(len(scenes), *instances.shape[-2:])
    slots = max(len(scene.objects) for scene in scenes)
    table = torch.zeros(len(scenes), len(ATTRIBUTES), slots + 1, dtype=torch.int64)
    for b, scene in enumerate(scenes):
        for k, obj in enumerate(scene.objects):
            for a, (name, words) in enumerate(ATTRIBUTES):
                table[b, a, k + 1] = 1 + words.index(getattr(obj, name))
    height, width = masks.shape[1] // cell, masks.shape[2] // cell
    cells = masks[:, : height * cell, : width * cell].reshape(len(scenes), height, cell, width, cell)
    shares = torch.stack(
        [(cells == k + 1).sum((2, 4)) for k in range(slots)], 1
    )  # (B, slots, H/cell, W/cell)
    most, owner = shares.max(1)
    owner = torch.where(most * 4 >= cell * cell, owner + 1, 0).reshape(len(scenes), 1, -1)
    found = table.to(masks.device).gather(2, owner.expand(-1, len(ATTRIBUTES), -1))
    return found.reshape(len(scenes), len(ATTRIBUTES), height, width)
