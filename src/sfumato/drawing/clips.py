"""From a request to clips: as for pictures, one clip after the other, since each is as much work as a batch.

A model may draw only so many latents together (`window`), and the first one by itself, as a picture (`first_alone`; Emu
Video, Girdhar et al. 2023, 2311.10709). Then a film is drawn in stretches: each goes on from the last latents of the
one before, which the network is shown as known. The noise is the whole film's, so that a stretch has what is its own by
the film's seed; a first latent by itself has other noise, which the frames after it have no part in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sfumato import checks
from sfumato.drawing.sample import noise_of, sample
from sfumato.drawing.script import Script
from sfumato.errors import InputError
from sfumato.runtime import Clock
from sfumato.sampling import Step
from sfumato.sampling.noise import Noise
from sfumato.tasks.canvas import beginning
from sfumato.tasks.latent import Origin
from sfumato.tasks.pixels import to_image, to_pixels
from sfumato.types import Clip, Conditioning, Request
from sfumato.video.frames import Frames, on_disk

if TYPE_CHECKING:
    from sfumato.generate import Model

ALONE = 1 << 18  # draws of noise from here on are those of a first latent that is drawn by itself


def makes_clips(model: Model) -> bool:
    """Whether a model draws clips."""
    return bool(model.system.clip_preset)


def as_clip(model: Model, request: Request) -> Request:
    """The request as one for a clip, of as many frames as the clip that it begins with has, or else as the model was
    made for, where it says nothing of them.

    `InputError` for a model that draws none, and for a single frame.
    """
    if not makes_clips(model):
        raise InputError(
            f"{checks.shown(model.name)} draws pictures and no clips; name a model that does",
            argument="model",
        )
    if request.frames is None:
        frames = model.clip_preset["frames"] if request.clip is None else len(request.clip.frames)
        request = replace(request, frames=frames)
    if request.frames == 1:
        raise InputError("frames must be 2 or more for a clip, not 1", argument="frames")
    return request


def draw_clips(
    model: Model, request: Request, on_step: Callable[[Step], None] | None, clock: Clock
) -> tuple[Clip, ...]:
    """The clips of a complete request: clip k is that of `request.part(k)` alone. clock: of its stages.

    Frames that are too many for memory together (`video.frames`) go to the disk as they are decoded.
    """
    assert request.fps is not None and request.frames is not None and request.size is not None
    keep = Frames if on_disk(request.count * request.frames, request.size) else tuple
    origin = None if request.clip is None else origin_of_clip(model, request)
    clock.lap("encode", origin is not None)
    clips = []
    for k in range(request.count):
        part = request.part(k)
        cond = model.condition(part)  # of each, since a seed may be in it
        clock.lap("text")
        latent = _film(model, cond, part, on_step, origin)
        clock.lap("denoise")
        clips.append(Clip(keep(_frames(model, latent)), request.fps))
        clock.lap("decode")
    return tuple(clips)


def _frames(model: Model, latent: Tensor) -> Iterator[Image.Image]:
    """The pictures of one clip's latents, decoded as they are asked for."""
    for pixels in model.decode_pieces(latent):  # (1, 3, t, H, W)
        for frame in pixels[0].unbind(1):
            yield to_image(frame[:, None])


@dataclass(frozen=True)
class Stretch:
    """The part of a film's noise that belongs to the latents `start` … `stop − 1`. draw: of other noise like it."""

    whole: Noise
    start: int
    stop: int
    draw: int = 0

    def initial(self) -> Tensor:
        return self.whole.initial(self.draw)[:, :, self.start : self.stop]

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        return self.whole(step, self.draw + draw)[:, :, self.start : self.stop]


def _film(
    model: Model,
    cond: Conditioning | Script,
    request: Request,
    on_step: Callable[[Step], None] | None,
    origin: Origin | None,
) -> Tensor:
    """Normalised latents (1, C, T, H/f, W/f) of a complete request for one clip."""
    assert request.size and request.frames and request.steps
    shape = model.latent_shape(request.size[1], request.size[0], request.frames)
    stretches = drawn_together(model, request, shape[1])
    if len(stretches) == 1 or not isinstance(cond, Conditioning):
        return model.sample(cond, request.seeds(), request, on_step, origin)
    noise = noise_of(model, request.seeds(), shape, request)
    film: Tensor | None = None
    for number, (start, stop) in enumerate(stretches):
        told = cond
        if film is not None:
            known = film[:, :, start:].expand(len(cond), -1, -1, -1, -1)
            told = replace(cond, channels=known)
        begin = None if origin is None else replace(origin, latent=origin.latent[:, :, start:stop])
        hear = None if on_step is None else _counted(on_step, number, len(stretches))
        own = Stretch(noise, start, stop)
        if stop == 1:
            own = Stretch(noise_of(model, request.seeds(), (shape[0], 1, *shape[2:]), request), 0, 1, ALONE)
        drawn = sample(model, told, request.seeds(), request, hear, begin, noise=own)
        film = drawn if film is None else torch.cat([film[:, :, :start], drawn], 2)
    assert film is not None
    return film


def drawn_together(model: Model, request: Request, latents: int) -> list[tuple[int, int]]:
    """(first, stop) of the latents that are drawn together of what a request asks for: all of a picture, and of a clip
    of a model that has no `window`. Else all stretches but the first begin with latents that the one before has drawn.
    """
    window, context = model.system.window or (latents, 0)
    stretches = [(0, min(latents, window))]
    if model.system.first_alone and latents > 1 and not request.first_given:
        stretches.insert(0, (0, 1))
    while (stop := stretches[-1][1]) < latents:
        stretches.append((stop - context, min(latents, stop - context + window)))
    return stretches


def _counted(hear: Callable[[Step], None], number: int, stretches: int) -> Callable[[Step], None]:
    """Steps as those of all stretches together."""

    def told(step: Step) -> None:
        hear(replace(step, index=step.index + number * step.total, total=stretches * step.total))

    return told


def origin_of_clip(model: Model, request: Request) -> Origin:
    """What drawing begins with where a complete request has a clip: its frames encoded."""
    assert request.strength is not None
    pixels = torch.cat([to_pixels(frame) for frame in beginning(request)], 1)[None]  # (1, 3, T, H, W)
    return Origin(model.encode_pixels(pixels), request.strength)
