"""Captions: always true, well formed, varied; statements decide truth without words."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.scenes import (
    COLORS,
    MATERIALS,
    RELATIONS,
    SHAPES,
    SIZES,
    ObjectClaim,
    RelationClaim,
    Statement,
    describe,
    holds,
    phrase,
    sample_scene,
)
from sfumato.scenes.captions import COLOR_WORDS, MATERIAL_WORDS, MAX_WORDS, NOUNS, SIZE_WORDS, matches
from sfumato.scenes.graph import related

SCENES = [sample_scene(s) for s in range(150)]
CLIPS = [sample_scene(s, frames=5) for s in range(40)]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SCENES + CLIPS), st.integers(0, 2**32), st.sampled_from(["mixed", "full", "short"]))
def test_what_is_described_is_true(scene, seed, style):
    text, statement = describe(scene, seed, style)
    assert holds(statement, scene)
    assert len(text.split()) <= MAX_WORDS
    assert (text, statement) == describe(scene, seed, style)
    assert phrase(statement, seed) == text
    mentioned = sum(claim.count for claim in statement.objects)
    assert statement.exact == (mentioned == len(scene.objects))
    if style == "full":
        assert statement.exact
        assert all(None not in (c.shape, c.color, c.material, c.size) for c in statement.objects)


def test_captions_of_crowded_clips_leave_something_out():
    told = [describe(scene, seed, "full") for scene in CLIPS if len(scene.objects) > 4 for seed in range(300)]
    assert max(len(text.split()) for text, _ in told) == MAX_WORDS
    assert any(statement.camera is None and not statement.relations for _, statement in told)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SCENES), st.integers(0, 2**32))
def test_a_described_scene_is_not_true_of_a_changed_one(scene, seed):
    """Changing an attribute that a full description names, or adding an object to an exact one, makes it false."""
    _, statement = describe(scene, seed, "full")
    first = scene.objects[0]
    for name, words in (("shape", SHAPES), ("color", COLORS), ("material", MATERIALS), ("size", SIZES)):
        other = next(w for w in words if w != getattr(first, name))
        assert not holds(
            statement, replace(scene, objects=(replace(first, **{name: other}), *scene.objects[1:]))
        )
    assert not holds(statement, replace(scene, objects=(*scene.objects, first)))
    assert not holds(statement, replace(scene, objects=scene.objects[1:]))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SCENES), st.integers(0, 2**32))
def test_the_words_say_the_statement(scene, seed):
    """Each claimed attribute is in the text by one of its words, as often as it is claimed, and no other one is."""
    text, statement = describe(scene, seed)
    tables = {
        "color": {c: [w for w, _ in COLOR_WORDS.get(c, ((c, 1),))] for c in COLORS},
        "material": {m: [w for w, _ in MATERIAL_WORDS[m]] for m in MATERIALS},
        "size": {s: [w for w, _ in SIZE_WORDS[s]] for s in SIZES},
        "shape": {s: [w for w, _ in NOUNS[s]] for s in SHAPES},
    }
    nouns = "|".join(w for table in NOUNS.values() for w, _ in table)
    text = re.sub(rf"\bthe (?!left|right)(?:[a-z]+ )*?(?:{nouns})s?\b", " ", text)  # second mentions
    for name, table in tables.items():
        claimed = Counter(getattr(c, name) for c in statement.objects)
        for value, words in table.items():
            found = sum(len(re.findall(rf"\b{w}(?:s|es)?\b", text)) for w in words)
            assert found == claimed.get(value, 0), (text, name, value)


def test_captions_have_the_promised_mix():
    captions = [describe(scene, 1000 * n + k) for n in range(20) for k, scene in enumerate(SCENES)]
    partial = [
        any(None in (c.shape, c.color, c.material, c.size) for c in s.objects) or not s.exact
        for _, s in captions
    ]
    assert (
        0.4 < sum(partial) / len(captions) < 0.6
    )  # 30% short, and some of the rest without size or material
    assert 0.03 < sum(not s.exact for _, s in captions) / len(captions) < 0.12
    few = [len(t.split()) for t, s in captions if sum(c.count for c in s.objects) <= 2]
    assert sum(few) / len(few) < 12
    spoken = Counter(r.relation for _, s in captions for r in s.relations)
    assert set(spoken) == set(RELATIONS)
    assert max(spoken.values()) < 2.5 * min(spoken.values())
    subjects = Counter(min(r.subject, r.object) == r.subject for _, s in captions for r in s.relations)
    assert 0.8 < subjects[True] / subjects[False] < 1.25  # both roles, in both orders of mention
    assert any(c.count > 1 for _, s in captions for c in s.objects)
    words = {w for t, _ in captions for w in t.replace(",", "").split()}
    assert {"ball", "block", "ring", "shiny", "matte", "big", "tiny", "two"} <= words


def test_captions_are_plain_english():
    for seed in range(10):
        for scene in SCENES[:60] + CLIPS:
            text, _ = describe(scene, seed)
            assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\b(\w+) \1\b", text), text


def test_motion_is_told():
    texts = " ; ".join(describe(clip, seed)[0] for seed in range(10) for clip in CLIPS)
    for words in ("moving left", "moving right", "moving away", "slowly", "fast"):
        assert words in texts
    claims = [c for seed in range(10) for clip in CLIPS for c in describe(clip, seed)[1].objects if c.motion]
    assert claims and all(c.motion is None for s in SCENES for c in describe(s, 1)[1].objects)


def two():
    """A scene with a small and a large object, the first left of the second."""
    return next(
        s
        for s in (sample_scene(k, objects=(2, 2)) for k in range(500))
        if related(s, 0, "left of", 1) and s.objects[0].shape != s.objects[1].shape
    )


def test_statements_decide_truth():
    scene = two()
    a, b = (ObjectClaim(o.shape) for o in scene.objects)
    left = RelationClaim(0, "left of", 1)
    assert holds(Statement((a, b), (left,)), scene)
    assert holds(Statement((b, a), (RelationClaim(0, "right of", 1),)), scene)
    assert not holds(Statement((b, a), (left,)), scene)
    assert not holds(Statement((a,)), scene)
    assert holds(Statement((a,), exact=False), scene)
    assert not holds(Statement((a, a), exact=False), scene)  # one object cannot play two
    assert holds(Statement((ObjectClaim(count=2),)), scene)
    assert not holds(Statement((ObjectClaim(count=3),), exact=False), scene)
    assert not holds(Statement((replace(a, motion="left"), b)), scene)
    assert matches(ObjectClaim(), scene, scene.objects[0])


def test_relations_choose_among_candidates():
    """Two objects of one kind: the statement holds if any of them stands in the relation."""
    scene = two()
    twin = replace(scene, objects=(scene.objects[0], replace(scene.objects[1], shape=scene.objects[0].shape)))
    kind = ObjectClaim(scene.objects[0].shape)
    assert holds(Statement((kind, kind), (RelationClaim(0, "left of", 1),)), twin)
    assert holds(Statement((kind, kind), (RelationClaim(0, "right of", 1),)), twin)


CLAIMS = st.builds(
    ObjectClaim,
    shape=st.sampled_from([*SHAPES, None]),
    color=st.sampled_from([*COLORS, None]),
    material=st.sampled_from([*MATERIALS, None]),
    size=st.sampled_from([*SIZES, None]),
    count=st.integers(1, 5),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(CLAIMS, min_size=1, max_size=5), st.data(), st.booleans(), st.integers(0, 1000))
def test_any_statement_can_be_said(claims, data, exact, seed):
    pairs = [(i, j) for i in range(len(claims)) for j in range(len(claims)) if i != j]
    ends = data.draw(st.lists(st.sampled_from(pairs), max_size=3)) if pairs else []
    told = tuple(RelationClaim(i, data.draw(st.sampled_from(RELATIONS)), j) for i, j in ends)
    text = phrase(Statement(tuple(claims), told, exact), seed)
    assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text)
    for claim in claims:
        if claim.shape:
            assert any(word in text for word, _ in NOUNS[claim.shape])


def test_an_evaluation_prompt():
    claims = (ObjectClaim("sphere", "red", "metal"), ObjectClaim("cube", "blue", None, "small"))
    statement = Statement(claims, (RelationClaim(0, "behind", 1),))
    texts = {phrase(statement, seed) for seed in range(300)}
    assert "a red metal sphere behind a small blue cube" in texts
    assert any(t.startswith("a red metal sphere with a small blue cube in front of it") for t in texts)
    assert len(texts) > 30


@pytest.mark.parametrize(
    "statement",
    [
        Statement(()),
        Statement((ObjectClaim("teapot"),)),
        Statement((ObjectClaim(color="beige"),)),
        Statement((ObjectClaim(count=0),)),
        Statement((ObjectClaim(count=6),)),
        Statement((ObjectClaim(), ObjectClaim()), (RelationClaim(0, "above", 1),)),
        Statement((ObjectClaim(), ObjectClaim()), (RelationClaim(0, "behind", 2),)),
        Statement((ObjectClaim(), ObjectClaim()), (RelationClaim(1, "behind", 1),)),
    ],
)
def test_a_broken_statement_is_refused(statement):
    with pytest.raises(InputError):
        phrase(statement, 0)


def test_an_unknown_style_is_refused():
    with pytest.raises(InputError, match="style"):
        describe(SCENES[0], 0, "haiku")
