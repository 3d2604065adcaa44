"""From a request to clips: as for pictures, one clip after the other, since each is as much work as a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sfumato.sampling import Step
from sfumato.tasks.canvas import beginning
from sfumato.tasks.latent import Origin
from sfumato.tasks.pixels import to_image, to_pixels
from sfumato.types import Clip, Request

if TYPE_CHECKING:
    from sfumato.generate import Model


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
