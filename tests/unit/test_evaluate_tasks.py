"""Prompts with a meaning: groups repeat, stay within their splits, and real scenes can be made to order."""

from collections import Counter

import pytest
import torch

from sfumato.errors import InputError
from sfumato.evaluate.ceiling import complete, pictures, scene_of, swapped
from sfumato.evaluate.degrade import degrade
from sfumato.evaluate.tasks import GROUPS, task_groups
from sfumato.scenes import holds, render, sample_scene
from sfumato.scenes.splits import HELD_COUNTS, HELD_PAIRS, novelties

COUNT = 40


@pytest.fixture(scope="module")
def groups():
    return task_groups(COUNT, seed=3)


def test_groups_are_a_function_of_the_seed(groups):
    assert task_groups(COUNT, seed=3) == groups
    assert task_groups(COUNT, seed=4) != groups
    assert task_groups(COUNT, 3, ["three"]) == {"three": groups["three"]}
    assert set(groups) == set(GROUPS) and all(len(tasks) == COUNT for tasks in groups.values())


def test_a_longer_group_begins_with_the_shorter(groups):
    assert task_groups(10, seed=3)["binding"] == groups["binding"][:10]


def test_prompts_vary(groups):
    for name, tasks in groups.items():
        assert len({task.prompt for task in tasks}) > COUNT // 4, name
        words = Counter(word for task in tasks for word in task.prompt.split())
        assert len(words) > 10, name


@pytest.mark.parametrize("name", list(GROUPS))
def test_real_scenes_fit_and_keep_to_their_split(name, groups):
    for seed, task in enumerate(groups[name][:12]):
        scene = scene_of(task.statement, seed)
        assert holds(task.statement, scene)
        assert len(scene.objects) == sum(c.count for c in task.statement.objects)


def test_held_out_groups_hold_what_the_others_lack(groups):
    for name, tasks in groups.items():
        pairs = [any((c.color, c.shape) in HELD_PAIRS for c in t.statement.objects) for t in tasks]
        counts = [any((c.color, c.count) in HELD_COUNTS for c in t.statement.objects) for t in tasks]
        assert all(pairs) if name in ("held_pairs", "held_binding") else not any(pairs), name
        assert all(counts) if name == "held_counts" else not any(counts), name
    for task in groups["held_relations"]:
        assert "relations" in novelties(scene_of(task.statement, 0))
    for task in groups["relations"][:15]:  # some picture of it is free of held-out content
        assert any("relations" not in novelties(scene_of(task.statement, seed)) for seed in range(8))


def test_made_scenes_show_every_object(groups):
    scenes = [scene_of(task.statement, i) for i, task in enumerate(groups["counting"][:16])]
    masks = render(scenes, size=128).instances[:, 0]
    for scene, mask in zip(scenes, masks, strict=True):
        seen = torch.bincount(mask.flatten().long(), minlength=len(scene.objects) + 1)[1:]
        assert seen.min() >= 40  # pixels; the smallest object, a capsule far away, covers about 70


def test_complete_statements_hold_of_their_scene_and_of_few_others():
    scenes = [sample_scene(seed, objects=(2, 2)) for seed in range(30)]
    statements = [complete(scene) for scene in scenes]
    assert all(holds(s, scene) for s, scene in zip(statements, scenes, strict=True))
    assert not any(holds(s, scenes[(i + 1) % 30]) for i, s in enumerate(statements))


def test_swapped_prompts_state_something_else(groups):
    for tasks in groups.values():
        assert all(a.statement != b.statement for a, b in zip(tasks, swapped(tasks), strict=True))


def test_pictures_are_eight_bit_in_range():
    shown = pictures([sample_scene(0), sample_scene(1)], size=32)
    assert shown.shape == (2, 3, 32, 32) and shown.min() >= -1 and shown.max() <= 1
    levels = (shown + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_damage_repeats_keeps_range_and_vanishes_at_zero():
    shown = pictures([sample_scene(seed) for seed in range(8)], size=64)
    once, twice = (degrade(shown, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, twice)
    assert once.min() >= -1 and once.max() <= 1 and once.isfinite().all()
    error = [
        (degrade(shown, torch.Generator().manual_seed(1), s) - shown).square().mean() for s in (0.0, 0.3, 1.0)
    ]
    assert error[0] == 0 and 0 < error[1] < error[2] < 0.1


def test_bad_questions_are_refused():
    with pytest.raises(InputError, match="unknown"):
        task_groups(3, names=["quantum"])
    with pytest.raises(InputError):
        task_groups(0)
