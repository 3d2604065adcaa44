"""Scenes in a mirror and clips run backwards: scenes whose pictures, captions and splits are their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato.data.scenes import SceneSource
from sfumato.data.turned import MirroredFrames, TurnedClips
from sfumato.scenes import render, sample_scene, split_of
from sfumato.scenes.graph import camera_move, motion_of
from sfumato.scenes.turned import backwards, mirrored

SCENES = [sample_scene(seed, objects=(1, 3), frames=5) for seed in range(40)]


def picture(scene) -> torch.Tensor:
    return render([scene], size=48).rgb[0]  # (3, T, H, W)


@pytest.mark.parametrize("scene", SCENES[:8])
def test_a_mirrored_scene_is_drawn_as_the_flipped_picture(scene):
    error = (picture(mirrored(scene)) - picture(scene).flip(-1)).abs()
    assert error.mean() < 0.004 and error.median() < 1e-3


@pytest.mark.parametrize("scene", SCENES[:8])
def test_backwards_is_drawn_as_the_frames_in_reverse(scene):
    torch.testing.assert_close(picture(backwards(scene)), picture(scene).flip(1), atol=2e-3, rtol=0)


def test_turning_twice_gives_the_scene_back():
    for scene in SCENES:
        assert mirrored(mirrored(scene)) == scene
        again = backwards(backwards(scene))
        for a, b in zip(again.objects, scene.objects, strict=True):
            for seconds in scene.times():
                assert a.at(seconds) == pytest.approx(b.at(seconds), abs=1e-6)


def test_words_of_motion_turn_with_the_scene():
    opposite = {"left": "right", "right": "left", "toward": "away", "away": "toward"}
    seen = set()
    for scene in SCENES:
        for obj, left, back in zip(
            scene.objects, mirrored(scene).objects, backwards(scene).objects, strict=True
        ):
            if (motion := motion_of(scene, obj)) and motion[1] in opposite:
                seen.add(motion[1])
                flipped = opposite[motion[1]] if motion[1] in ("left", "right") else motion[1]
                assert motion_of(mirrored(scene), left) == (motion[0], flipped)
                assert motion_of(backwards(scene), back) == (motion[0], opposite[motion[1]])
    assert seen == set(opposite)


def test_a_plain_scene_has_one_thing_that_goes_straight():
    for seed in range(30):
        scene = sample_scene(seed, objects=(1, 3), frames=9, plain=1.0)
        first, *others = scene.objects
        assert camera_move(scene) is None and not any(obj.moves for obj in others)
        assert motion_of(scene, first)[1] in ("left", "right", "toward", "away") and first.hop == 0
        assert sample_scene(seed, objects=(1, 3), frames=9, plain=0.0) == sample_scene(
            seed, objects=(1, 3), frames=9
        )


def test_clips_turned_four_ways_stay_within_their_split():
    scenes = SceneSource(12, 3, "train", 32, 5, options={"objects": [1, 2]})
    frames = MirroredFrames(scenes)
    clips = TurnedClips(frames)
    assert len(frames) == 24 and 24 <= len(clips) < 48
    assert {split_of(clips.scene(k)) for k in range(len(clips))} == {"train"}
    rows = frames.pixels([4, 5, 7])
    assert np.array_equal(rows[1], rows[0][:, :, ::-1])
    assert len({frames.digest(k) for k in range(24)}) == 24
    assert len({clips.digest(k) for k in range(len(clips))}) == len(clips)
    turned = next(k for k, (_, back) in enumerate(clips.rows) if back)
    forward = frames.pixels([clips.rows[turned][0]])[0]
    assert np.array_equal(clips.pixels([turned])[0], forward[::-1])
    assert all(split_of(replace(clips.scene(k), frames=1)) == "train" for k in clips.stills())
