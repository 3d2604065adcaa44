"""What drawing a clip with pocket takes in memory: its own code, run on tensors without numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sfumato.families.published.trace import HOLES, WHOLE
from sfumato.flops import module_size
from sfumato.memory import Stage, tracing
from sfumato.types import Request

if TYPE_CHECKING:
    from sfumato.families.pocket.system import System

PIXELS = 3 * 4  # bytes of a pixel that is decoded


def trace_clip(system: System, request: Request, window: int) -> tuple[Stage, ...]:
    """The stages of drawing one clip of a complete request, of which `window` latents are drawn together.

    Weights are all there in every stage. The film's own latents and pixels are counted with the stage that makes them.
    """
    assert request.size and request.frames and system.video is not None
    width, height = request.size
    shape = system.latent_shape(request.frames, height, width)
    C, T, H, W = shape
    device = system.device
    with torch.inference_mode():
        cond = system.condition([request.prompt, None], Request(request.prompt, frames=request.frames))
    marks = []
    with tracing(WHOLE) as tracer:
        x = torch.empty(2, C, min(window, T), H, W, device=device)
        time = torch.empty(2, device=device)
        _, network = tracer.worst(lambda: system.network(x, time, cond))
        marks.append(tracer.flops)
        film = torch.empty(1, *shape, device=device)
        _, decoding = tracer.worst(lambda: system.decode(film))
        marks.append(tracer.flops)
        encoding = 0
        if request.image is not None or request.clip is not None:
            frames = request.frames if request.clip is not None else 1
            pixels = torch.empty(1, 3, frames, height, width, device=device)
            _, encoding = tracer.worst(lambda: system.encode(pixels))
    parts = system.autoencoder, system.denoiser, system.video.temporal, system.video.animator
    weights = module_size(*parts).bytes
    latents = 2 * C * T * H * W * 4
    pixels_of_all = request.frames * width * height * PIXELS
    holes = 1 + HOLES if device.type == "cpu" else 1
    stages = [
        Stage("denoise", weights, round(holes * network) + latents, marks[0]),
        Stage("decode", weights, round(holes * decoding) + latents + pixels_of_all, marks[1] - marks[0]),
    ]
    if encoding:
        stages.insert(0, Stage("encode", weights, round(holes * encoding)))
    return tuple(stages)
