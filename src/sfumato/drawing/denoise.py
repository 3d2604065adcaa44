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
from sfumato.drawing.request import levels_of
from sfumato.drawing.script import Script, Voice, changing
from sfumato.sampling.reuse import Reuse
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.generate import Model

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


def denoiser(
    model: Model, cond: Conditioning | Script, request: Request, channels: Tensor | None = None
) -> Denoise:
    """denoise(x, sigma) → x0_hat for (B, C, T, H, W); see `Model.denoiser`.

    request: complete; of one that tells the same at every step `guidance` is enough.
    """
    assert request.guidance is not None
    system, preset = model.system, model.system.config.preset
    scale = 1.0 if getattr(system, "told_guidance", False) else request.guidance
    how = scale, request.guidance_interval or preset.interval, getattr(preset, "rescale", 0.0)
    voices = (Voice(((0, cond),)),) if isinstance(cond, Conditioning) else cond
    sigmas = torch.empty(0)
    if request.skip_layers is not None or any(len(voice.stages) > 1 for voice in voices):
        sigmas = levels_of(model, request)

    def saying(network: Network, voice: Voice, wanted: bool) -> Denoise:
        """By the network told both rows of a voice, or the wanted one alone."""

        def make(told: Conditioning) -> Denoise:
            if wanted:
                told = told.change(lambda rows: rows[: len(rows) // 2])
            return system.parameterization.denoiser(network, told)

        return changing(voice.stages, make, sigmas)

    first, *others = voices
    network = _network(model, request, channels)
    both = saying(network, first, wanted=False)
    skipping = None
    if (skip := request.skip_layers) is not None:
        lacking = saying(_network(model, request, channels, skip.layers), first, wanted=True)
        skipping = Skipping(lacking, skip.scale, share_interval(sigmas, *skip.interval))
    if not others:
        return cfg_batched(both, saying(network, first, wanted=True), *how, skipping)
    answers = [saying(_network(model, request, channels), voice, wanted=True) for voice in others]
    weights = [voice.weight for voice in voices]
    return composed_batched(both, answers, weights, *how, skipping)


def _network(
    model: Model, request: Request, channels: Tensor | None, skip_layers: tuple[int, ...] = ()
) -> Network:
    """network(x, time, told): the model's, told 2 rows that serve any batch, or as many rows as x. With `reuse` it
    remembers its own calls; with `skip_layers` it leaves these out."""
    system = model.system
    answer = system.network
    if skip_layers:
        answer = functools.partial(answer, skip_layers=skip_layers)
    elif request.reuse is not None and request.reuse > 1:
        answer = Reuse(system.split, request.reuse, getattr(system, "reuse_order", 0))

    def network(x: Tensor, level: Tensor, given: Conditioning) -> Tensor:
        if (each := len(x) // len(given)) > 1:
            given = given.change(lambda rows: rows.repeat_interleave(each, 0))
        if channels is not None:
            x = torch.cat([x, channels.expand(len(x), *channels.shape[1:])], 1)  # (B, C + E, T, H, W)
        with model.precision(), model.with_loras(request):
            return answer(x, level, given).float()

    return network
