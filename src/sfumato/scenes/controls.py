"""Control pictures of rendered scenes, exact: depth, edges and masks, as a ControlNet is shown them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sfumato.errors import InputError
from sfumato.scenes.render import Render

CREASE = 0.75  # cosine between neighbouring normals, below which a surface has an edge
GREYS = 6  # shades of masks: the floor is black, objects are told apart by grey


def depth_picture(made: Render) -> Tensor:
    """(B, 3, H, W) in [0, 1]: inverse depth, the picture's nearest point white and its farthest black (as MiDaS)."""
    near = 1 / made.depth[:, 0]
    low, high = (getattr(near.flatten(1), which)(1)[:, None, None] for which in ("amin", "amax"))
    return _grey((near - low) / (high - low).clamp(min=1e-6))


def edge_picture(made: Render) -> Tensor:
    """(B, 3, H, W) of 0 and 1: white lines, one pixel wide, between objects and where a surface has a crease."""
    return _grey(edges(made.instances[:, 0], made.normals[:, :, 0]).float())


def mask_picture(made: Render) -> Tensor:
    """(B, 3, H, W) in [0, 1]: the floor black, objects in greys that tell them apart and nothing else."""
    return _grey(made.instances[:, 0].float().clamp(max=GREYS) / GREYS)


PICTURES = {"depth": depth_picture, "edge": edge_picture, "mask": mask_picture}


def require_kind(kind: str, argument: str = "kind") -> None:
    """`InputError` for a kind that is not in `PICTURES`. argument: what it was given as."""
    if kind not in PICTURES:
        raise InputError(f"{argument} must be one of {', '.join(PICTURES)}, not {kind!r}", argument=argument)


def control_pictures(made: Render, kind: str) -> Tensor:
    """Pictures of a kind in `PICTURES`, (B, 3, H, W) uint8; an unknown one is an `InputError` that lists them."""
    require_kind(kind)
    return PICTURES[kind](made).mul(255).round().to(torch.uint8)


def edges(instances: Tensor, normals: Tensor) -> Tensor:
    """(B, H, W) bool: pixels whose right or lower neighbour is of another object, or turned away from them."""
    found = torch.zeros_like(instances, dtype=torch.bool)
    for axis in (1, 2):
        step = instances.narrow(axis, 1, instances.shape[axis] - 1)
        here = instances.narrow(axis, 0, instances.shape[axis] - 1)
        turned = functional.cosine_similarity(
            normals.narrow(axis + 1, 1, normals.shape[axis + 1] - 1),
            normals.narrow(axis + 1, 0, normals.shape[axis + 1] - 1),
            dim=1,
        )
        found.narrow(axis, 0, instances.shape[axis] - 1).logical_or_((step != here) | (turned < CREASE))
    return found


def _grey(values: Tensor) -> Tensor:
    return values[:, None].expand(-1, 3, -1, -1)
