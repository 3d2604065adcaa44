"""From a request to clips: as for pictures, one clip after the other, since each is as much work as a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sfumato.sampling import Step
from sfumato.tasks.pixels import to_image
from sfumato.types import Clip, Request

if TYPE_CHECKING:
    from sfumato.generate import Model


def draw_clips(model: Model, request: Request, on_step: Callable[[Step], None] | None) -> tuple[Clip, ...]:
    """The clips of a complete request: clip k is that of `request.part(k)` alone."""
    assert request.fps is not None
    clips = []
    for k in range(request.count):
        part = request.part(k)
        cond = model.condition(part)  # of each, since a seed may be in it
        latent = model.sample(cond, part.seeds(), part, on_step)
        pixels = model.decode_pixels(latent)[0]  # (3, T, H, W)
        clips.append(Clip(tuple(to_image(frame[:, None]) for frame in pixels.unbind(1)), request.fps))
    return tuple(clips)
