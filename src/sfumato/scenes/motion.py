"""Scenes in motion: how objects and the camera go, where everything is at every frame, and where each pixel goes.

Objects slide or roll straight ahead, bounce on their place or on their way, or circle around a point or a resting
object; the camera may travel around the scene, nearer or back. What moves never touches what it meets: positions are
checked at all moments when a scene is drawn (`sample.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from sfumato.scenes.chance import between, pick
from sfumato.scenes.graph import MOTIONS, SPEEDS, Camera, Object, Scene, Triple
from sfumato.scenes.render import Render
from sfumato.scenes.splits import HELD_MOTIONS

SPEED = {"slow": (0.4, 0.7), "fast": (1.1, 1.5)}  # world units per second
STRAIGHT = MOTIONS[:4]
REST = (0.12, 0.55)  # share of first objects, and of others, that stay where they are
KINDS = {"straight": 0.72, "bounce": 0.12, "orbit": 0.16}  # of objects that move
HOPPING = 0.2  # share of those that go straight on which bounce on their way
HOP = (0.35, 1.0)  # world units that they leave the floor by
ORBIT = (0.9, 1.5)  # world units from the centre
RATE = (0.5, 1.5)  # radians per second
CAMERA = 0.2  # share of clips in which the camera moves
TURN, DOLLY = (0.12, 0.3), (0.08, 0.18)  # radians, and logarithms of the distance, per second


@dataclass(frozen=True)
class Course:
    """How one object goes. velocity: on the floor, per second; turn: radians per second around a point that lies `away`
    of the object, (x, y) on the floor; hop and phase as of `Object`."""

    velocity: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0
    away: tuple[float, float] = (0.0, 0.0)
    hop: float = 0.0
    phase: float = 0.0

    def begin(self, obj: Object, x: float, y: float, seconds: float) -> Object:
        """The object on this course, in the middle of a clip of `seconds` at (x, y), or with (x, y) as its centre."""
        z = obj.position[2]
        if self.turn:
            place = (x - self.away[0], y - self.away[1], z)
            return replace(obj, position=place, orbit=(x, y, self.turn), hop=self.hop, phase=self.phase)
        u, v = self.velocity
        place = (x - u * seconds / 2, y - v * seconds / 2, z)
        return replace(obj, position=place, velocity=self.velocity, hop=self.hop, phase=self.phase)


def course(random: Random, camera: Camera, split: str, first: bool, plain: bool = False) -> Course:
    """How an object goes; of the split "motions" the first one goes as no training clip shows. Of a plain scene the
    first one goes straight ahead on the floor, and no other moves."""
    forced = first and split == "motions"
    if plain:
        return _straight(random, camera, forced) if first else Course()
    if not forced and random.random() < REST[0 if first else 1]:
        return Course()
    kind = "straight" if forced else pick(random, list(KINDS), list(KINDS.values()))
    if kind == "bounce":
        return Course(hop=between(random, *HOP), phase=random.random())
    if kind == "orbit":
        angle, radius = between(random, 0, 2 * math.pi), between(random, *ORBIT)
        turn = between(random, *RATE) * pick(random, (-1, 1))
        return Course(turn=turn, away=(radius * math.cos(angle), radius * math.sin(angle)))
    straight = _straight(random, camera, forced)
    if forced or random.random() >= HOPPING:
        return straight
    return replace(straight, hop=between(random, *HOP), phase=random.random())


def _straight(random: Random, camera: Camera, held: bool) -> Course:
    """Straight ahead; `held`: as fast, in such a direction, as no training clip shows."""
    choices = [(s, d) for s in SPEEDS for d in STRAIGHT]
    pace, direction = pick(random, [c for c in choices if (c in HELD_MOTIONS) == held])
    speed, slant = between(random, *SPEED[pace]), between(random, -0.3, 0.3)
    right, away = {"left": (-1, slant), "right": (1, slant), "toward": (slant, -1), "away": (slant, 1)}[
        direction
    ]
    scale = speed / math.hypot(right, away)
    ca, sa = math.cos(camera.azimuth), math.sin(camera.azimuth)
    return Course(((ca * right + sa * away) * scale, (-sa * right + ca * away) * scale))


def moving_camera(random: Random, camera: Camera) -> Camera:
    """The camera, perhaps set in motion."""
    if random.random() >= CAMERA:
        return camera
    sign = pick(random, (-1, 1))
    if random.random() < 0.5:
        return replace(camera, turn=sign * between(random, *TURN))
    return replace(camera, dolly=sign * between(random, *DOLLY))


def tracks(scene: Scene) -> Tensor:
    """(T, O, 3) float64: where the centre of every object is in each frame: right and down in [0, 1] of the picture,
    and depth along the view axis."""
    rows = []
    for seconds in scene.times():
        camera = scene.camera.at(seconds)
        rows.append([camera.project(*obj.at(seconds)[:3]) for obj in scene.objects])
    return torch.tensor(rows, dtype=torch.float64).reshape(scene.frames, len(scene.objects), 3)


def paths(scene: Scene) -> Tensor:
    """(T, O, 2) float64: the objects' places on the floor in each frame, right and away as the viewer has them, from
    the point that the camera looks at."""
    rows = []
    for seconds in scene.times():
        camera, (tx, ty, _) = scene.camera.at(seconds), scene.camera.target
        places = [obj.at(seconds) for obj in scene.objects]
        rows.append([camera.floor_axes(x - tx, y - ty) for x, y, *_ in places])
    return torch.tensor(rows, dtype=torch.float64).reshape(scene.frames, len(scene.objects), 2)


def flow(scenes: Sequence[Scene], made: Render) -> Tensor:
    """(B, 2, T − 1, H, W) float32: pixels that what is seen at each pixel moves right and down until the next frame.

    Exact for solids and floor, by geometry; shadows and reflections move otherwise. A rolling ball's skin, which is of
    one colour, is taken to slide.
    """
    B, T, H, W = made.depth.shape
    flows = torch.zeros(B, 2, T - 1, H, W)
    line_x, line_y = ((torch.arange(n, dtype=torch.float64) + 0.5) * (2 / n) - 1 for n in (W, H))
    for b, scene in enumerate(scenes):
        times = scene.times()
        for t in range(T - 1):
            now, then = scene.camera.at(times[t]), scene.camera.at(times[t + 1])
            depth = made.depth[b, t].double().cpu()
            point = _unprojected(now, line_x, line_y, depth)  # (3, H, W)
            inst = made.instances[b, t].cpu()
            for k, obj in enumerate(scene.objects):
                mine = inst == k + 1
                if mine.any():
                    point[:, mine] = _carried(obj, times[t], times[t + 1], point[:, mine])
            u, v = _projected(then, point)
            flows[b, 0, t] = ((u - (line_x[None, :] + 1) / 2) * W).float()
            flows[b, 1, t] = ((v - (line_y[:, None] + 1) / 2) * H).float()
    return flows


def _vector(values: Triple) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _unprojected(camera: Camera, x: Tensor, y: Tensor, depth: Tensor) -> Tensor:
    """World points (3, H, W) at `depth` (H, W) along the view axis, behind pixels at x (W,), y (H,) in [-1, 1]."""
    position, right, up, forward = (_vector(axis) for axis in camera.axes())
    tangent = math.tan(camera.fov / 2)
    ray = forward + right * (x * tangent)[None, None, :] - up * (y * tangent)[None, :, None]
    return position + ray * depth


def _projected(camera: Camera, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where world points (3, H, W) are in the picture, (H, W) each: right and down in [0, 1]."""
    position, right, up, forward = (_vector(axis) for axis in camera.axes())
    d = point - position
    depth = (d * forward).sum(0)
    scale = 0.5 / (math.tan(camera.fov / 2) * depth)
    return 0.5 + (d * right).sum(0) * scale, 0.5 - (d * up).sum(0) * scale


def _carried(obj: Object, before: float, after: float, points: Tensor) -> Tensor:
    """Where points (3, N) of an object are later: moved and turned with it."""
    x, y, z, yaw = obj.at(before)
    u, v, w, later = obj.at(after)
    ca, sa = math.cos(later - yaw), math.sin(later - yaw)
    dx, dy = points[0] - x, points[1] - y
    return torch.stack([u + ca * dx - sa * dy, v + sa * dx + ca * dy, points[2] + (w - z)])
