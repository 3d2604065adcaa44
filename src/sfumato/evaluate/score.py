"""Does a picture show what its prompt states? Detections are matched to claims, then every claim is checked.

The matching is exact: among all one-to-one assignments of claimed objects to detected ones it takes the one
under which most stated attributes and relations hold, so that a picture is never failed because of an unlucky
pairing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfumato.evaluate.detect import Detection, relation_holds

if TYPE_CHECKING:
    from sfumato.scenes import ObjectClaim, RelationClaim, Statement

ATTRIBUTES = ("shape", "color", "material", "size")
COLUMNS = ("strict", "count", *ATTRIBUTES, "relation")


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1]; None where the statement says nothing of the kind. `strict` is 0 or 1."""

    strict: float
    count: float
    shape: float | None
    color: float | None
    material: float | None
    size: float | None
    relation: float | None


def score(detections: Sequence[Detection], statement: Statement) -> Score:
    """Compare what was detected in one picture with what was stated about it.

    - count: 1 when the number of objects is right. Under `exact` that is the number of claimed objects,
      otherwise no fewer. A claim of several ("three cones") means that many and no more: with further objects
      that fit it the count is wrong.
    - shape, color, material, size: share of the claimed objects that state one whose matched detection shows it;
      a claimed object without a detection shows nothing.
    - relation: share of stated relations that hold between the matched objects (all copies of a plural claim).
    - strict: 1 when all of the above are 1.
    """
    slots = [index for index, claim in enumerate(statement.objects) for _ in range(claim.count)]
    matched = match(detections, statement)
    count = float(_count_holds(detections, statement, len(slots)))
    shares: dict[str, float | None] = {}
    for name in ATTRIBUTES:
        stated = [(getattr(statement.objects[s], name), d) for s, d in zip(slots, matched, strict=True)]
        hits = [
            d is not None and getattr(detections[d], name) == value
            for value, d in stated
            if value is not None
        ]
        shares[name] = sum(hits) / len(hits) if hits else None
    held = [_held(relation, slots, matched, detections) for relation in statement.relations]
    shares["relation"] = sum(held) / len(held) if held else None
    strict = count == 1.0 and all(value in (None, 1.0) for value in shares.values())
    return Score(strict=float(strict), count=count, **shares)


def fits(detection: Detection, claim: ObjectClaim) -> bool:
    """Whether the detection shows every attribute the claim states; what it leaves open is free."""
    return all(getattr(claim, name) in (None, getattr(detection, name)) for name in ATTRIBUTES)


def match(detections: Sequence[Detection], statement: Statement) -> list[int | None]:
    """For each claimed object, copies in a row, the index of its detection or None. The best assignment, by
    branch and bound.

    The value of an assignment is its number of true attributes and relations, plus one for each claimed object
    that found a fully fitting detection, so that one right object and one wrong are preferred to two halves.
    """
    claims = [claim for claim in statement.objects for _ in range(claim.count)]
    slots = [index for index, claim in enumerate(statement.objects) for _ in range(claim.count)]
    values = [[_value(detection, claim) for detection in detections] for claim in claims]
    ahead = [0.0] * (len(slots) + 1)  # the most that the slots from here on could add
    for i in reversed(range(len(slots))):
        ahead[i] = ahead[i + 1] + max(values[i], default=0.0)
    relations = statement.relations
    closed_at = [
        max((i for i, s in enumerate(slots) if s in (r.subject, r.object)), default=-1) for r in relations
    ]
    best_value, best = -1.0, [None] * len(slots)
    budget = (
        200_000  # states; far above what five objects need, a bound for pictures full of false detections
    )

    def visit(
        i: int, value: float, taken: frozenset[int], chosen: list[int | None], open_relations: int
    ) -> None:
        nonlocal best_value, best, budget
        budget -= 1
        if value + ahead[i] + open_relations <= best_value or budget < 0:
            return
        if i == len(slots):
            best_value, best = value, list(chosen)
            return
        options = sorted((d for d in range(len(detections)) if d not in taken), key=lambda d: -values[i][d])
        spare = len(slots) > len(detections)
        for d in [*options, *([None] if spare or not options else [])]:
            chosen.append(d)
            closing = [r for r, at in zip(relations, closed_at, strict=True) if at == i]
            gain = sum(_held(r, slots[: i + 1], chosen, detections) for r in closing)
            worth = 0.0 if d is None else values[i][d]
            visit(
                i + 1,
                value + worth + gain,
                taken | {d} if d is not None else taken,
                chosen,
                open_relations - len(closing),
            )
            chosen.pop()

    visit(0, 0.0, frozenset(), [], len(relations))
    return best


def _value(detection: Detection, claim: ObjectClaim) -> float:
    stated = [name for name in ATTRIBUTES if getattr(claim, name) is not None]
    hits = sum(getattr(detection, name) == getattr(claim, name) for name in stated)
    return hits + float(hits == len(stated)) + 0.01  # the last term prefers any detection to none


def _held(
    relation: RelationClaim,
    slots: Sequence[int],
    matched: Sequence[int | None],
    detections: Sequence[Detection],
) -> bool:
    """Whether a relation holds between every copy of its subject and every copy of its object."""
    subjects = [d for s, d in zip(slots, matched, strict=True) if s == relation.subject]
    objects = [d for s, d in zip(slots, matched, strict=True) if s == relation.object]
    return bool(subjects and objects) and all(
        a is not None and b is not None and relation_holds(relation.relation, detections[a], detections[b])
        for a in subjects
        for b in objects
    )


def _count_holds(detections: Sequence[Detection], statement: Statement, claimed: int) -> bool:
    if statement.exact and len(detections) != claimed:
        return False
    plural = [claim for claim in statement.objects if claim.count > 1]
    return len(detections) >= claimed and all(sum(fits(d, c) for d in detections) <= c.count for c in plural)
