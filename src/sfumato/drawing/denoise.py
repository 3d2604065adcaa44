"""A network, what it is told, and guidance: a denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.diffusion.guidance import Skipping, cfg_batched, composed_batched
from sfumato.diffusion.parameterization import Denoise
from sfumato.diffusion.schedules import share_interval
from sfumato.drawing.control import Acting, acting, controlled
from sfumato.drawing.request import levels_of
from sfumato.drawing.script import Script, Voice, changing
from sfumato.sampling.reuse import Reuse
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.generate import Model

Network = Callable[..., Tensor]


def denoiser(
    model: Model, cond: Conditioning | Script, request: Request, channels: Tensor | None = None
) -> Denoise:
    """denoise(x, sigma) → x0_hat for (B, C, T, H, W); see `Model.denoiser`.

    request: complete; of one that tells the same at every step `guidance` is enough.
    """
    assert request.guidance is not None
    system, preset = model.system, model.system.config.preset
    scale = 1.0 if system.told_guidance else scale_of(model, request)
    how = scale, request.guidance_interval or preset.interval, system.rescale
    voices = (Voice(((0, cond),)),) if isinstance(cond, Conditioning) else cond
    sigmas = torch.empty(0)
    if request.controls or request.skip_layers is not None or any(len(voice.stages) > 1 for voice in voices):
        sigmas = levels_of(model, request)

    controls = acting(model, request, sigmas) if request.controls else []
    make_network = functools.partial(_network, model, request, channels, controls)

    def saying(network: Network, voice: Voice, wanted: bool) -> Denoise:
        """By the network told both rows of a voice, or the wanted one alone."""

        def make(told: Conditioning) -> Denoise:
            if wanted:
                told = told.change(lambda rows: rows[: len(rows) // 2])
            answers = functools.partial(network, halves=not wanted)
            return system.parameterization.denoiser(answers, told)

        return changing(voice.stages, make, sigmas)

    first, *others = voices
    network = make_network()
    both = saying(network, first, wanted=False)
    skipping = None
    if (skip := request.skip_layers) is not None:
        lacking = saying(make_network(skip.layers), first, wanted=True)
        skipping = Skipping(lacking, skip.scale, share_interval(sigmas, *skip.interval))
    if not others:
        return cfg_batched(both, saying(network, first, wanted=True), *how, skipping)
    answers = [saying(make_network(), voice, wanted=True) for voice in others]
    weights = [voice.weight for voice in voices]
    return composed_batched(both, answers, weights, *how, skipping)


def scale_of(model: Model, request: Request) -> float | Tensor:
    """The scale of guidance; of a clip whose first frame has another than the last, (1, 1, T, 1, 1) for its latents."""
    assert request.guidance is not None
    first, last = request.guidance_first, request.guidance
    if first is None or first == last or not request.moves or request.size is None:
        return last
    frames = model.latent_shape(request.size[1], request.size[0], request.frames or 1)[1]
    return torch.linspace(first, last, frames, device=model.device).view(1, 1, -1, 1, 1)


def _network(
    model: Model,
    request: Request,
    channels: Tensor | None,
    controls: list[Acting],
    skip_layers: tuple[int, ...] = (),
) -> Network:
    """network(x, time, told): the model's, told 2 rows that serve any batch, or as many rows as x. With `reuse` it
    remembers its own calls; with `skip_layers` it leaves these out. halves: the rows are a wanted and an unwanted half.
    """
    system = model.system
    answer = system.network
    if skip_layers:
        answer = functools.partial(answer, skip_layers=skip_layers)
    elif request.reuse is not None and request.reuse > 1:
        answer = Reuse(system.split, request.reuse, system.reuse_order)

    def network(x: Tensor, level: Tensor, given: Conditioning, halves: bool = False) -> Tensor:
        if (each := len(x) // len(given)) > 1:
            given = given.change(lambda rows: rows.repeat_interleave(each, 0))
        if channels is not None:
            x = torch.cat([x, channels.expand(len(x), *channels.shape[1:])], 1)  # (B, C + E, T, H, W)
        with model.precision(), model.with_loras(request):
            return controlled(answer, controls, halves)(x, level, given).float()

    return network
