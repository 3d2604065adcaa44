"""Rays of many shots, the (ray, object) pairs worth intersecting, and the nearest hit."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sfumato.scenes.graph import SHAPES
from sfumato.scenes.pack import OBJ, SHOT, Shots
from sfumato.scenes.solids import HIT, INF, Vec, along, dot, unit


def take(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index)


def take_all(values: Vec, index: Tensor) -> Vec:
    return take(values[0], index), take(values[1], index), take(values[2], index)


class Rays:
    """Rays of many shots. Dense: tensors (S, N), shot s in row s. Listed: tensors (R,), with the shot of each."""

    def __init__(self, shots: Shots, shot: Tensor | None):
        self.shots, self.shot = shots, shot
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A property of each ray's shot, shaped to broadcast with the rays."""
        if name not in self._known:
            row = self.shots.shots[SHOT[name]]
            self._known[name] = row[:, None] if self.shot is None else take(row, self.shot)
        return self._known[name]

    def vec(self, x: str, y: str, z: str) -> Vec:
        return self[x], self[y], self[z]

    @property
    def owner(self) -> Tensor:
        """The shot of each listed ray."""
        assert self.shot is not None, "dense rays have no list of shots"
        return self.shot


def box_pairs(shots: Shots, size: int, names: tuple[str, str, str, str]) -> tuple[Tensor, Tensor]:
    """(ray, object) for every pixel in every object's picture box, objects in the order of their shape."""
    table = shots.objects
    order = torch.argsort(table[OBJ["shape"]], stable=True)
    order = order[take(table[OBJ["bound"]], order) > 0]
    x0, x1, y0, y1 = (take(table[OBJ[name]], order) * size for name in names)
    x0, y0 = x0.floor().long(), y0.floor().long()
    wide = (x1.ceil().long() - x0).clamp(min=0)
    high = (y1.ceil().long() - y0).clamp(min=0)
    sizes = wide * high
    which = torch.repeat_interleave(torch.arange(len(order), device=table.device), sizes)
    inside = torch.arange(len(which), device=table.device) - (sizes.cumsum(0) - sizes)[which]
    row = inside // wide[which]
    obj = order[which]
    start = (obj // max(shots.slots, 1)) * (size * size) + y0[which] * size + x0[which]
    return start + row * size + (inside - row * wide[which]), obj


def sphere_pairs(rays: Rays, o: Vec, d: Vec, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ray, object) where a listed ray meets the bounding sphere of an object not its own, in the order of shapes."""
    table, slots = rays.shots.objects, rays.shots.slots
    found = []
    for k in range(slots):
        obj = rays.owner * slots + k
        c = tuple(take(table[OBJ[name]], obj) - o[i] for i, name in enumerate(("cx", "cy", "cz")))
        bound = take(table[OBJ["bound"]], obj)
        middle = dot(c, d)
        near = (dot(c, c) - middle * middle < bound * bound) & (middle > -bound) & (bound > 0)
        if own is not None:
            near &= obj != own
        ray = near.nonzero()[:, 0]
        found.append((ray, take(obj, ray)))
    return by_shape(rays.shots, found, o[0].device)


def by_shape(shots: Shots, found: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    if not found:
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return empty, empty
    ray, obj = (torch.cat(part) for part in zip(*found, strict=True))
    order = torch.argsort(take(shots.objects[OBJ["shape"]], obj).to(torch.uint8), stable=True)
    return take(ray, order), take(obj, order)


def runs_of(shots: Shots, obj: Tensor) -> list[slice]:
    """Where each shape's pairs lie in a list of objects in the order of shapes."""
    shape = take(shots.objects[OBJ["shape"]], obj).contiguous()
    ends = torch.searchsorted(
        shape, torch.arange(len(SHAPES), device=shape.device, dtype=shape.dtype), right=True
    )
    stops = [0, *ends.tolist()]
    return [slice(a, b) for a, b in pairwise(stops)]


def to_local(table: Tensor, obj: Tensor, o: Vec) -> Vec:
    """Points in the frames of the objects, in units of their radii."""
    center = (take(table[OBJ[name]], obj) for name in ("cx", "cy", "cz"))
    return turn(table, obj, tuple(v - c for v, c in zip(o, center, strict=True)))


def turn(table: Tensor, obj: Tensor, d: Vec) -> Vec:
    """Directions in the frames of the objects, in units of their radii."""
    cos, sin, inverse = (take(table[OBJ[name]], obj) for name in ("cos", "sin", "inverse"))
    cos, sin = cos * inverse, sin * inverse
    return d[0] * cos + d[1] * sin, d[1] * cos - d[0] * sin, d[2] * inverse


def closest(
    shots: Shots, o: Vec, d: Vec, pairs: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor, Tensor, Vec]:
    """Nearest hit: distance of every ray (INF if none), then ray, object and world normal of those that hit."""
    ray, obj = pairs
    table = shots.objects
    best = torch.full((count,), INF, device=table.device)
    at, to = to_local(table, obj, take_all(o, ray)), turn(table, obj, take_all(d, ray))
    # start at the point nearest the object's centre: keeps float32 exact enough at any distance
    middle = -dot(at, to) / dot(to, to)
    at = along(at, middle, to)
    times, normals = [], []
    for run, hit in zip(runs_of(shots, obj), HIT, strict=True):
        t, normal = hit(tuple(v[run] for v in at), tuple(v[run] for v in to))
        times.append(t)
        normals.append(normal)
    t = torch.cat(times)
    t = torch.where(t < INF * 0.5, t + middle, INF)
    t = torch.where(t > 1e-4, t, INF)
    best.scatter_reduce_(0, ray, t, "amin")
    won = ((t < INF * 0.5) & (t == take(best, ray))).nonzero()[:, 0]
    ray, obj = take(ray, won), take(obj, won)
    x, y, z = (torch.cat([n[i] for n in normals]).index_select(0, won) for i in range(3))
    cos, sin = take(table[OBJ["cos"]], obj), take(table[OBJ["sin"]], obj)
    return best, ray, obj, unit((x * cos - y * sin, x * sin + y * cos, z))
