"""A network, what it is told, and guidance: a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.diffusion.guidance import cfg_batched
from sfumato.sampling.reuse import Reuse
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.generate import Model


def denoiser(
    model: Model, cond: Conditioning, request: Request, channels: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """denoise(x, sigma) → x0_hat for (B, C, T, H, W).

    cond holds 2B rows, B wanted ones and then B to stay away from, or 2 rows that serve any B.
    request: complete, or its `guidance` alone. With `reuse` the answer depends on the calls before: take a new denoiser
    for each run of a sampler.
    channels: (1, E, T, H, W), more input for the network beside each sample.
    """
    scale = request.guidance
    assert scale is not None
    if getattr(model.system, "told_guidance", False):
        scale = 1.0
    wanted = cond.change(lambda rows: rows[: len(rows) // 2])
    parameterization = model.system.parameterization

    answer = model.system.network
    if request.reuse is not None and request.reuse > 1:
        answer = Reuse(model.system.split, request.reuse, getattr(model.system, "reuse_order", 0))

    def network(x: Tensor, level: Tensor, given: Conditioning) -> Tensor:
        if (each := len(x) // len(given)) > 1:
            given = given.change(lambda rows: rows.repeat_interleave(each, 0))
        if channels is not None:
            x = torch.cat([x, channels.expand(len(x), *channels.shape[1:])], 1)  # (B, C + E, T, H, W)
        with model.precision():
            return answer(x, level, given).float()

    return cfg_batched(
        parameterization.denoiser(network, cond),
        parameterization.denoiser(network, wanted),
        scale,
        request.guidance_interval or model.system.config.preset.interval,
        getattr(model.system.config.preset, "rescale", 0.0),
    )
