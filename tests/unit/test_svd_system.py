"""Stable Video Diffusion as a model: what it asks and refuses, and what it draws."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import plain, relative_error
from sfumato.errors import InputError
from sfumato.families.svd.shapes import IMAGE_ENCODER
from sfumato.generate import Model
from sfumato.tasks.canvas import first_picture
from sfumato.types import Clip, Control, HiRes, Motion, Request, Variation
from small_svd import CPU, REQUEST, SIZE, opened, picture, sampled, write


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write("svd", tmp_path_factory.mktemp("svd") / "model")


# --- requests ------------------------------------------------------------------------------------------------------


def test_what_a_request_leaves_open(place):
    request = opened(place).complete(Request(image=picture()))
    assert (request.frames, request.fps, request.guidance_first, request.guidance) == (14, 7, 1.0, 3.0)
    assert (request.steps, request.sampler, request.schedule, request.size) == (25, "euler", "karras", SIZE)
    assert request.fit == "cover" and request.strength is None and request.moves
    assert opened(place).complete(request) == request


def test_a_picture_is_brought_to_the_clip_s_size(place):
    model = opened(place)
    wide = Request(image=picture((200, 90)), frames=3)
    assert model.complete(wide).size == SIZE
    assert (
        model.complete(replace(wide, image=picture((90, 200)))).size == SIZE[::-1]
    )  # on end, as the picture is
    assert model.complete(replace(wide, image=picture((64, 64)))).size == SIZE
    complete = model.complete(replace(wide, size=(32, 48)))
    assert complete.size == (32, 48) and complete.image.size == (200, 90)
    shown = first_picture(complete)
    assert shown.size == (32, 48)
    stretched = first_picture(model.complete(replace(wide, size=(32, 48), fit="stretch")))
    assert np.abs(np.asarray(shown, int) - np.asarray(stretched, int)).mean() > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, '"small" sets a picture in motion; give an `image`'),
        ({"prompt": "a cat"}, '"small" reads no `prompt`; leave it out'),
        ({"negative": "blur"}, '"small" reads no `negative`; leave it out'),
        ({"strength": 0.5}, "strength goes with a `clip`"),
        ({"mask": picture()}, "mask is for pictures"),
        ({"outpaint": (8, 8, 8, 8)}, "outpaint is for pictures"),
        ({"hires": HiRes(2)}, "hires is for pictures"),
        ({"variation": Variation(1, 0.5)}, "variation is for pictures"),
        ({"controls": (Control("canny", picture()),)}, "controls is for pictures"),
        ({"size": (63, 48)}, "size 63x48 is not a multiple of 4 pixels; the nearest legal size is 64x48"),
        (
            {"frames": 1000, "size": (4096, 4096)},
            "are 16,777,216,000 pixels, and a clip has at most 1,500,000,000",
        ),
        ({"frames": 0}, "frames must be between 1 and 20000, not 0"),
        ({"frames": 2.5}, "frames must be a whole number"),
        ({"fps": 0.5}, "fps must be between 1 and 240, not 0.5"),
        ({"fps": float("nan")}, "fps must be between 1 and 240"),
        ({"guidance_first": -1.0}, "guidance_first must be between 0 and 100"),
        ({"motion": Motion(-1)}, "motion.bucket must be between 0 and 1023, not -1"),
        ({"motion": Motion(augment=float("inf"))}, "motion.augment must be between 0 and 10"),
        ({"motion": 127}, "motion must be of type Motion"),
        ({"reuse": 3}, "keeps no deep features"),
        ({"clip_skip": 2}, "clip_skip 2 is more than"),
        ({"prompt_rules": "comfy"}, "knows nothing of `prompt_rules`"),
    ],
    ids=plain,
)
def test_what_cannot_be_asked(place, changes, words):
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        opened(place).complete(replace(REQUEST, **changes))


def test_a_model_of_pictures_knows_nothing_of_clips(tiny_model):
    for changes in ({"frames": 4}, {"fps": 7.0}, {"guidance_first": 1.0}, {"motion": Motion()}):
        with pytest.raises(InputError, match=f"knows nothing of `{next(iter(changes))}`"):
            tiny_model.complete(Request("a red cube", **changes))


@pytest.fixture(scope="module")
def tiny_model() -> Model:
    from helpers import tiny_system

    return Model(tiny_system(), CPU, "tiny")


def test_a_request_and_its_json(place):
    request = opened(place).complete(replace(REQUEST, motion=Motion(40, 0.1)))
    values = json.loads(json.dumps(request.to_dict()))
    assert values["motion"] == {"bucket": 40, "augment": 0.1} and values["frames"] == 3
    assert Request.from_dict(values, [request.image]) == request
    assert Request.from_dict({"motion": {"bucket": 3}}).motion == Motion(3)


# --- drawing -------------------------------------------------------------------------------------------------------


def test_what_each_number_changes(place):
    model = opened(place)
    base = sampled(model)
    assert base.shape == (1, 4, 3, 12, 16)
    for changes in (
        {"seed": 4},
        {"fps": 20.0},
        {"motion": Motion(10)},
        {"motion": Motion(127, 0.5)},
        {"guidance": 6.0},
        {"guidance_first": 2.0},
        {"image": picture(seed=1)},
    ):
        assert relative_error(sampled(model, replace(REQUEST, **changes)), base) > 1e-4, changes
    steady = sampled(model, replace(REQUEST, guidance_first=3.0, guidance=3.0))
    rising = sampled(model, replace(REQUEST, guidance_first=1.0, guidance=3.0))
    assert relative_error(rising, steady) > 1e-3


def test_a_clip_is_drawn_and_its_recipe_draws_it_again(place):
    model = opened(place)
    result = model.generate(replace(REQUEST, motion=Motion(40)))
    [clip] = result.clips
    assert isinstance(clip, Clip) and len(clip.frames) == 3 and clip.fps == 7 and clip.seconds == 3 / 7
    again = model.generate(Request.from_dict(result.recipe["request"], [REQUEST.image]))
    assert [f.tobytes() for f in again.clips[0].frames] == [f.tobytes() for f in clip.frames]
    assert set(result.recipe["weights"]) == {"autoencoder", "denoiser", IMAGE_ENCODER}


def test_a_single_frame_is_a_picture_s_worth(place):
    """The network takes one; `sfumato animate` wants more."""
    latent = sampled(opened(place), replace(REQUEST, frames=2))
    assert latent.shape[2] == 2


def test_what_is_kept_in_memory_changes_no_number(place):
    drawn = {offload: sampled(opened(place, offload=offload)) for offload in ("none", "model", "sequential")}
    assert torch.equal(drawn["none"], drawn["model"]) and torch.equal(drawn["none"], drawn["sequential"])


def test_one_network_at_a_time_is_in_memory(place):
    model = opened(place, offload="model")
    networks, seen, order = model.system.networks, [], []
    openers = dict(networks.openers)

    def watched(name):
        def make():
            assert not any(there() is not None for there in seen)  # those before are gone
            made = openers[name]()
            order.append(name)
            seen.append(weakref.ref(made))
            return made

        return make

    networks.openers = {name: watched(name) for name in openers}
    model.generate(REQUEST)
    assert order == [IMAGE_ENCODER, "autoencoder", "denoiser", "autoencoder"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_narrower_types_stay_near(place, dtype):
    from sfumato.nn.quantized import can_quantize

    if dtype == torch.int8 and not can_quantize(torch.empty(1, dtype=torch.bfloat16)):
        pytest.skip("no eight-bit products here")
    exact = sampled(opened(place))
    assert relative_error(sampled(opened(place, dtype)).float(), exact) < 0.2


def test_a_preview_is_a_picture(place):
    model, seen = opened(place), []
    model.generate(REQUEST, on_step=lambda step: seen.append(model.preview(step.denoised)))
    assert len(seen) == 2 and all(image.size == (SIZE[0] // 4, SIZE[1] // 4) for image in seen)
