"""From noise, or from a picture, to a latent: by one model or by two, in one pass or in two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.drawing.finite import watched
from sfumato.drawing.request import enlarged_size, levels_of
from sfumato.drawing.script import Script, script
from sfumato.sampling import SeededNoise, Step, sampler_named
from sfumato.sampling.noise import Noise, SharedNoise
from sfumato.sampling.step import continued
from sfumato.sampling.variation import VariedNoise
from sfumato.tasks.canvas import Canvas
from sfumato.tasks.latent import (
    Origin,
    begin,
    cells_to_paint,
    enlarged,
    keeping,
    pixel_upscaler,
    steps_before,
)
from sfumato.tasks.pixels import to_pixels
from sfumato.types import Conditioning, HiRes, Request

if TYPE_CHECKING:
    from sfumato.generate import Model


def sample(
    model: Model,
    cond: Conditioning | Script,
    seeds: Sequence[int],
    request: Request,
    on_step: Callable[[Step], None] | None = None,
    origin: Origin | None = None,
    done: int = 0,
    noise: Noise | None = None,
) -> Tensor:
    """Noise, or what `origin` begins with, → normalised latents (B, C, T, H/f, W/f); see `Model.sample`.

    noise: in the place of the seeds' own, of the latents' shape.
    """
    assert (
        request.size
        and request.sampler
        and request.schedule
        and request.steps
        and request.guidance is not None
    )
    width, height = request.size
    shape = model.latent_shape(height, width, request.frames or 1)
    noise = noise or noise_of(model, seeds, shape, request)
    initial = noise.initial()
    sigmas = levels_of(model, request)
    path = model.system.parameterization.path
    if origin is None:
        x = initial * path.prior_scale(float(sigmas[0]))
    else:
        sigmas, x = begin(sigmas, origin, initial, path)
    if len(sigmas) == 1:
        return x
    sampler = sampler_named(request.sampler)
    if request.eta is not None:
        sampler = functools.partial(sampler, eta=request.eta)
    cells = None
    for drawer, told, first, last in _legs(model, cond, request, sigmas, done):
        channels = _inpaint_channels(drawer, origin, height, width)
        asked = replace(request if drawer is model else for_refiner(request), refine_at=None)
        make = functools.partial(drawer.denoiser, told, asked, channels)
        denoise = watched(drawer, make, told, asked, sigmas)
        cells = None
        if origin is not None and origin.mask is not None and channels is None:
            cells = cells_to_paint(origin.mask, *shape[-2:])
            denoise = keeping(denoise, origin.latent, cells, initial, path)
        more, hear = continued(noise, on_step, first, len(sigmas) - 1)
        x = sampler(denoise, x, sigmas[first : last + 1], path=path, noise=more, on_step=hear)
    return x if origin is None or cells is None else torch.where(cells, x, origin.latent)


def second_pass(
    model: Model,
    latent: Tensor,
    request: Request,
    hires: HiRes,
    on_step: Callable[[Step], None] | None,
    untouched: Image.Image | None,
) -> Tensor:
    """Latents of the request's size → of the enlarged size, drawn over. untouched: the picture they were encoded
    from, if nothing has been done to them."""
    assert request.size and request.steps
    width, height = size = enlarged_size(request.size, hires.scale, model.system.config.multiple)
    if pixel_upscaler(hires.upscaler):
        pictures = model.decode(latent) if untouched is None else [untouched] * len(latent)
        latent = model.encode([picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures])
    else:
        shape = model.latent_shape(height, width)
        latent = enlarged(latent, shape[-2], shape[-1], hires.upscaler)
    second = replace(
        request,
        size=size,
        steps=hires.steps or request.steps,
        image=None,  # the first pass has used it, and it is of the first pass's size
        strength=None,
        fit=request.fit if request.controls else None,
        hires=None,
    )
    origin = Origin(latent, hires.strength)
    done = request.steps
    return model.sample(model.condition(second, done=done), second.seeds(), second, on_step, origin, done)


def origin_of(model: Model, canvas: Canvas, request: Request) -> Origin:
    """What drawing on a canvas begins with: the picture encoded, and with a mask its pixels too."""
    assert request.strength is not None
    latent = model.encode(canvas.picture)
    if canvas.mask is None:
        return Origin(latent, request.strength)
    pixels = to_pixels(canvas.picture)[None].to(model.device)  # (1, 3, 1, H, W)
    mask = torch.from_numpy(np.asarray(canvas.mask) > 0).float()[None, None, None]  # (1, 1, 1, H, W)
    return Origin(latent, request.strength, pixels, mask.to(model.device))


def noise_of(model: Model, seeds: Sequence[int], shape: Sequence[int], request: Request) -> Noise:
    """The noise of each picture's seed, or between that and another's; shape: (C, T, H, W) of one. A clip's frames have
    so much of it in common as the model was trained with.
    """
    if request.variation is None:
        own, share = SeededNoise(seeds, shape, model.device, torch.float32), model.system.shared_noise
        return SharedNoise(own, share) if share and shape[1] > 1 else own
    others = [request.variation.seed + k for k in range(len(seeds))]
    return VariedNoise(seeds, others, request.variation.strength, shape, model.device, torch.float32)


def _legs(
    model: Model, cond: Conditioning | Script, request: Request, sigmas: Tensor, done: int
) -> list[tuple[Model, Conditioning | Script, int, int]]:
    """Who draws which steps: the model, what it is told, its first step, and the step after its last.

    A request with a second pass is refined in that pass alone, which draws over what the first had refined.
    """
    steps = len(sigmas) - 1
    drawn_over = request.hires is not None and request.hires.strength > 0
    if model.refiner is None or request.refine_at is None or drawn_over:
        return [(model, cond, 0, steps)]
    change = steps_before(sigmas, model.system.levels, request.refine_at)
    legs: list[tuple[Model, Conditioning | Script, int, int]] = [(model, cond, 0, change)] if change else []
    if change < steps:
        legs.append((model.refiner, script(model.refiner, for_refiner(request), done), change, steps))
    return legs


def for_refiner(request: Request) -> Request:
    """What a refiner is told of a request of its base's: it draws with LoRAs of its own, and without ControlNets."""
    fit = None if request.image is None else request.fit
    return replace(request, loras=None, controls=None, fit=fit)


def _inpaint_channels(model: Model, origin: Origin | None, height: int, width: int) -> Tensor | None:
    make = model.system.inpaint_channels
    if make is None:
        return None
    if origin is None or origin.mask is None or origin.pixels is None:
        pixels = torch.zeros(1, 3, 1, height, width, device=model.device)
        mask = torch.ones(1, 1, 1, height, width, device=model.device)
    else:
        pixels, mask = origin.pixels * (1 - origin.mask), origin.mask
    with model.precision():
        return make(pixels, mask).float()
