"""What drawing with pocket takes in memory: its own code, run on tensors without numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.families.published.trace import HOLES, WHOLE
from sfumato.flops import module_size
from sfumato.memory import Stage, Tracer, tracing
from sfumato.types import Conditioning, Request
from sfumato.video.frames import in_memory

if TYPE_CHECKING:
    from sfumato.families.pocket.system import System

PIXELS = 3 * 4  # bytes of a pixel that is decoded
PICTURE = 3  # of one in a picture that is done
ALIKE = 3  # pieces of a film that are decoded: those after them are as the last of these


def trace_pictures(
    system: System, request: Request, size: tuple[int, int], batch: int, encodes: bool
) -> tuple[Stage, ...]:
    """The stages of drawing the pictures of a complete request at `size`, `batch` of them together. ControlNets are not
    counted. encodes: drawing begins with a picture.

    Weights are all there in every stage, as are the pictures that are done.
    """
    width, height = size
    shape = system.latent_shape(1, height, width)
    rows = 1 if request.guidance == 1 else 2
    with torch.inference_mode():
        cond = system.condition([request.prompt, request.negative][:rows], Request(request.prompt))
        cond = cond.change(lambda told: told.repeat_interleave(batch, 0))
    kept = 2 * batch * math.prod(shape) * 4 + request.count * width * height * PICTURE
    decoded = batch * width * height * PIXELS
    pixels = (1, 3, 1, height, width) if encodes else None
    drawn, latents = (rows * batch, *shape), (batch, *shape)
    return _stages(system, cond, drawn, latents, pixels, kept=kept, decoded=decoded, clips=False)


def trace_clip(system: System, request: Request, window: int) -> tuple[Stage, ...]:
    """The stages of drawing one clip of a complete request, of which `window` latents are drawn together.

    Weights are all there in every stage. The film's own latents are counted with the stage that makes them, and its
    frames while they are kept in memory (`video.frames`); decoded, it is never whole.
    """
    assert request.size and request.frames and system.video is not None
    width, height = request.size
    shape = system.latent_shape(request.frames, height, width)
    C, T, H, W = shape
    known = int(request.first_given or system.first_alone or window < T)
    with torch.inference_mode():
        cond = system.condition([request.prompt, None], Request(request.prompt, frames=request.frames))
        cond = replace(cond, channels=torch.empty(2, C, known, H, W, device=system.device))
    pixels = None
    if request.image is not None or request.clip is not None:
        pixels = (1, 3, request.frames if request.clip is not None else 1, height, width)
    kept = 2 * math.prod(shape) * 4
    decoded = in_memory(request.count * request.frames, request.size)
    drawn, film = (2, C, min(window, T), H, W), (1, *shape)
    return _stages(system, cond, drawn, film, pixels, kept=kept, decoded=decoded, clips=True)


def _stages(
    system: System,
    cond: Conditioning,
    drawn: tuple[int, ...],
    latents: tuple[int, ...],
    pixels: tuple[int, ...] | None,
    *,
    kept: int,
    decoded: int,
    clips: bool,
) -> tuple[Stage, ...]:
    """Each stage by one call. drawn: shape of what the network is shown, `cond` its rows; latents: of what is decoded;
    pixels: of what is encoded first. kept, decoded: bytes beside those calls, and of the pixels. clips: with the parts
    for clips.
    """
    device = system.device
    marks = []
    with tracing(WHOLE) as tracer:
        x, time = torch.empty(drawn, device=device), torch.empty(drawn[0], device=device)
        _, network = tracer.worst(lambda: system.network(x, time, cond))
        marks.append(tracer.flops)
        whole = torch.empty(latents, device=device)
        _, decoding = tracer.worst(
            lambda: _decode_pieces(system, whole, tracer) if clips else system.decode(whole)
        )
        marks.append(tracer.flops)
        encoding = 0
        if pixels is not None:
            picture = torch.empty(pixels, device=device)
            _, encoding = tracer.worst(lambda: system.encode(picture))
    parts = [system.autoencoder, system.denoiser]
    if clips and system.video is not None:
        parts += [system.video.temporal, system.video.animator]
    weights = module_size(*parts).bytes
    holes = 1 + HOLES if device.type == "cpu" else 1
    stages = [
        Stage("denoise", weights, round(holes * network) + kept, marks[0]),
        Stage("decode", weights, round(holes * decoding) + kept + decoded, marks[1] - marks[0]),
    ]
    if encoding:
        stages.insert(0, Stage("encode", weights, round(holes * encoding)))
    return tuple(stages)


def _decode_pieces(system: System, latent: Tensor, tracer: Tracer) -> None:
    """As `Model.decode_pieces` has it: a piece is there, and is clamped, while the next one is decoded."""
    left, flops, frames = system.frames_of(latent.shape[2]), 0, 1
    before = tracer.flops
    clamped = (piece.clamp(-1, 1) for piece in system.decode_pieces(latent))
    for pixels in itertools.islice(clamped, ALIKE):
        flops, frames, before = tracer.flops - before, pixels.shape[2], tracer.flops
        left -= frames
    tracer.flops += left * flops // frames
