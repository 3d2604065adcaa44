"""From a request to clips: as for pictures, one clip after the other, since each is as much work as a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sfumato.errors import InputError
from sfumato.sampling import Step
from sfumato.tasks.canvas import beginning
from sfumato.tasks.latent import Origin
from sfumato.tasks.pixels import to_image, to_pixels
from sfumato.types import Clip, Request

if TYPE_CHECKING:
    from sfumato.generate import Model


def makes_clips(model: Model) -> bool:
    """Whether a model draws clips."""
    return "frames" in getattr(model.system, "reads", ())


def as_clip(model: Model, request: Request) -> Request:
    """The request as one for a clip, of as many frames as the model was made for where it says nothing of them.

    `InputError` for a model that draws none, and for a single frame.
    """
    if not makes_clips(model):
        raise InputError(
            f"{model.name!r} draws pictures and no clips; name a model that does", argument="model"
        )
    if request.frames is None and request.clip is None:
        request = replace(request, frames=model.preset["frames"])
    if request.frames == 1:
        raise InputError("a clip has 2 frames or more", argument="frames")
    return request


def draw_clips(model: Model, request: Request, on_step: Callable[[Step], None] | None) -> tuple[Clip, ...]:
    """The clips of a complete request: clip k is that of `request.part(k)` alone."""
    assert request.fps is not None
    origin = None if request.clip is None else origin_of_clip(model, request)
    clips = []
    for k in range(request.count):
        part = request.part(k)
        cond = model.condition(part)  # of each, since a seed may be in it
        latent = model.sample(cond, part.seeds(), part, on_step, origin)
        pixels = model.decode_pixels(latent)[0]  # (3, T, H, W)
        clips.append(Clip(tuple(to_image(frame[:, None]) for frame in pixels.unbind(1)), request.fps))
    return tuple(clips)


def origin_of_clip(model: Model, request: Request) -> Origin:
    """What drawing begins with where a complete request has a clip: its frames encoded."""
    assert request.strength is not None
    pixels = torch.cat([to_pixels(frame) for frame in beginning(request)], 1)[None]  # (1, 3, T, H, W)
    return Origin(model.encode_pixels(pixels), request.strength)
