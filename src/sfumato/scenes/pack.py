"""Scenes as tables of float32: one column per shot (a scene at one moment), one per object slot of a shot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.scenes.graph import COLORS, HALF_WIDTH, SHAPES, Scene
from sfumato.scenes.solids import BOUND

SRGB = {
    "gray": (0.50, 0.51, 0.53),
    "red": (0.86, 0.06, 0.08),
    "blue": (0.07, 0.23, 0.88),
    "green": (0.07, 0.60, 0.14),
    "brown": (0.42, 0.23, 0.10),
    "purple": (0.50, 0.12, 0.74),
    "cyan": (0.05, 0.77, 0.83),
    "yellow": (0.98, 0.84, 0.06),
    "orange": (1.00, 0.48, 0.02),
    "pink": (1.00, 0.52, 0.74),
}


def _linear(v: float) -> float:
    return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4


ALBEDO = {name: tuple(_linear(v) for v in SRGB[name]) for name in COLORS}
SHOT_FIELDS = (
    *("px", "py", "pz", "rx", "ry", "rz", "ux", "uy", "uz", "fx", "fy", "fz", "tan"),
    *("lx", "ly", "lz", "kr", "kg", "kb", "soft"),
    *("floor_r", "floor_g", "floor_b", "back_r", "back_g", "back_b", "amb_r", "amb_g", "amb_b"),
    *("hx", "hy", "tx", "ty"),  # viewing direction along the floor, and the point looked at
)
OBJECT_FIELDS = (
    *("cx", "cy", "cz", "cos", "sin", "scale", "inverse", "bound", "shape", "r", "g", "b", "metal"),
    *(
        "u0",
        "u1",
        "v0",
        "v1",
        "s0",
        "s1",
        "w0",
        "w1",
    ),  # picture boxes: of the object, and of its shadow on the floor
)
SHOT = {name: k for k, name in enumerate(SHOT_FIELDS)}
OBJ = {name: k for k, name in enumerate(OBJECT_FIELDS)}


@dataclass(frozen=True)
class Shots:
    """shots: (fields, S); objects: (fields, S * slots), absent objects having a negative bound."""

    shots: Tensor
    objects: Tensor
    slots: int

    def __len__(self) -> int:
        return self.shots.shape[1]


def pack(shots: list[tuple[Scene, float]], device: torch.device) -> Shots:
    """Tables for (scene, seconds) pairs. All trigonometry happens here, in Python's double precision."""
    slots = max((len(scene.objects) for scene, _ in shots), default=0)
    rows: list[tuple[float, ...]] = []
    objects: list[tuple[float, ...]] = []
    blank = [0.0] * len(OBJECT_FIELDS)
    blank[OBJ["cz"]], blank[OBJ["bound"]], blank[OBJ["inverse"]] = -1e4, -1.0, 1.0
    absent = tuple(blank)
    for scene, seconds in shots:
        camera, light, floor = scene.camera.at(seconds), scene.light, scene.floor
        position, right, up, forward = camera.axes()
        tangent = math.tan(camera.fov / 2)
        view = (position, right, up, forward, tangent)
        heading = (math.sin(camera.azimuth), math.cos(camera.azimuth))
        to_light = light.direction()
        rows.append(
            (
                *(*position, *right, *up, *forward, tangent, *to_light, *light.color, light.softness),
                *(*floor.color, *floor.backdrop, *floor.ambient, *heading, *camera.target[:2]),
            )
        )
        for obj in scene.objects:
            x, y, z, yaw = obj.at(seconds)
            scale = obj.radius
            bound = BOUND[obj.shape] * scale
            albedo = [min(a * t, 1.0) for a, t in zip(ALBEDO[obj.color], obj.tint, strict=True)]
            reach = z / to_light[2]
            shadow = (x - to_light[0] * reach, y - to_light[1] * reach, 0.0)
            spread = bound / to_light[2] + light.softness * (reach + bound) * 1.1 + 0.05
            wide = HALF_WIDTH[obj.shape] * scale
            body = _box(view, (_disc(x, y, 0.0, wide), _disc(x, y, 2 * z, wide)))
            ring = _disc(x, y, 0.0, wide + 0.6 * scale)
            cast = _box(view, (_disc(shadow[0], shadow[1], 0.0, spread), ring))
            turned = (math.cos(yaw), math.sin(yaw), scale, 1 / scale, bound, float(SHAPES.index(obj.shape)))
            objects.append((x, y, z, *turned, *albedo, float(obj.material == "metal"), *body, *cast))
        objects.extend([absent] * (slots - len(scene.objects)))
    shot_table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(SHOT_FIELDS))
    object_table = torch.tensor(objects, dtype=torch.float64).reshape(-1, len(OBJECT_FIELDS))
    return Shots(
        shot_table.T.to(device, torch.float32).contiguous(),
        object_table.T.to(device, torch.float32).contiguous(),
        slots,
    )


_CORNERS = [
    (math.cos(k * math.pi / 4) / math.cos(math.pi / 8), math.sin(k * math.pi / 4) / math.cos(math.pi / 8))
    for k in range(8)
]


def _disc(x: float, y: float, z: float, radius: float) -> list[tuple[float, float, float]]:
    """Corners of an octagon around a level disc."""
    return [(x + radius * a, y + radius * b, z) for a, b in _CORNERS]


def _box(view: tuple, outlines: tuple[list[tuple[float, float, float]], ...]) -> list[float]:
    """Left, right, top and bottom (fractions of the picture) of a box that holds the image of the points."""
    position, right, up, forward, tangent = view
    us, vs = [], []
    for point in (p for outline in outlines for p in outline):
        x, y, z = point[0] - position[0], point[1] - position[1], point[2] - position[2]
        depth = x * forward[0] + y * forward[1] + z * forward[2]
        if depth < 0.2:
            return [0.0, 1.0, 0.0, 1.0]
        scale = 0.5 / (tangent * depth)
        us.append(0.5 + (x * right[0] + y * right[1] + z * right[2]) * scale)
        vs.append(0.5 - (x * up[0] + y * up[1] + z * up[2]) * scale)
    return [min(max(e, 0.0), 1.0) for e in (min(us), max(us), min(vs), max(vs))]
