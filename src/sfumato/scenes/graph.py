"""The scene graph: what is in a picture, as plain frozen values that survive JSON.

World axes: x and y span the floor (z = 0), z points up; lengths are in world units (a large object is about 2 across),
angles in radians. "Viewer" axes are the camera's: right, away along the floor, and up.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from sfumato.errors import DataError

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "capsule")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow", "orange", "pink")
MATERIALS = ("metal", "rubber")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "in front of", "behind")
INVERSE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
MOTIONS = (
    "left",
    "right",
    "toward",
    "away",
    "around",
    "up",
)  # around: in a circle; up: up and down on its place
MANNERS = ("rolls", "slides", "bounces", "circles")
CAMERA_MOVES = ("left", "right", "closer", "back")
SPEEDS = ("slow", "fast")

RADIUS = {"small": 0.56, "large": 1.0}  # world units; multiplies a shape's own proportions
HALF_HEIGHT = {"sphere": 0.92, "cube": 0.74, "cylinder": 0.74, "cone": 0.86, "torus": 0.30, "capsule": 0.98}
HALF_WIDTH = {"sphere": 0.92, "cube": 1.047, "cylinder": 0.74, "cone": 0.92, "torus": 0.96, "capsule": 0.50}
SIDE_MARGIN = 0.85  # world units between centres, along the viewer's right, before "left of" may be said
DEPTH_MARGIN = 1.0  # the same along the viewer's depth for "in front of"
Triple = tuple[float, float, float]
FAST = 0.95  # world units per second above which a motion is fast; below STILL it is none
STILL = 0.05
GRAVITY = 6.0  # world units per second²: a bounce of height 0.8 takes a second
MOMENTS = 5  # at which a motion that may not be straight is looked at
PASSED = 0.3  # world units to the viewer's right, on either side, that one object must go beyond another to pass it


@dataclass(frozen=True)
class Object:
    """One solid. position: its centre (x, y, z) as it stands on the floor; velocity: (x, y) per second; spin: radians
    per second.

    orbit: a centre (x, y) on the floor and radians per second around it; a rate of 0 is none. hop: how high it bounces,
    0 for an object that stays on the floor; phase: where in a bounce it begins, a share of it.
    """

    shape: str
    color: str
    material: str
    size: str
    position: Triple
    yaw: float = 0.0
    tint: Triple = (1.0, 1.0, 1.0)
    velocity: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0
    orbit: Triple = (0.0, 0.0, 0.0)
    hop: float = 0.0
    phase: float = 0.0

    @property
    def radius(self) -> float:
        return RADIUS[self.size]

    @property
    def moves(self) -> bool:
        """Whether it leaves its place; turning on it is none."""
        return math.hypot(*self.velocity) >= STILL or self.orbit[2] != 0 or self.hop > 0

    def at(self, seconds: float) -> tuple[float, float, float, float]:
        """Centre x, y, z and yaw after `seconds`."""
        x, y, z = self.position
        if self.orbit[2]:
            cx, cy, rate = self.orbit
            ca, sa = math.cos(rate * seconds), math.sin(rate * seconds)
            x, y = cx + ca * (x - cx) - sa * (y - cy), cy + sa * (x - cx) + ca * (y - cy)
        return (
            x + self.velocity[0] * seconds,
            y + self.velocity[1] * seconds,
            z + self._height(seconds),
            self.yaw + self.spin * seconds,
        )

    def _height(self, seconds: float) -> float:
        """Above where it stands: parabolas, one after the other, as a ball without loss bounces."""
        if self.hop <= 0:
            return 0.0
        u = (seconds / (2 * math.sqrt(2 * self.hop / GRAVITY)) + self.phase) % 1.0
        return 4 * self.hop * u * (1 - u)


@dataclass(frozen=True)
class Camera:
    """Looks at `target` from `distance`, turned by `azimuth` and raised by `elevation`; `fov` is across the picture.

    turn: radians per second that the azimuth grows by; dolly: by which the distance's logarithm grows, per second.
    """

    azimuth: float
    elevation: float
    distance: float
    fov: float
    target: Triple
    turn: float = 0.0
    dolly: float = 0.0

    def at(self, seconds: float) -> Camera:
        """The camera after `seconds`; itself if it stands still."""
        if not (self.turn or self.dolly):
            return self
        return replace(
            self,
            azimuth=self.azimuth + self.turn * seconds,
            distance=self.distance * math.exp(self.dolly * seconds),
        )

    @property
    def move(self) -> str | None:
        """What it does, one of `CAMERA_MOVES`: it travels to the viewer's left or right around the target, or nearer,
        or back; None if it stands still."""
        if abs(self.turn) >= abs(self.dolly):
            return None if not self.turn else ("left" if self.turn > 0 else "right")
        return "closer" if self.dolly < 0 else "back"

    def axes(self) -> tuple[Triple, Triple, Triple, Triple]:
        """Position, and unit vectors right, up and forward."""
        sa, ca = math.sin(self.azimuth), math.cos(self.azimuth)
        se, ce = math.sin(self.elevation), math.cos(self.elevation)
        forward = (ce * sa, ce * ca, -se)
        x, y, z = (t - self.distance * f for t, f in zip(self.target, forward, strict=True))
        return (x, y, z), (ca, -sa, 0.0), (se * sa, se * ca, ce), forward

    def floor_axes(self, x: float, y: float) -> tuple[float, float]:
        """A floor vector as the viewer has it: (right, away)."""
        sa, ca = math.sin(self.azimuth), math.cos(self.azimuth)
        return ca * x - sa * y, sa * x + ca * y

    def project(self, x: float, y: float, z: float) -> Triple:
        """Picture coordinates in [0, 1] (right, down) and depth along the view axis, for a square picture."""
        p, r, u, f = self.axes()
        dx, dy, dz = x - p[0], y - p[1], z - p[2]
        depth = dx * f[0] + dy * f[1] + dz * f[2]
        scale = 0.5 / (math.tan(self.fov / 2) * depth)
        right = dx * r[0] + dy * r[1] + dz * r[2]
        up = dx * u[0] + dy * u[1] + dz * u[2]
        return 0.5 + right * scale, 0.5 - up * scale, depth


@dataclass(frozen=True)
class Light:
    """A far area light: azimuth relative to the world, elevation, linear RGB colour, and angular softness."""

    azimuth: float
    elevation: float
    color: Triple
    softness: float

    def direction(self) -> Triple:
        """Unit vector from the scene to the light."""
        ce = math.cos(self.elevation)
        return ce * math.sin(self.azimuth), ce * math.cos(self.azimuth), math.sin(self.elevation)


@dataclass(frozen=True)
class Floor:
    """Linear RGB of the floor, of the backdrop it fades into, and of the light that falls from all sides."""

    color: Triple
    backdrop: Triple
    ambient: Triple


@dataclass(frozen=True)
class Scene:
    """Everything a picture or clip shows."""

    objects: tuple[Object, ...]
    camera: Camera
    light: Light
    floor: Floor
    frames: int = 1
    fps: float = 8.0

    def times(self) -> list[float]:
        """Seconds at which the frames are taken."""
        return [frame / self.fps for frame in range(self.frames)]


def motion_of(scene: Scene, obj: Object) -> tuple[str, str] | None:
    """(speed, direction of `MOTIONS`) as the viewer sees it, or None for an object at rest."""
    right, away = scene.camera.floor_axes(*obj.velocity)
    speed = math.hypot(right, away)
    if scene.frames < 2 or not obj.moves:
        return None
    if obj.orbit[2]:
        speed = abs(obj.orbit[2]) * math.dist(obj.position[:2], obj.orbit[:2])
        return "fast" if speed >= FAST else "slow", "around"
    if speed < STILL:
        return "slow", "up"
    direction = (
        ("right" if right > 0 else "left") if abs(right) >= abs(away) else ("away" if away > 0 else "toward")
    )
    return "fast" if speed >= FAST else "slow", direction


def manner_of(scene: Scene, obj: Object) -> str | None:
    """How an object moves, one of `MANNERS`: spheres roll and all else slides; None for one at rest."""
    if motion_of(scene, obj) is None:
        return None
    if obj.hop > 0:
        return "bounces"
    if obj.orbit[2]:
        return "circles"
    return "rolls" if obj.shape == "sphere" else "slides"


def camera_move(scene: Scene) -> str | None:
    """What the camera does in a clip, one of `CAMERA_MOVES`, or None."""
    return scene.camera.move if scene.frames > 1 else None


def related(scene: Scene, subject: int, relation: str, other: int) -> bool:
    """Whether the relation holds between two objects by a clear margin, in every frame; "past" and "around" over all of
    them.
    """
    if relation == "past":
        return passes(scene, subject, other)
    if relation == "around":
        orbit, centre = scene.objects[subject].orbit, scene.objects[other].position
        moves = scene.frames > 1 and orbit[2] != 0 and not scene.objects[other].moves
        return moves and math.dist(orbit[:2], centre[:2]) < STILL
    return relation in _relations_of(_offsets(scene, subject, other))


def passes(scene: Scene, subject: int, other: int) -> bool:
    """Whether an object goes to the left or right from one side of a resting one to the other side, as seen."""
    motion = motion_of(scene, scene.objects[subject])
    if motion is None or motion[1] not in ("left", "right") or scene.objects[other].moves:
        return False
    rights = [right for right, _ in _offsets(scene, subject, other)]
    first, last = (rights[0], rights[-1]) if motion[1] == "right" else (-rights[0], -rights[-1])
    return first <= -PASSED and last >= PASSED


def relations(scene: Scene) -> tuple[tuple[int, str, int], ...]:
    """All (subject, relation, object) triples that hold."""
    indices = range(len(scene.objects))
    return tuple(
        (i, r, j) for i in indices for j in indices if i != j for r in _relations_of(_offsets(scene, i, j))
    )


def _offsets(scene: Scene, subject: int, other: int) -> list[tuple[float, float]]:
    """How far right of the other and further away the subject stands, from the first moment to the last."""
    a, b = scene.objects[subject], scene.objects[other]
    offsets = []
    for seconds in moments(scene):
        pa, pb = a.at(seconds), b.at(seconds)
        offsets.append(scene.camera.at(seconds).floor_axes(pa[0] - pb[0], pa[1] - pb[1]))
    return offsets


def moments(scene: Scene) -> list[float]:
    """Seconds at which motion is looked at; the ends alone bound what moves straight."""
    last = scene.times()[-1]
    return [last * k / (MOMENTS - 1) for k in range(MOMENTS)] if scene.frames > 1 else [0.0]


def _relations_of(offsets: list[tuple[float, float]]) -> list[str]:
    """Those of `RELATIONS` that hold at all these offsets, in that order."""
    rights, aways = zip(*offsets, strict=True)
    held = (
        max(rights) <= -SIDE_MARGIN,
        min(rights) >= SIDE_MARGIN,
        max(aways) <= -DEPTH_MARGIN,
        min(aways) >= DEPTH_MARGIN,
    )
    return [relation for relation, holds in zip(RELATIONS, held, strict=True) if holds]


def scene_hash(scene: Scene) -> str:
    """Hash of the meaning alone: the multiset of attributes and motions, and of relations between attributed objects.

    Positions, light, camera and the order of the objects do not enter: two pictures with one hash show the same thing.
    """
    names = [_meaning(scene, o) for o in scene.objects]
    triples = sorted(
        f"{names[i]}>{r}>{names[j]}" for i, r, j in relations(scene) if r in ("left of", "in front of")
    )
    camera = [camera_move(scene)] if camera_move(scene) else []
    return hashlib.sha256("|".join([*sorted(names), "", *triples, *camera]).encode()).hexdigest()


def _meaning(scene: Scene, obj: Object) -> str:
    motion = motion_of(scene, obj)
    moves = () if motion is None else (*motion, *(["bounces"] if obj.hop > 0 else []))
    return " ".join((obj.size, obj.color, obj.material, obj.shape, *moves))


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """Plain JSON values; floats are kept exactly."""
    return asdict(scene)


def scene_from_dict(values: dict[str, Any]) -> Scene:
    """The inverse of `scene_to_dict`. Raises `DataError` for missing fields or words outside the vocabulary."""
    try:
        objects = tuple(Object(**_plain(o)) for o in values["objects"])
        scene = Scene(
            objects,
            Camera(**_plain(values["camera"])),
            Light(**_plain(values["light"])),
            Floor(**_plain(values["floor"])),
            frames=int(values["frames"]),
            fps=float(values["fps"]),
        )
        _check_numbers(asdict(scene))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"this is not a scene graph: {error}") from None
    for obj in objects:
        for name, words in (("shape", SHAPES), ("color", COLORS), ("material", MATERIALS), ("size", SIZES)):
            if getattr(obj, name) not in words:
                raise DataError(f"{name} {getattr(obj, name)!r} is unknown; use one of {', '.join(words)}")
    return scene


def scene_to_json(scene: Scene) -> str:
    return json.dumps(scene_to_dict(scene))


def scene_from_json(text: str) -> Scene:
    try:
        return scene_from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise DataError(f"this is not a scene graph: {error}") from None


_LENGTHS = {
    "position": 3,
    "tint": 3,
    "velocity": 2,
    "orbit": 3,
    "target": 3,
    "color": 3,
    "backdrop": 3,
    "ambient": 3,
}


def _check_numbers(values: dict[str, Any]) -> None:
    """Raise `ValueError` unless every number of the graph is finite and every vector has its length."""
    if values["frames"] < 1 or not values["fps"] > 0:
        raise ValueError("frames and fps must be positive")
    for part in (*values["objects"], values["camera"], values["light"], values["floor"]):
        for name, value in part.items():
            if name in {"shape", "material", "size"} or (name == "color" and isinstance(value, str)):
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            if len(numbers) != _LENGTHS.get(name, 1) or not all(map(math.isfinite, numbers)):
                raise ValueError(f"{name} cannot be {value!r}")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(float(x) for x in v) if isinstance(v, list | tuple) else v for k, v in values.items()}
