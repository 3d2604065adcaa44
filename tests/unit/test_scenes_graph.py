"""Scene graphs: JSON, meaning, and what a split is."""

import json
from dataclasses import replace

import pytest

from sfumato.errors import DataError
from sfumato.scenes import SPLITS, sample_scene, scene_hash, split_of
from sfumato.scenes.graph import (
    INVERSE,
    related,
    relations,
    scene_from_dict,
    scene_from_json,
    scene_to_dict,
    scene_to_json,
)
from sfumato.scenes.splits import HELD_COUNTS, HELD_MOTIONS, HELD_PAIRS, HELD_RELATIONS, novelties


def many(count, **options):
    return [sample_scene(seed, **options) for seed in range(count)]


def test_json_keeps_every_bit():
    for scene in many(20) + many(5, frames=4):
        assert scene_from_json(scene_to_json(scene)) == scene


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("camera"),
        lambda v: v["objects"][0].update(shape="teapot"),
        lambda v: v["objects"][0].update(color=["red"]),
        lambda v: v["objects"][0].update(speed=1),
        lambda v: v["objects"][0].update(position="here"),
        lambda v: v["objects"][0].update(position=[1.0, 2.0]),
        lambda v: v["objects"][0].update(position=[1.0, 2.0, float("nan")]),
        lambda v: v["camera"].update(fov="wide"),
        lambda v: v.update(objects=None),
        lambda v: v.update(frames="many"),
        lambda v: v.update(frames=0),
        lambda v: v.update(fps=0),
    ],
)
def test_a_broken_graph_is_refused_by_name(damage):
    values = json.loads(scene_to_json(sample_scene(3)))
    damage(values)
    with pytest.raises(DataError):
        scene_from_dict(values)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "3"])
def test_text_that_is_no_graph(text):
    with pytest.raises(DataError):
        scene_from_json(text)


def test_relations_come_with_their_inverse_and_never_both_ways():
    seen = set()
    for scene in many(100):
        triples = set(relations(scene))
        for i, r, j in triples:
            assert (j, INVERSE[r], i) in triples
            assert (j, r, i) not in triples
            seen.add(r)
    assert seen == set(INVERSE)


def test_relations_are_the_viewers():
    for scene in many(60):
        places = [scene.camera.project(*o.position) for o in scene.objects]
        for i, r, j in relations(scene):
            if r == "left of":
                assert places[i][0] < places[j][0]
            if r == "behind":
                assert places[i][2] > places[j][2]


def test_hash_ignores_what_is_not_meaning():
    for scene in many(40):
        same = replace(scene, objects=scene.objects[::-1])
        same = replace(same, light=sample_scene(999).light, floor=sample_scene(998).floor)
        same = replace(
            same, objects=tuple(replace(o, yaw=o.yaw + 1, tint=(1.0, 1.0, 1.0)) for o in same.objects)
        )
        assert scene_hash(same) == scene_hash(scene)


@pytest.mark.parametrize(
    "change", [{"size": "small"}, {"color": "pink"}, {"shape": "cone"}, {"material": "metal"}]
)
def test_hash_sees_every_attribute(change):
    scene = sample_scene(0, objects=(3, 3))
    ((name, value),) = change.items()
    changed = 0
    for k, obj in enumerate(scene.objects):
        if getattr(obj, name) != value:
            objects = (*scene.objects[:k], replace(obj, **change), *scene.objects[k + 1 :])
            assert scene_hash(replace(scene, objects=objects)) != scene_hash(scene)
            changed += 1
    assert changed


def test_hash_sees_relations_and_motion():
    scene = next(
        s
        for s in many(50, objects=(2, 2))
        if related(s, 0, "left of", 1) and s.objects[0].color != s.objects[1].color
    )
    a, b = scene.objects
    swapped = (
        replace(a, position=(*b.position[:2], a.position[2])),
        replace(b, position=(*a.position[:2], b.position[2])),
    )
    assert scene_hash(replace(scene, objects=swapped)) != scene_hash(scene)
    clip = next(s for s in many(50, frames=4) if any(o.velocity != (0.0, 0.0) for o in s.objects))
    still = replace(clip, objects=tuple(replace(o, velocity=(0.0, 0.0)) for o in clip.objects))
    assert scene_hash(still) != scene_hash(clip)


def scenes_of(split, count):
    return many(count, split=split, frames=4 if split == "motions" else 1)


def test_no_graph_leaks_from_one_split_into_another():
    hashes = {
        split: {scene_hash(s) for s in scenes_of(split, 60 if split == "val" else 150)} for split in SPLITS
    }
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not hashes[a] & hashes[b]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_yields_only_its_own(split):
    for scene in scenes_of(split, 25):
        assert split_of(scene) == split
        assert novelties(scene) == (frozenset() if split in {"train", "val"} else frozenset({split}))


def test_held_out_things_never_appear_in_training():
    clips = scenes_of("train", 120) + many(60, frames=4)
    for scene in clips:
        shapes = [o.shape for o in scene.objects]
        colors = [o.color for o in scene.objects]
        assert not HELD_PAIRS & set(zip(colors, shapes, strict=True))
        assert not {(c, colors.count(c)) for c in colors} & HELD_COUNTS
        for i, r, j in relations(scene):
            assert (shapes[i], r, shapes[j]) not in HELD_RELATIONS
    assert {
        ("fast", "left"),
        ("slow", "away"),
    } == HELD_MOTIONS  # written in captions of test sets: not to be changed lightly


def test_every_color_and_shape_of_a_held_pair_is_learned_apart():
    seen = {(o.color, o.shape) for s in many(700) for o in s.objects}
    for color, shape in HELD_PAIRS:
        assert any(c == color for c, _ in seen) and any(s == shape for _, s in seen)


def test_dict_is_plain_json():
    assert json.loads(json.dumps(scene_to_dict(sample_scene(1)))) == json.loads(
        scene_to_json(sample_scene(1))
    )
