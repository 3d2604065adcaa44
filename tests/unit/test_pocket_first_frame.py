"""A model that draws the first frame of a clip by itself: it is kept, prices and plans know, pictures are as ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import CPU, noise
from sfumato import planning
from sfumato.drawing.clips import drawn_together
from sfumato.errors import InputError, NonFiniteError
from sfumato.families.pocket import VideoConfig
from sfumato.flops import count_flops
from sfumato.generate import Model
from sfumato.receipts.work import by_stage, work_of
from sfumato.types import Clip, Request
from small_video import VIDEO, video_system

PICTURE, FILM = noise(32, 32), Request("a red cube rolls", frames=9, steps=2, seed=4)


@pytest.fixture
def model() -> Model:
    return Model(video_system(replace(VIDEO, first_alone=True)), CPU, "film", torch.float32)


def levels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_what_is_drawn_together(model):
    def stretches(latents: int, **fields) -> list[tuple[int, int]]:
        return drawn_together(model, Request("a cube", **fields), latents)

    clip = Clip((PICTURE,) * 5, 8.0)
    assert stretches(1) == [(0, 1)] == stretches(1, image=PICTURE)
    assert stretches(3, frames=9) == [(0, 1), (0, 3)] == stretches(3, frames=9, clip=clip, image=PICTURE)
    assert stretches(3, frames=9, image=PICTURE) == [(0, 3)]
    assert stretches(7, frames=25) == [(0, 1), (0, 3), (2, 5), (4, 7)]


@pytest.mark.parametrize("frames", [5, 9, 25])
def test_a_clip_goes_on_from_its_first_frame(model, frames):
    """The first frame does not know how many come."""
    steps = []
    asked = replace(FILM, frames=frames)
    clip = model.generate(asked, lambda step: steps.append((step.index, step.total))).clips[0]
    total = 2 * len(drawn_together(model, asked, model.system.latent_shape(frames, 32, 32)[1]))
    assert len(clip.frames) == frames and steps == [(k, total) for k in range(total)]
    other = model.generate(replace(FILM, frames=13)).clips[0]
    assert np.abs(levels(clip.frames[0]) - levels(other.frames[0])).max() <= 1
    again = model.generate(asked).clips[0]
    assert all(np.array_equal(a, b) for a, b in zip(clip.frames, again.frames, strict=True))


def test_the_first_frame_has_noise_of_its_own(model):
    """What comes after it knows nothing of that, as where a picture is given."""
    heard: list[torch.Tensor] = []
    network = type(model.system).network

    def listening(system, x, time, cond, *rest):
        heard.append(x.clone())
        return network(system, x, time, cond, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.system), "network", listening)
        model.generate(replace(FILM, size=(256, 256)))
    first = next(x for x in heard if x.shape[2] == 1)[0].flatten()
    rest = [x.flatten() for x in next(x for x in heard if x.shape[2] == 3)[0, :, 1:].unbind(1)]
    alike = torch.corrcoef(torch.stack([first, *rest]))
    assert alike[0, 1:].abs().max() < 0.08  # of 4,096 numbers
    assert float(alike[1, 2]) == pytest.approx(VIDEO.shared, abs=0.08)


def test_a_clip_to_draw_over_begins_with_its_own_first_frame_drawn_alone(model):
    clip = Clip(tuple(noise(32, 32, k) for k in range(5)), 8.0)
    same = model.generate(Request("a red cube", clip=clip, strength=0.0)).clips[0]
    kept = model.decode(model.encode(clip.frames[0]))[0]
    assert np.abs(levels(same.frames[0]) - levels(kept)).max() <= 1
    steps = []
    over = model.generate(Request("a red cube", clip=clip, strength=0.6, steps=5), steps.append).clips[0]
    assert len(over.frames) == 5 and [step.total for step in steps] == [6] * 6  # three steps, twice


@pytest.mark.parametrize(
    "fields", [{}, {"image": PICTURE}, {"frames": 9}, {"frames": 9, "image": PICTURE}, {"frames": 25}]
)
def test_work_is_counted_as_it_is_done_whichever_is_counted_first(model, fields):
    def asked(**more) -> Request:
        return model.complete(Request("a red cube", steps=2, **fields, **more))

    others = [
        Request("a red cube", frames=9),
        Request("a red cube", frames=9, image=PICTURE),
        Request("a red cube"),
    ]
    for other in others:
        work_of(model, model.complete(other))
    real = count_flops(lambda: model.generate(asked()))
    assert sum(by_stage(work_of(model, asked())).values()) == pytest.approx(real, rel=0.005)


def test_the_plan_has_room_for_levels_of_each_frame(model):
    """Where a beginning is known every token is told a level of its own, whether it was given or drawn."""
    alone, given = (
        planning.plan_clip(model, model.complete(replace(FILM, size=(64, 64), image=image)))
        for image in (None, noise(64, 64))
    )
    stages = [{stage.name: stage for stage in plan.stages} for plan in (alone, given)]
    assert stages[0]["denoise"].activations >= 0.98 * stages[1]["denoise"].activations


def test_a_layer_of_the_network_of_clips_is_named_where_the_first_frame_breaks(model):
    model.system.video.animator.dit.blocks[0].mlp.w_out.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError) as caught:
        model.generate(FILM)
    assert "blocks.0" in caught.value.layer


def test_the_card_says_so_plainly():
    with pytest.raises(InputError, match="first_alone must be true or false"):
        VideoConfig.from_dict({"first_alone": 1})
