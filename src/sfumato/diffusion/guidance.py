"""Guidance: a denoiser made from denoisers. Samplers and networks know nothing of it.

Everything acts on x0_hat. For classifier-free guidance that changes nothing (noise, v and flow predictions
are affine in x0_hat with the same coefficients for both branches); the rescale is defined on x0_hat here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.diffusion.parameterization import Denoise

ALWAYS = (0.0, math.inf)


def cfg(
    denoise_cond: Denoise,
    denoise_uncond: Denoise,
    scale: float | Tensor,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance: uncond + scale · (cond − uncond)  (Ho & Salimans 2022, eq. 6; scale = 1 + w).

    scale: 1 is no guidance; a tensor must broadcast against x (a scale per frame, say).
    interval: guide only where low < sigma <= high (Kynkäänniemi et al. 2024, eq. 5), else one call does; with an
        interval sigma must be one level for the whole batch, as samplers give it.
    rescale: see `rescaled`.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        cond = denoise_cond(x, sigma)
        if _unguided(scale, interval, sigma):
            return cond
        return _guided(cond, denoise_uncond(x, sigma), scale, rescale)

    return denoise


def cfg_batched(
    denoise_both: Denoise,
    denoise_cond: Denoise,
    scale: float | Tensor,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
) -> Denoise:
    """`cfg` with one network call for both branches.

    denoise_both: closed over the conditions of a doubled batch, conditional half first; it is given (2B, …).
    denoise_cond: closed over the conditional half alone; used outside the interval.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if _unguided(scale, interval, sigma):
            return denoise_cond(x, sigma)
        both = torch.cat([sigma, sigma]) if sigma.ndim else sigma
        cond, uncond = denoise_both(torch.cat([x, x]), both).chunk(2)
        return _guided(cond, uncond, scale, rescale)

    return denoise


def rescaled(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """Pull each sample's deviation back to that of `cond` (Lin et al. 2023, 2305.08891, eqs. 14–16).

    amount: 0 leaves `guided`, 1 restores the deviation whole; the paper uses 0.7. The mean is scaled too.
    """
    axes = list(range(1, guided.ndim))
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-12)
    return guided * (1 + amount * (ratio - 1))


def _guided(cond: Tensor, uncond: Tensor, scale: float | Tensor, rescale: float) -> Tensor:
    guided = uncond + scale * (cond - uncond)
    return rescaled(guided, cond, rescale) if rescale else guided


def _unguided(scale: float | Tensor, interval: tuple[float, float], sigma: Tensor) -> bool:
    if not isinstance(scale, Tensor) and scale == 1:
        return True
    return interval != ALWAYS and not interval[0] < float(sigma) <= interval[1]
