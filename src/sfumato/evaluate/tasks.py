"""What a model is asked: groups of prompts with the exact meaning of each, after GenEval (Ghosh et al. 2023).

A group is a pure function of (count, seed). All groups keep within what training shows, except those named
held_…, whose colour–shape pairs, relations and counts no training scene contains; each of these mirrors a
group beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from sfumato.errors import InputError
from sfumato.scenes import ObjectClaim, RelationClaim, Statement, phrase
from sfumato.scenes.graph import COLORS, INVERSE, MATERIALS, RELATIONS, SHAPES, SIZES
from sfumato.scenes.splits import HELD_COUNTS, HELD_PAIRS, HELD_RELATIONS

SEEN_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_PAIRS)
_HELD_BOTH_WAYS = {triple for a, r, b in HELD_RELATIONS for triple in ((a, r, b), (b, INVERSE[r], a))}


@dataclass(frozen=True)
class Task:
    """One prompt and what a picture of it must show."""

    prompt: str
    statement: Statement


def task_groups(count: int, seed: int = 0, names: Sequence[str] | None = None) -> dict[str, list[Task]]:
    """`count` tasks in each group (all groups, or those named). Raises `InputError` for an unknown name or a
    count below one."""
    if count < 1:
        raise InputError(f"a group needs at least one prompt, not {count}", argument="per_group")
    for name in names or ():
        if name not in GROUPS:
            raise InputError(f"group {name!r} is unknown; use any of {', '.join(GROUPS)}", argument="groups")
    return {name: _tasks(name, count, seed) for name in GROUPS if names is None or name in names}


def _tasks(name: str, count: int, seed: int) -> list[Task]:
    random = Random(f"{name} {seed}")  # a text seed is hashed with SHA-512: the same on every machine
    tasks: list[Task] = []
    seen: set[Statement] = set()
    while len(tasks) < count:
        for _ in range(50):  # a fresh statement where there is one left
            statement = GROUPS[name](random)
            if statement not in seen:
                break
        seen.add(statement)
        tasks.append(Task(phrase(statement, random.randrange(2**31)), statement))
    return tasks


def single(random: Random) -> Statement:
    """One object: shape and colour, and often material or size."""
    color, shape = random.choice(SEEN_PAIRS)
    extra = random.choice(("material", "size", "both"))
    return _exact(_claim(random, color, shape, extra))


def colors(random: Random) -> Statement:
    """One object: shape and colour."""
    color, shape = random.choice(SEEN_PAIRS)
    return _exact(ObjectClaim(shape=shape, color=color))


def two(random: Random) -> Statement:
    """Two objects of different shapes, nothing else said of them."""
    first, second = random.sample(SHAPES, 2)
    return _exact(ObjectClaim(shape=first), ObjectClaim(shape=second))


def counting(random: Random) -> Statement:
    """Two to five objects of one colour and shape."""
    while True:
        (color, shape), count = random.choice(SEEN_PAIRS), random.randint(2, 5)
        if (color, count) not in HELD_COUNTS:
            return _exact(ObjectClaim(shape=shape, color=color, count=count))


def relations(random: Random) -> Statement:
    """Two coloured objects, one placed by the other."""
    while True:
        first, second = _different(random, 2)
        relation = random.choice(RELATIONS)
        if (first.shape, relation, second.shape) not in _HELD_BOTH_WAYS:
            return _exact(first, second, relations=(RelationClaim(0, relation, 1),))


def binding(random: Random) -> Statement:
    """Two objects that differ in shape and colour, one of them with a material or size as well."""
    first, second = _different(random, 2)
    return _exact(_claim(random, first.color, first.shape, random.choice(("material", "size"))), second)


def three(random: Random) -> Statement:
    """Three objects that all differ in shape and colour."""
    return _exact(*_different(random, 3))


def held_pairs(random: Random) -> Statement:
    """As `colors`, with a colour–shape pair that training never shows."""
    color, shape = random.choice(sorted(HELD_PAIRS))
    return _exact(ObjectClaim(shape=shape, color=color))


def held_binding(random: Random) -> Statement:
    """As `binding`, one of the objects being of a held-out pair."""
    color, shape = random.choice(sorted(HELD_PAIRS))
    while True:
        other_color, other_shape = random.choice(SEEN_PAIRS)
        if other_color != color and other_shape != shape:
            break
    claims = [
        _claim(random, color, shape, random.choice(("material", "size"))),
        ObjectClaim(other_shape, other_color),
    ]
    random.shuffle(claims)
    return _exact(*claims)


def held_relations(random: Random) -> Statement:
    """As `relations`, with a relation between two shapes that training never shows."""
    subject, relation, other = random.choice(sorted(_HELD_BOTH_WAYS))
    while True:
        a, b = random.sample(COLORS, 2)
        if (a, subject) not in HELD_PAIRS and (b, other) not in HELD_PAIRS:
            claims = ObjectClaim(shape=subject, color=a), ObjectClaim(shape=other, color=b)
            return _exact(*claims, relations=(RelationClaim(0, relation, 1),))


def held_counts(random: Random) -> Statement:
    """As `counting`, with so many of a colour as training never shows."""
    color, count = random.choice(sorted(HELD_COUNTS))
    shape = random.choice([s for c, s in SEEN_PAIRS if c == color])
    return _exact(ObjectClaim(shape=shape, color=color, count=count))


GROUPS: dict[str, Callable[[Random], Statement]] = {
    "single": single,
    "colors": colors,
    "two": two,
    "binding": binding,
    "counting": counting,
    "relations": relations,
    "three": three,
    "held_pairs": held_pairs,
    "held_binding": held_binding,
    "held_relations": held_relations,
    "held_counts": held_counts,
}


def _exact(*claims: ObjectClaim, relations: tuple[RelationClaim, ...] = ()) -> Statement:
    return Statement(objects=tuple(claims), relations=relations, exact=True)


def _claim(random: Random, color: str, shape: str, extra: str) -> ObjectClaim:
    material = random.choice(MATERIALS) if extra in ("material", "both") else None
    size = random.choice(SIZES) if extra in ("size", "both") else None
    return ObjectClaim(shape=shape, color=color, material=material, size=size)


def _different(random: Random, count: int) -> tuple[ObjectClaim, ...]:
    while True:
        pairs = tuple(zip(random.sample(COLORS, count), random.sample(SHAPES, count), strict=True))
        if not HELD_PAIRS.intersection(pairs):
            return tuple(ObjectClaim(shape=shape, color=color) for color, shape in pairs)
