"""Scoring: what a statement asks, checked on detections written by hand and against exhaustive search."""

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.evaluate.detect import Detection, relation_holds
from sfumato.evaluate.score import ATTRIBUTES, fits, match, score
from sfumato.scenes import ObjectClaim, RelationClaim, Statement, describe, holds, sample_scene
from sfumato.scenes.graph import RELATIONS


def seen(words: str, right: float = 0.0, away: float = 0.0) -> Detection:
    size, color, material, shape = words.split()
    return Detection(shape, color, material, size, 0.5, 0.5, right, away, (0.4, 0.4, 0.6, 0.6), 0.9)


def claim(shape=None, color=None, material=None, size=None, count=1) -> ObjectClaim:
    return ObjectClaim(shape=shape, color=color, material=material, size=size, count=count)


def state(*objects, relations=(), exact=True) -> Statement:
    return Statement(objects=tuple(objects), relations=tuple(relations), exact=exact)


RED_CUBE, BLUE_BALL = seen("large red metal cube", -1.0), seen("small blue rubber sphere", 1.0, 2.0)


def test_everything_right():
    result = score([RED_CUBE, BLUE_BALL], state(claim("sphere", "blue"), claim("cube", "red", size="large")))
    assert (result.strict, result.count, result.shape, result.color, result.size) == (1, 1, 1, 1, 1)
    assert result.material is None and result.relation is None


def test_swapped_colours_are_half_right_and_not_strict():
    result = score([RED_CUBE, BLUE_BALL], state(claim("cube", "blue"), claim("sphere", "red")))
    assert result.strict == 0 and result.count == 1
    assert (
        result.shape + result.color == 1.0
    )  # whichever way they are paired, one of the two attributes is wrong


def test_one_more_object_fails_exact_and_not_partial():
    asked = claim("cube", "red")
    assert score([RED_CUBE, BLUE_BALL], state(asked)).strict == 0
    assert score([RED_CUBE, BLUE_BALL], state(asked, exact=False)).strict == 1


def test_a_missing_object_shows_nothing():
    result = score([RED_CUBE], state(claim("cube", "red"), claim("sphere", "blue"), exact=False))
    assert (result.strict, result.count, result.shape, result.color) == (0, 0, 0.5, 0.5)
    nothing = score([], state(claim("cube", "red")))
    assert (nothing.strict, nothing.count, nothing.shape) == (0, 0, 0)


def test_counts_are_exact_even_in_partial_statements():
    cones = [seen("small red rubber cone", k) for k in range(4)]
    three = state(claim("cone", count=3), exact=False)
    assert score(cones[:3], three).strict == 1
    assert score([*cones[:3], BLUE_BALL], three).strict == 1
    assert score(cones, three).strict == 0 and score(cones, three).count == 0
    assert score([*cones[:3], BLUE_BALL], state(claim("cone", count=3))).strict == 0


def test_the_pairing_that_satisfies_the_relation_is_found():
    left, right = seen("small red metal sphere", -2.0), seen("small red metal sphere", 2.0)
    cube = seen("large blue metal cube", 0.0)
    asked = state(
        claim("sphere", "red"), claim("cube"), relations=[RelationClaim(0, "right of", 1)], exact=False
    )
    for order in permutations([left, right, cube]):
        assert score(order, asked).strict == 1
    assert score([left, cube], asked).strict == 0 and score([left, cube], asked).relation == 0


def test_a_relation_of_a_plural_claim_holds_for_every_copy():
    cones = [seen("small red rubber cone", x) for x in (-2.0, -1.5)]
    cube = seen("large blue metal cube", 0.0)
    asked = state(claim("cone", count=2), claim("cube"), relations=[RelationClaim(0, "left of", 1)])
    assert score([*cones, cube], asked).strict == 1
    assert score([cones[0], seen("small red rubber cone", 2.0), cube], asked).strict == 0


@pytest.mark.parametrize(("relation", "opposite"), [("left of", "right of"), ("in front of", "behind")])
def test_relations_exclude_their_opposites_and_need_a_margin(relation, opposite):
    near, far = seen("small red metal cube", -1.0, -1.0), seen("small red metal cube", 1.0, 1.0)
    assert relation_holds(relation, near, far) and relation_holds(opposite, far, near)
    assert not relation_holds(relation, far, near) and not relation_holds(opposite, near, far)
    close = seen("small red metal cube", -0.8, -0.8)
    assert not relation_holds(relation, near, close) and not relation_holds(opposite, near, close)
    with pytest.raises(InputError):
        relation_holds("above", near, far)


shapes, colors = st.sampled_from(["cube", "sphere"]), st.sampled_from(["red", "blue"])
detections = st.lists(
    st.builds(
        lambda s, c, x, y: seen(f"small {c} metal {s}", x, y),
        shapes,
        colors,
        st.integers(-2, 2),
        st.integers(-2, 2),
    ),
    max_size=5,
)
claims = st.lists(st.builds(claim, st.none() | shapes, st.none() | colors), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(detections, claims, st.data())
def test_the_match_is_the_best_of_all(found, asked, data):
    index = st.integers(0, len(asked) - 1)
    links = data.draw(
        st.lists(st.builds(RelationClaim, index, st.sampled_from(RELATIONS), index), max_size=3)
    )
    links = [r for r in links if r.subject != r.object]
    statement = state(*asked, relations=links)

    def value(chosen):
        total = 0.0
        for d, c in zip(chosen, asked, strict=True):
            if d is not None:
                total += sum(
                    getattr(c, n) is not None and getattr(c, n) == getattr(found[d], n) for n in ATTRIBUTES
                )
                total += fits(found[d], c) + 0.01
        for r in links:
            a, b = chosen[r.subject], chosen[r.object]
            total += a is not None and b is not None and relation_holds(r.relation, found[a], found[b])
        return total

    pool = [*range(len(found)), *([None] * len(asked))]
    best = max(value(chosen) for chosen in set(permutations(pool, len(asked))))
    assert value(match(found, statement)) == pytest.approx(best)


def perfect(scene) -> list[Detection]:
    """What a detector without error would say of a scene."""
    found = []
    for obj in scene.objects:
        right, away = scene.camera.floor_axes(*obj.position[:2])
        found.append(seen(f"{obj.size} {obj.color} {obj.material} {obj.shape}", right, away))
    return found


@pytest.mark.parametrize("style", ["mixed", "full", "short"])
def test_perfect_detections_agree_with_the_truth_of_captions(style):
    false = 0
    for seed in range(120):
        scene, other = (
            sample_scene(seed),
            sample_scene(seed + 1, objects=(len(sample_scene(seed).objects),) * 2),
        )
        statement = describe(scene, seed, style)[1]
        assert score(perfect(scene), statement).strict == 1
        if not holds(replace(statement, relations=()), other):
            false += 1
            assert score(perfect(other), statement).strict == 0
    assert false > 60
