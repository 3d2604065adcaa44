"""Random scenes: a pure function of the seed, drawn with the one generator whose stream Python promises to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from sfumato.errors import InputError
from sfumato.scenes.chance import between, pick
from sfumato.scenes.graph import (
    COLORS,
    HALF_HEIGHT,
    HALF_WIDTH,
    MATERIALS,
    MOMENTS,
    RADIUS,
    SHAPES,
    Camera,
    Floor,
    Light,
    Object,
    Scene,
)
from sfumato.scenes.motion import Course, course, moving_camera
from sfumato.scenes.splits import HELD_COUNTS, HELD_PAIRS, HELD_RELATIONS, SPLITS, split_of

Outline = tuple[float, float, float, float, float]  # see `_outline`
COUNT_WEIGHTS = (0.25, 0.37, 0.20, 0.11, 0.07)  # of 1, 2, 3, 4, 5 objects
FRAME_MARGIN = 0.025  # of the picture's side
GAP = 0.28  # world units of free floor between two objects
MIN_VISIBLE = 0.55  # of an object's outline, counted as if every nearer object filled its own
VIEW_HALF_WIDTH = 2.85  # world units from the centre to the picture's edge, at the target's distance
BESIDE = 0.6  # share of resting objects that something passes, where something goes left or right
ATTEMPTS = 4000
_SPIRAL = [
    (math.sqrt((k + 0.5) / 20) * math.cos(2.399963 * k), math.sqrt((k + 0.5) / 20) * math.sin(2.399963 * k))
    for k in range(20)
]


def sample_scene(
    seed: int,
    *,
    split: str = "train",
    objects: tuple[int, int] = (1, 5),
    frames: int = 1,
    fps: float = 8.0,
    plain: float = 0.0,
) -> Scene:
    """The scene of a seed in a split: the same arguments give the same scene, forever.

    objects: fewest and most objects, within 1 … 5; frames > 1 sets some of the objects in motion; plain: share of these
    scenes in which one goes straight ahead and all else, the camera too, stands still. Every object lies
    whole in the picture, apart from the others and mostly visible, in all frames. Raises `InputError`.
    """
    low, high = objects
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}", argument="split")
    if not 1 <= low <= high <= 5:
        raise InputError(f"objects {objects} is not a range within 1 to 5", argument="objects")
    if frames < 1 or (split == "motions" and frames < 2):
        raise InputError(f"frames {frames} is too few for split {split!r}", argument="frames")
    low = max(low, 2 if split in {"relations", "counts"} else 1)
    if low > high:
        raise InputError(f"split {split!r} needs at least two objects", argument="objects")
    random = Random(seed)
    counts = range(low, high + 1)
    count = pick(random, list(counts), [COUNT_WEIGHTS[n - 1] for n in counts])
    bare = plain > 0 and random.random() < plain
    for _ in range(ATTEMPTS):
        camera = _camera(random)
        if frames > 1 and not bare:
            camera = moving_camera(random, camera)
        placed = _place(random, _kinds(random, count, split), camera, split, frames, fps, bare)
        if placed is None:
            continue
        scene = Scene(placed, camera, *_studio(random, camera), frames=frames, fps=fps)
        if split_of(scene) == split:
            return scene
    raise InputError(f"no scene of split {split!r} with {count} objects was found", argument="seed")


def _kinds(random: Random, count: int, split: str) -> list[tuple[str, str, str, str]]:
    """(shape, color, material, size) of each object; held-out content is put in where the split asks for it."""
    large = (0.6, 0.55, 0.5, 0.4, 0.32)[count - 1]
    while True:
        shapes = [pick(random, SHAPES) for _ in range(count)]
        colors = [pick(random, COLORS) for _ in range(count)]
        if split == "pairs":
            colors[0], shapes[0] = pick(random, sorted(HELD_PAIRS))
        elif split == "relations":
            shapes[0], _, shapes[1] = pick(random, HELD_RELATIONS)
        elif split == "counts":
            color, times = pick(random, [held for held in sorted(HELD_COUNTS) if held[1] <= count])
            colors[:times] = [color] * times
        held = sum((c, s) in HELD_PAIRS for c, s in zip(colors, shapes, strict=True))
        counted = any((c, colors.count(c)) in HELD_COUNTS for c in colors)
        if (held > 0) == (split == "pairs") and counted == (split == "counts"):
            break
    materials = [pick(random, MATERIALS) for _ in range(count)]
    sizes = ["large" if random.random() < large else "small" for _ in range(count)]
    return list(zip(shapes, colors, materials, sizes, strict=True))


def _camera(random: Random) -> Camera:
    fov = math.radians(between(random, 29, 39))
    return Camera(
        azimuth=math.radians(between(random, -25, 25)),
        elevation=math.radians(between(random, 27, 40)),
        distance=VIEW_HALF_WIDTH * between(random, 0.97, 1.04) / math.tan(fov / 2),
        fov=fov,
        target=(0.0, 0.0, 0.45),
    )


def _studio(random: Random, camera: Camera) -> tuple[Light, Floor]:
    """Key light from the viewer's upper left or right, warm or cool; a pale floor that never rivals the objects."""
    side = 1 if random.random() < 0.65 else -1  # 1 is the left
    warmth = between(random, -1, 1)
    strength = between(random, 0.92, 1.12)
    key = (strength * (1 + 0.10 * warmth), strength, strength * (1 - 0.13 * warmth))
    light = Light(
        azimuth=camera.azimuth + math.pi + side * math.radians(between(random, 20, 75)),
        elevation=math.radians(between(random, 46, 64)),
        color=key,
        softness=between(random, 0.10, 0.22),
    )
    hue, tint = between(random, 0, 2 * math.pi), between(random, 0.0, 0.085)
    wave = [math.cos(hue - k * 2 * math.pi / 3) for k in range(3)]
    level = between(random, 0.50, 0.74)
    floor = (level * (1 + tint * wave[0]), level * (1 + tint * wave[1]), level * (1 + tint * wave[2]))
    back = level * between(random, 0.62, 1.1)
    cast = (-0.03 * warmth, 0.0, 0.03 * warmth)
    backdrop = (
        back * (1 + 1.6 * tint * wave[0] + cast[0]),
        back * (1 + 1.6 * tint * wave[1] + cast[1]),
        back * (1 + 1.6 * tint * wave[2] + cast[2]),
    )
    sky = between(random, 0.9, 1.1)
    ambient = (sky * (1 - 0.05 * warmth), sky, sky * (1 + 0.07 * warmth))
    return light, Floor(floor, backdrop, ambient)


def _place(
    random: Random,
    kinds: list[tuple[str, str, str, str]],
    camera: Camera,
    split: str,
    frames: int,
    fps: float,
    plain: bool,
) -> tuple[Object, ...] | None:
    """Put the objects on the floor one by one, or None if one finds no place."""
    seconds = (frames - 1) / fps
    ca, sa = math.cos(camera.azimuth), math.sin(camera.azimuth)
    placed: list[Seen] = []
    for shape, color, material, size in kinds:
        radius = RADIUS[size]
        tint = (between(random, 0.94, 1.06), between(random, 0.94, 1.06), between(random, 0.94, 1.06))
        yaw = between(random, 0, 2 * math.pi)
        way = course(random, camera, split, not placed, plain) if frames > 1 else None
        for _ in range(24):
            right, away = between(random, -2.3, 2.3), between(random, -2.2, 2.4)
            if way == Course():
                right = _beside_a_way(random, placed, camera, seconds, right)
            x, y = ca * right + sa * away, -sa * right + ca * away
            obj = Object(shape, color, material, size, (x, y, HALF_HEIGHT[shape] * radius), yaw, tint)
            if way is not None:
                around = _centre(random, placed) if way.turn else None
                obj = way.begin(obj, *(around or (x, y)), seconds)
            if seen := _fitting(obj, placed, camera, seconds):
                placed.append(seen)
                break
        else:
            return None
    return tuple(seen.object for seen in placed)


def _centre(random: Random, placed: list[Seen]) -> tuple[float, float] | None:
    """The place of a resting object to circle around, in two of three cases where there is one."""
    resting = [seen for seen in placed if not seen.object.moves]
    if not resting or random.random() < 1 / 3:
        return None
    return pick(random, resting).object.position[:2]


def _beside_a_way(random: Random, placed: list[Seen], camera: Camera, seconds: float, right: float) -> float:
    """How far to the viewer's right a resting object stands: often where one that crosses the picture passes it."""
    for seen in placed:
        across, away = camera.floor_axes(*seen.object.velocity)
        if abs(across) > abs(away) and random.random() < BESIDE:
            x, y, *_ = seen.object.at(seconds * between(random, 0.2, 0.8))
            return camera.floor_axes(x, y)[0]
    return right


@dataclass(frozen=True)
class Seen:
    """An object with its place (x, y) and its outline at every moment that is looked at."""

    object: Object
    places: list[tuple[float, float]]
    outlines: list[Outline]


def _fitting(obj: Object, others: list[Seen], camera: Camera, seconds: float) -> Seen | None:
    """The object as it is seen, if it stands free of the others, whole in the picture, and hides none too much."""
    moments = [0.0] if seconds == 0 else [seconds * k / (MOMENTS - 1) for k in range(MOMENTS)]
    reach = HALF_WIDTH[obj.shape] * obj.radius
    places = [obj.at(moment)[:2] for moment in moments]
    for other in others:
        apart = reach + HALF_WIDTH[other.object.shape] * other.object.radius + GAP
        for (x, y), (ox, oy) in zip(places, other.places, strict=True):
            if math.hypot(x - ox, y - oy) < apart:
                return None
    outlines = []
    for k, moment in enumerate(moments):
        own = _outline(obj, camera, moment)
        if not (
            own[0] - own[2] > FRAME_MARGIN
            and own[0] + own[2] < 1 - FRAME_MARGIN
            and own[1] - own[3] > FRAME_MARGIN
            and own[1] + own[3] < 1 - FRAME_MARGIN
        ):
            return None
        together = [own, *(other.outlines[k] for other in others)]
        if any(_visible(together, k) < MIN_VISIBLE for k in range(len(together))):
            return None
        outlines.append(own)
    return Seen(obj, places, outlines)


def _outline(obj: Object, camera: Camera, seconds: float) -> Outline:
    """Centre, half width, half height (fractions of the picture) and depth of the ellipse around the object's image."""
    x, y, z, _ = obj.at(seconds)
    camera = camera.at(seconds)
    u, v, depth = camera.project(x, y, z)
    scale = 0.5 / (math.tan(camera.fov / 2) * depth)
    wide = HALF_WIDTH[obj.shape] * obj.radius
    tall = HALF_HEIGHT[obj.shape] * obj.radius
    if obj.shape in {"sphere", "capsule"}:  # round ends: the height adds to the radius of the cap
        high = (tall - wide) * math.cos(camera.elevation) + wide
    else:
        high = tall * math.cos(camera.elevation) + wide * math.sin(camera.elevation)
    return u, v, 1.03 * wide * scale, 1.05 * high * scale, depth


def _visible(outlines: list[Outline], k: int) -> float:
    """Share of outline k not covered by the outlines of nearer objects."""
    u, v, wide, high, depth = outlines[k]
    nearer = [
        o for o in outlines if o[4] < depth and abs(o[0] - u) < o[2] + wide and abs(o[1] - v) < o[3] + high
    ]
    if not nearer:
        return 1.0
    hidden = 0
    for a, b in _SPIRAL:
        pu, pv = u + a * wide, v + b * high
        for o in nearer:
            if ((pu - o[0]) / o[2]) ** 2 + ((pv - o[1]) / o[3]) ** 2 <= 1:
                hidden += 1
                break
    return (len(_SPIRAL) - hidden) / len(_SPIRAL)
