"""Clips measured: real ones score as the truth, copies of a frame move nothing, and what is broken shows."""

import pytest
import torch

from helpers import CPU
from sfumato.errors import InputError
from sfumato.evaluate.clips import (
    ARMS,
    clip_scenes,
    evaluate_clips,
    measured,
    still_seen,
    velocity,
    warp_error,
)
from sfumato.evaluate.detect_network import load_detector
from sfumato.generate import Model
from sfumato.scenes import render
from sfumato.scenes.graph import camera_move, motion_of
from sfumato.scenes.motion import flow
from small_video import picture_system, video_system


@pytest.fixture(scope="module")
def detector():
    return load_detector()


@pytest.fixture(scope="module")
def moving():
    """Scenes with one straight mover, rendered, with their truth."""
    scenes = [
        s
        for s in clip_scenes(60, 0, "val", 9)
        if all(o.hop == 0 and not o.orbit[2] for o in s.objects) and any(motion_of(s, o) for o in s.objects)
    ][:6]
    made = render(scenes, 128)
    return scenes, 2 * made.rgb - 1, flow(scenes, made), still_seen(made.instances)


def scores(detector, moving, change=lambda pixels: pixels):
    scenes, real, flows, held = moving
    every = [
        measured(detector, s, change(real[k]), (flows[k], held[k], held[k])) for k, s in enumerate(scenes)
    ]
    return {
        name: sum(m[name] for m in every if name in m) / sum(name in m for m in every) for name in every[0]
    }


def test_real_clips_score_as_the_truth(detector, moving):
    found = scores(detector, moving)
    assert found["identity"] > 0.95 and found["colour"] > 0.95 and found["count"] > 0.95
    assert found["direction"] > 0.9 and found["speed_error"] < 0.2


def test_copies_keep_everything_and_go_nowhere(detector, moving):
    found = scores(detector, moving, lambda pixels: pixels[:, :1].expand_as(pixels))
    assert found["identity"] == found["count"] == 1.0
    assert found["direction"] == 0 and found["speed_error"] == pytest.approx(1, abs=0.02)
    assert found["warp_error"] > scores(detector, moving)["warp_error"]


def test_a_clip_backwards_goes_the_wrong_way(detector, moving):
    found = scores(detector, moving, lambda pixels: pixels.flip(1))
    assert found["direction"] == 0 and found["speed_error"] > 1.5


def test_what_changes_colour_is_not_found_again(detector, moving):
    def changed(pixels):
        other = pixels.clone()
        other[:, 4:] = pixels[[2, 0, 1], 4:]
        return other

    assert scores(detector, moving, changed)["colour"] < 0.8


def test_flicker_is_seen(detector, moving):
    def flickering(pixels):
        return pixels + 0.1 * torch.tensor([(-1.0) ** t for t in range(9)])[None, :, None, None]

    assert scores(detector, moving, flickering)["flicker"] > scores(detector, moving)["flicker"] + 10


def test_velocity_is_a_slope():
    times = [0.0, 0.125, 0.375, 1.0]
    places = torch.tensor([[2.0 - 3 * t, 1.0 + 0.5 * t] for t in times], dtype=torch.float64)
    assert velocity(places, times) == pytest.approx((-3.0, 0.5))


def test_warp_error_of_a_shift_is_nothing_along_it():
    pixels = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels[:, 1] = pixels[:, 0].roll(2, -1)
    moved = torch.zeros(2, 1, 16, 16)
    moved[0] = 2
    where = torch.ones(1, 16, 16, dtype=torch.bool)
    where[..., -3:] = False
    assert warp_error(pixels, moved, where) < 1e-3 < 10 < warp_error(pixels, 0 * moved, where)


def test_scenes_move_and_the_camera_does_not():
    for split in ("val", "motions"):
        for scene in clip_scenes(6, 1, split, 9):
            assert camera_move(scene) is None and any(obj.moves for obj in scene.objects)


def test_a_report_has_every_arm(detector):
    report = evaluate_clips(Model(video_system(), CPU, "film", torch.float32), detector, 2, frames=5, steps=1)
    assert tuple(report.arms) == ARMS
    head, rows = report.table()
    assert len(head) == 1 + len(ARMS) and all(len(row) == len(head) for row in rows)
    assert "warp_error" not in report.arms["words"]
    assert report.to_dict()["arms"]["real"]["identity"]["mean"] > 0.5


def test_a_model_of_pictures_is_refused(detector):
    with pytest.raises(InputError, match="draws no clips"):
        evaluate_clips(Model(picture_system(), CPU, "still", torch.float32), detector, 1)
