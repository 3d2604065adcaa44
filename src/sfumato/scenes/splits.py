"""Which scenes training may see. A split is a property of the scene graph, so no seed can leak from one to another.

`train` and `val` share a distribution and are told apart by the hash of the graph. The other splits hold what neither
contains: colour-shape pairs (after CLEVR-CoGenT), relations between shapes, counts of a colour, speeds in a direction.
"""

from __future__ import annotations

from sfumato.scenes.graph import Scene, motion_of, relations, scene_hash

HELD_PAIRS = frozenset(
    {
        ("brown", "sphere"),
        ("purple", "cube"),
        ("cyan", "cylinder"),
        ("orange", "cone"),
        ("pink", "torus"),
        ("gray", "capsule"),
    }
)
HELD_RELATIONS = (  # (subject shape, relation, object shape); the inverse statement is held out with it
    ("cone", "left of", "cylinder"),
    ("capsule", "in front of", "sphere"),
    ("torus", "behind", "cube"),
)
HELD_COUNTS = frozenset({("green", 2), ("yellow", 3)})  # exactly so many objects of the colour
HELD_MOTIONS = frozenset({("fast", "left"), ("slow", "away")})
SPLITS = ("train", "val", "pairs", "relations", "counts", "motions")
VAL_BUCKETS = 1  # of 16


def novelties(scene: Scene) -> frozenset[str]:
    """The held-out splits whose content the scene shows."""
    found = set()
    if any((o.color, o.shape) in HELD_PAIRS for o in scene.objects):
        found.add("pairs")
    colors = [o.color for o in scene.objects]
    if any((c, colors.count(c)) in HELD_COUNTS for c in colors):
        found.add("counts")
    if any(motion_of(scene, o) in HELD_MOTIONS for o in scene.objects):
        found.add("motions")
    shapes = [o.shape for o in scene.objects]
    if any(shapes.count(a) and shapes.count(b) for a, _, b in HELD_RELATIONS):
        held = {(shapes[i], r, shapes[j]) for i, r, j in relations(scene)}
        if held.intersection(HELD_RELATIONS):
            found.add("relations")
    return frozenset(found)


def split_of(scene: Scene) -> str:
    """The split a scene belongs to, or "mixed" if it shows more than one held-out thing (no split yields those)."""
    found = novelties(scene)
    if found:
        return next(iter(found)) if len(found) == 1 else "mixed"
    return "val" if int(scene_hash(scene)[:8], 16) % 16 < VAL_BUCKETS else "train"
