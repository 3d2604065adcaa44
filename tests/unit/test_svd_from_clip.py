"""Stable Video Diffusion that begins with a clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import plain, relative_error
from sfumato.drawing.clips import origin_of_clip
from sfumato.errors import InputError
from sfumato.tasks.pixels import to_image, to_pixels
from sfumato.types import Clip, Request
from small_svd import SIZE, frames_of, opened, picture, write


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write("svd", tmp_path_factory.mktemp("svd") / "model")


def test_what_a_clip_to_begin_with_leaves_open(place):
    request = opened(place).complete(Request(clip=frames_of(), steps=8))
    assert (request.frames, request.fps, request.strength, request.size) == (3, 12.0, 0.75, SIZE)
    assert request.image.tobytes() == request.clip.frames[0].tobytes()
    fewer = opened(place).complete(
        Request(clip=frames_of(4), frames=2, fps=7.0, image=picture(seed=9), steps=8)
    )
    assert (len(fewer.clip.frames), fewer.fps, fewer.image.tobytes()) == (2, 7.0, picture(seed=9).tobytes())
    values = json.loads(json.dumps(request.to_dict()))
    assert Request.from_dict(values, request.clip.frames) == request
    with pytest.raises(InputError, match="clip names 3 frames"):
        Request.from_dict({"clip": values["clip"]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 9}, "frames asks for 9, and the clip to begin with has 3"),
        ({"clip": Clip((picture(),), 7)}, "two frames or more"),
        ({"clip": Clip((picture(), picture((8, 8))), 7)}, "must have one size"),
        ({"clip": Clip((picture(), picture()), float("nan"))}, "a clip's fps must be between 0 and 240"),
        ({"clip": picture()}, "clip must be of type Clip"),
        ({"strength": 0.01}, "strength 0.01 of 8 steps is less than one step"),
        (
            {"clip": None, "image": picture(), "strength": 0.5},
            "strength goes with a `clip` to begin with",
        ),
    ],
    ids=plain,
)
def test_clips_that_nothing_begins_with(place, changes, words):
    with pytest.raises(InputError, match=words):
        opened(place).complete(replace(Request(clip=frames_of(), steps=8), **changes))


def test_strength_goes_from_the_clip_itself_to_noise_alone(place):
    """0 is the clip through the autoencoder, 1 is the clip from noise to the bit, and between them it parts slowly."""
    model = opened(place)
    base = Request(clip=frames_of(), seed=3, steps=8)

    def drawn(strength: float) -> Clip:
        return model.generate(replace(base, strength=strength)).clips[0]

    encoded = model.encode_pixels(torch.stack([to_pixels(f)[:, 0] for f in base.clip.frames], 1)[None])
    through = model.decode_pixels(encoded)[0]
    kept = drawn(0.0)
    for number, frame in enumerate(kept.frames):
        assert (
            np.abs(np.asarray(frame, int) - np.asarray(to_image(through[:, number : number + 1]), int)).max()
            <= 1
        )
    alone = model.generate(Request(image=base.clip.frames[0], seed=3, steps=8, frames=3, fps=12.0)).clips[0]
    assert [f.tobytes() for f in drawn(1.0).frames] == [f.tobytes() for f in alone.frames]
    latents = []
    for strength in (0.25, 0.5, 0.75):
        request = model.complete(replace(base, strength=strength))
        origin = origin_of_clip(model, request)
        latents.append(model.sample(model.condition(request), request.seeds(), request, origin=origin))
    parted = [relative_error(latent, encoded) for latent in latents]
    assert parted == sorted(parted)
