"""Sampled scenes: pure in the seed, spread as promised, whole in the picture and visible."""

import math
from collections import Counter

import pytest
import torch

from sfumato.errors import InputError
from sfumato.scenes import COLORS, MATERIALS, SHAPES, SIZES, render, sample_scene
from sfumato.scenes.graph import HALF_WIDTH, motion_of
from sfumato.scenes.sample import COUNT_WEIGHTS, GAP


def test_a_seed_is_a_scene():
    assert sample_scene(7) == sample_scene(7)
    assert sample_scene(7) != sample_scene(8)
    assert sample_scene(2**63 + 5) == sample_scene(2**63 + 5)


def test_scenes_stay_what_they_were():
    """The words of a few seeds, written down: a change here changes every data set made from seeds."""
    words = [
        [f"{o.size} {o.color} {o.material} {o.shape}" for o in sample_scene(s).objects] for s in (1, 3, 5)
    ]
    assert words == [
        ["large brown metal cube"],
        ["large gray rubber sphere"],
        ["small pink metal capsule", "small cyan metal sphere", "large pink metal cylinder"],
    ]


def test_counts_are_spread_as_promised():
    counts = Counter(len(sample_scene(s).objects) for s in range(2000))
    for n, share in enumerate(COUNT_WEIGHTS, 1):
        assert abs(counts[n] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_every_word_of_the_vocabulary_is_used_about_evenly():
    objects = [o for s in range(1500) for o in sample_scene(s).objects]
    for name, words in (("shape", SHAPES), ("color", COLORS), ("material", MATERIALS), ("size", SIZES)):
        used = Counter(getattr(o, name) for o in objects)
        assert set(used) == set(words)
        assert max(used.values()) < 1.6 * min(used.values())


@pytest.mark.parametrize("objects", [(1, 1), (2, 4), (5, 5)])
def test_the_number_of_objects_is_kept(objects):
    found = {len(sample_scene(s, objects=objects).objects) for s in range(60)}
    assert found == set(range(objects[0], objects[1] + 1))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"split": "test"}, "split"),
        ({"objects": (0, 2)}, "objects"),
        ({"objects": (3, 2)}, "objects"),
        ({"objects": (1, 6)}, "objects"),
        ({"frames": 0}, "frames"),
        ({"split": "motions"}, "frames"),
        ({"split": "counts", "objects": (1, 1)}, "objects"),
    ],
)
def test_bad_arguments_are_named(options, argument):
    with pytest.raises(InputError) as caught:
        sample_scene(0, **options)
    assert caught.value.argument == argument


def test_objects_keep_their_distance_in_all_frames():
    for scene in [sample_scene(s) for s in range(80)] + [sample_scene(s, frames=9) for s in range(20)]:
        for seconds in scene.times():
            for k, a in enumerate(scene.objects):
                for b in scene.objects[:k]:
                    apart = math.dist(a.at(seconds)[:2], b.at(seconds)[:2])
                    room = HALF_WIDTH[a.shape] * a.radius + HALF_WIDTH[b.shape] * b.radius
                    assert apart > room + 0.3 * GAP  # checked at five moments when sampled


def alone(scene, k):
    from dataclasses import replace

    return replace(scene, objects=(scene.objects[k],))


@pytest.mark.parametrize("frames", [1, 5])
def test_every_object_is_whole_in_the_picture_and_mostly_visible(frames):
    scenes = [sample_scene(s, frames=frames, objects=(2, 5)) for s in range(40 if frames == 1 else 8)]
    together = render(scenes, 64, antialias=False).instances
    singles = [alone(s, k) for s in scenes for k in range(len(s.objects))]
    masks = iter(render(singles, 64, antialias=False).instances)
    for b, scene in enumerate(scenes):
        for k in range(len(scene.objects)):
            mask = next(masks) > 0
            edge = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1)
            assert not edge.any()
            whole, seen = mask.sum((1, 2)), (together[b] == k + 1).sum((1, 2))
            assert (seen >= 0.45 * whole).all()
            assert (seen >= 12).all()


def test_sizes_cannot_be_confused():
    """In the picture, the smallest large object of a shape is wider than the widest small one."""
    widths: dict[tuple[str, str], list[int]] = {}
    scenes = [alone(s, k) for s in map(sample_scene, range(150)) for k in range(len(s.objects))]
    for scene, mask in zip(scenes, render(scenes, 64, antialias=False).instances, strict=True):
        obj = scene.objects[0]
        widths.setdefault((obj.shape, obj.size), []).append(int((mask[0] > 0).sum()))
    for shape in SHAPES:
        assert min(widths[shape, "large"]) > 1.15 * max(widths[shape, "small"])


def test_motion_is_drawn_and_classified():
    scenes = [sample_scene(s, frames=5) for s in range(150)]
    found = Counter(motion_of(s, o) for s in scenes for o in s.objects)
    assert found[None] > 0 and ("slow", "left") in found and ("fast", "toward") in found
    assert all(o.velocity == (0.0, 0.0) for s in map(sample_scene, range(20)) for o in s.objects)
