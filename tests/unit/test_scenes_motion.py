"""Scenes in motion: paths are what they are called, tracks and flow are exact, captions tell what happens."""

import math
from dataclasses import replace

import pytest
import torch

from sfumato.evaluate.clips import still_seen, warp_error
from sfumato.scenes import describe, holds, render, sample_scene, split_of
from sfumato.scenes.graph import (
    CAMERA_MOVES,
    GRAVITY,
    MANNERS,
    camera_move,
    manner_of,
    motion_of,
    passes,
    related,
)
from sfumato.scenes.motion import flow, paths, tracks
from sfumato.scenes.splits import HELD_MOTIONS

CLIPS = [sample_scene(s, frames=9, objects=(1, 3)) for s in range(150)]


def first(wanted):
    """The first scene, and place in it, of an object that `wanted` accepts."""
    return next((s, k) for s in CLIPS for k, o in enumerate(s.objects) if wanted(s, o))


def test_everything_that_can_happen_happens():
    assert {manner_of(s, o) for s in CLIPS for o in s.objects} == {*MANNERS, None}
    assert {camera_move(s) for s in CLIPS} == {*CAMERA_MOVES, None}
    assert any(
        passes(s, i, j) for s in CLIPS for i in range(len(s.objects)) for j in range(len(s.objects)) if i != j
    )


def test_a_bounce_is_a_fall_under_one_gravity():
    scene, k = first(lambda s, o: o.hop > 0)
    obj = scene.objects[k]
    heights = [obj.at(t / 100)[2] - obj.position[2] for t in range(400)]
    assert min(heights) >= 0 and max(heights) == pytest.approx(obj.hop, rel=1e-3)
    second = [(heights[i + 1] - 2 * heights[i] + heights[i - 1]) * 1e4 for i in range(1, 399)]
    falling = [value for value in second if value == pytest.approx(-GRAVITY, rel=1e-6)]
    assert len(falling) > 0.9 * len(second)  # all but the moments in which it meets the floor
    assert all(value > -GRAVITY * 1.001 for value in second)


def test_an_orbit_keeps_its_distance():
    scene, k = first(lambda s, o: o.orbit[2])
    obj = scene.objects[k]
    radii = {round(math.dist(obj.at(t)[:2], obj.orbit[:2]), 9) for t in scene.times()}
    assert len(radii) == 1 and radii.pop() > 0.5


def test_directions_are_the_viewers():
    for scene in CLIPS:
        for k, obj in enumerate(scene.objects):
            motion = motion_of(scene, obj)
            if motion is None or motion[1] not in ("left", "right", "toward", "away") or camera_move(scene):
                continue
            (a, b), (x, y) = paths(scene)[0, k].tolist(), paths(scene)[-1, k].tolist()
            gone = {"left": a - x, "right": x - a, "toward": b - y, "away": y - b}
            assert max(gone, key=gone.get) == motion[1]


def test_the_camera_travels_where_its_move_says():
    for scene in CLIPS:
        move = camera_move(scene)
        if move in ("left", "right"):
            position = [scene.camera.at(t).axes()[0] for t in (0.0, 0.5)]
            right = scene.camera.axes()[1]
            step = sum((b - a) * r for a, b, r in zip(*position, right, strict=True))
            assert (step > 0) == (move == "right")
        elif move:
            assert (scene.camera.at(1.0).distance < scene.camera.distance) == (move == "closer")


def test_tracks_are_where_things_are_drawn():
    scenes = [s for s in CLIPS if len(s.objects) == 1 and s.objects[0].shape == "sphere"][:4]
    made = render(scenes, 64, antialias=False)
    for b, scene in enumerate(scenes):
        for t, place in enumerate(tracks(scene)[:, 0]):
            rows, columns = (made.instances[b, t] > 0).nonzero(as_tuple=True)
            assert abs(float(columns.double().mean() + 0.5) / 64 - place[0]) < 0.02
            assert abs(float(rows.double().mean() + 0.5) / 64 - place[1]) < 0.02


def test_flow_carries_each_picture_into_the_next():
    matte = [
        s for s in CLIPS if all(o.material == "rubber" for o in s.objects)
    ]  # mirrors show what moves otherwise
    scenes = [s for s in matte if any(o.moves for o in s.objects)][:3] + [s for s in matte if camera_move(s)][
        :2
    ]
    made = render(scenes, 128)
    exact, none, held = flow(scenes, made), torch.zeros(2, 8, 128, 128), still_seen(made.instances)
    assert exact.shape == (5, 2, 8, 128, 128)
    for b in range(len(scenes)):
        pixels, where = 2 * made.rgb[b] - 1, held[b] & (made.instances[b, :-1] > 0)
        assert warp_error(pixels, exact[b], where) < 0.5 * warp_error(pixels, none, where)


def test_what_stands_still_has_no_flow():
    still = replace(sample_scene(3), frames=3)
    made = render([still], 64)
    assert flow([still], made).abs().max() < 1e-6
    assert torch.equal(made.rgb[:, :, 0], made.rgb[:, :, 2])


@pytest.mark.parametrize("frames", [5, 9])
def test_captions_of_a_clip_and_of_its_beginning_are_true(frames):
    for seed, scene in enumerate(CLIPS):
        text, statement = describe(replace(scene, frames=frames), seed)
        assert holds(statement, replace(scene, frames=frames)), text


def test_captions_say_who_passes_whom_and_what_the_camera_does():
    said = [describe(s, seed) for seed in range(6) for s in CLIPS]
    texts = " ; ".join(text for text, _ in said)
    for words in ("rolls", "slides", "bounces", "circles", " past ", "stands still", "while the camera"):
        assert words in texts
    pairs = [r for _, st in said for r in st.relations if r.relation in ("past", "around")]
    assert pairs and all((r.subject, r.object) == (0, 1) for r in pairs)


def test_a_circle_around_something_is_said():
    scene, k = first(lambda s, o: o.orbit[2] and len(s.objects) == 2 and not all(p.moves for p in s.objects))
    circling, resting = scene.objects[k], scene.objects[1 - k]
    orbit = (*resting.position[:2], circling.orbit[2])
    scene = replace(scene, objects=(replace(circling, orbit=orbit), resting))
    texts = [describe(scene, seed)[0] for seed in range(20)]
    assert any(" around " in text for text in texts)
    assert all(holds(describe(scene, seed)[1], scene) for seed in range(20))


def test_a_passage_needs_both_sides():
    scene = next(
        s
        for s in CLIPS
        for i in range(len(s.objects))
        for j in range(len(s.objects))
        if i != j and passes(s, i, j)
    )
    i, j = next(
        (i, j)
        for i in range(len(scene.objects))
        for j in range(len(scene.objects))
        if i != j and passes(scene, i, j)
    )
    assert related(scene, i, "past", j) and not related(scene, j, "past", i)
    mover = replace(scene.objects[i], velocity=tuple(-v for v in scene.objects[i].velocity))
    back = replace(scene, objects=tuple(mover if k == i else o for k, o in enumerate(scene.objects)))
    assert not passes(back, i, j)


def test_held_out_motion_is_held_out():
    for seed in range(20):
        scene = sample_scene(seed, split="motions", frames=9)
        assert split_of(scene) == "motions"
        assert any(motion_of(scene, o) in HELD_MOTIONS for o in scene.objects)
    assert not any(motion_of(s, o) in HELD_MOTIONS for s in CLIPS for o in s.objects)
