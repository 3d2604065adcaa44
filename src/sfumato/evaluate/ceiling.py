"""What the detectors themselves can score: real renders of what is asked (the ceiling), and of something else
(the floor).

A score of a model means something only between these two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.evaluate.degrade import degrade
from sfumato.evaluate.detect import SIDE, Detector
from sfumato.evaluate.score import score
from sfumato.evaluate.tasks import Task, task_groups
from sfumato.scenes import ObjectClaim, RelationClaim, Statement
from sfumato.scenes.graph import (
    COLORS,
    HALF_HEIGHT,
    HALF_WIDTH,
    MATERIALS,
    RADIUS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    related,
    relations,
)
from sfumato.scenes.render import render
from sfumato.scenes.sample import FRAME_MARGIN, GAP, sample_scene

TRIES = 4000
CLEAR = 0.75  # share of an object's picture that no nearer object may hide in a scene made to order
# Scenes of the ceiling. A detector is trained on seeds far below, models on hashes of 63 bits that meet these by no
# likely chance.
CHECK_SEED = 900_000_000


def scene_of(statement: Statement, seed: int) -> Scene:
    """A scene that shows exactly what is stated; what is left open is drawn at random. Raises `InputError` if
    none is found.

    A sampled scene lends its camera, light, floor and places; the claimed objects take the places in random order.
    """
    random = Random(seed)
    claims = [(i, claim) for i, claim in enumerate(statement.objects) for _ in range(claim.count)]
    if not 1 <= len(claims) <= 5:
        raise InputError(f"a scene holds 1 to 5 objects, not {len(claims)}", argument="statement")
    for _ in range(TRIES):
        base = sample_scene(random.randrange(2**40), objects=(len(claims), len(claims)))
        objects = tuple(
            _filled(claim, place, random) for (_, claim), place in zip(claims, base.objects, strict=True)
        )
        scene = replace(base, objects=objects)
        slots = [i for i, _ in claims]
        if _stands_free(scene) and all(_shown(scene, slots, relation) for relation in statement.relations):
            return scene
    raise InputError(f"no scene was found that shows {statement}", argument="statement")


def _filled(claim: ObjectClaim, place: Object, random: Random) -> Object:
    shape = claim.shape or random.choice(SHAPES)
    size = claim.size or random.choice(SIZES)
    position = (*place.position[:2], HALF_HEIGHT[shape] * RADIUS[size])
    color, material = claim.color or random.choice(COLORS), claim.material or random.choice(MATERIALS)
    return replace(place, shape=shape, size=size, color=color, material=material, position=position)


def _shown(scene: Scene, slots: Sequence[int], relation: RelationClaim) -> bool:
    subjects = [k for k, slot in enumerate(slots) if slot == relation.subject]
    others = [k for k, slot in enumerate(slots) if slot == relation.object]
    return all(related(scene, a, relation.relation, b) for a in subjects for b in others)


def _stands_free(scene: Scene) -> bool:
    """Whether all objects lie inside the frame, apart from each other, and none hides much of another."""
    reach = [HALF_WIDTH[o.shape] * o.radius for o in scene.objects]
    for i, a in enumerate(scene.objects):
        for j, b in enumerate(scene.objects[:i]):
            if math.dist(a.position[:2], b.position[:2]) < reach[i] + reach[j] + GAP:
                return False
    boxes = [_box(scene, o) for o in scene.objects]
    if any(min(x0, y0, 1 - x1, 1 - y1) < FRAME_MARGIN for x0, y0, x1, y1, _ in boxes):
        return False
    return all(_hidden(box, [o for o in boxes if o[4] < box[4]]) <= 1 - CLEAR for box in boxes)


def _box(scene: Scene, obj: Object) -> tuple[float, float, float, float, float]:
    """Left, top, right, bottom of an object's picture (0..1), and its depth."""
    x, y, z = obj.position
    u, v, depth = scene.camera.project(x, y, z)
    scale = 0.5 / (math.tan(scene.camera.fov / 2) * depth)
    wide, tall = HALF_WIDTH[obj.shape] * obj.radius, HALF_HEIGHT[obj.shape] * obj.radius
    if obj.shape in {"sphere", "capsule"}:
        high = (tall - wide) * math.cos(scene.camera.elevation) + wide
    else:
        high = tall * math.cos(scene.camera.elevation) + wide * math.sin(scene.camera.elevation)
    return u - wide * scale, v - high * scale, u + wide * scale, v + high * scale, depth


def _hidden(box: tuple[float, ...], nearer: Sequence[tuple[float, ...]]) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    shared = 0.0
    for other in nearer:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        shared += max(wide, 0.0) * max(high, 0.0)
    return shared / area


def complete(scene: Scene) -> Statement:
    """Everything that can be said of a scene: all attributes of all objects, all relations, and that there is
    no more."""
    claims = tuple(
        ObjectClaim(shape=o.shape, color=o.color, material=o.material, size=o.size) for o in scene.objects
    )
    links = tuple(RelationClaim(a, relation, b) for a, relation, b in relations(scene))
    return Statement(objects=claims, relations=links, exact=True)


def pictures(scenes: Sequence[Scene], size: int = SIDE, batch: int = 8) -> Tensor:
    """Renders as (B, 3, size, size) in [-1, 1], rounded to the 8 bits of a saved picture."""
    parts = [render(scenes[i : i + batch], size=size).rgb[:, :, 0] for i in range(0, len(scenes), batch)]
    return (torch.cat(parts) * 255).round() / 127.5 - 1


def bounds(
    detectors: Sequence[Detector], groups: dict[str, list[Task]], *, size: int = SIDE, seed: int = CHECK_SEED
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Strict scores of real renders by group and detector: {"ceiling": their own prompts, "floor": the next
    prompt's}.

    Pictures are rendered at the model's `size`, so that the ceiling is that of what the model can show.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, tasks in groups.items():
        shown = pictures([scene_of(task.statement, seed + i) for i, task in enumerate(tasks)], size)
        found[name] = {}
        for detector in detectors:
            seen = detector.detect(shown)
            own = [score(d, task.statement).strict for d, task in zip(seen, tasks, strict=True)]
            other = [score(d, task.statement).strict for d, task in zip(seen, swapped(tasks), strict=True)]
            found[name][detector.name] = {"ceiling": own, "floor": other}
    return found


def swapped(tasks: Sequence[Task]) -> list[Task]:
    """For each task another task of the group that states something else (its own when the group states one
    thing only)."""
    result = []
    for i, task in enumerate(tasks):
        others = (tasks[(i + k) % len(tasks)] for k in range(1, len(tasks)))
        result.append(next((other for other in others if other.statement != task.statement), task))
    return result


def ceiling_card(detector: Detector, count: int, seed: int = CHECK_SEED) -> dict[str, dict[str, float]]:
    """What goes on a detector's card: complete scene scores of unseen scenes, sharp and damaged, and strict
    group scores."""
    card: dict[str, dict[str, float]] = {}
    for split in ("val", "pairs"):
        scenes = [sample_scene(seed + i, split=split) for i in range(count)]
        sharp = pictures(scenes)
        small = torch.nn.functional.interpolate(sharp, scale_factor=0.5, mode="area")
        soft = degrade(sharp, torch.Generator().manual_seed(seed), strength=0.5)
        for kind, shown in (("sharp", sharp), ("at 64 pixels", small), ("damaged", soft)):
            scores = [score(d, complete(s)) for d, s in zip(detector.detect(shown), scenes, strict=True)]
            names = ("strict", "count", "shape", "color", "material", "size", "relation")
            values = {n: [v for s in scores if (v := getattr(s, n)) is not None] for n in names}
            card[f"{split}, {kind}"] = {n: round(sum(v) / max(1, len(v)), 4) for n, v in values.items()}
    groups = bounds([detector], task_groups(max(1, count // 5), seed), seed=seed)
    for bound in ("ceiling", "floor"):
        values = {name: found[detector.name][bound] for name, found in groups.items()}
        card[bound] = {name: round(sum(v) / len(v), 4) for name, v in values.items()}
    return card
