"""Guidance: a denoiser made from denoisers. Samplers and networks know nothing of it.

Everything acts on x0_hat. For classifier-free guidance that changes nothing (noise, v and flow predictions
are affine in x0_hat with the same coefficients for both branches); the rescale is defined on x0_hat here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    interval: guide only where low < sigma <= high (Kynkäänniemi et al. 2024, eq. 5); elsewhere one call does.
    rescale: see `rescaled`.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        cond = denoise_cond(x, sigma)
        here = _scale_at(scale, interval, sigma, x)
        return cond if here is None else _guided(cond, denoise_uncond(x, sigma), here, rescale)

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
        here = _scale_at(scale, interval, sigma, x)
        if here is None:
            return denoise_cond(x, sigma)
        return _guided(*_both(denoise_both, x, sigma), here, rescale)

    return denoise


def composed_batched(
    denoise_both: Denoise,
    denoise_others: Sequence[Denoise],
    weights: Sequence[float],
    scale: float | Tensor,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
) -> Denoise:
    """Conditions that hold together: uncond + scale · Σ w_i (cond_i − uncond)  (Liu et al. 2022, 2206.01714, eq. 11).

    denoise_both: as in `cfg_batched`, for the first condition; denoise_others: one for each of the rest. weights: of
    all of them. Where nothing is guided the scale is 1.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        first, uncond = _both(denoise_both, x, sigma)
        conds = [first, *(denoise_other(x, sigma) for denoise_other in denoise_others)]
        cond = uncond.clone()
        for weight, each in zip(weights, conds, strict=True):
            cond += weight * (each - uncond)
        here = _scale_at(scale, interval, sigma, x)
        return cond if here is None else _guided(cond, uncond, here, rescale)

    return denoise


def _both(denoise_both: Denoise, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """One call for the answers with and without the condition."""
    levels = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
    cond, uncond = denoise_both(torch.cat([x, x]), levels).chunk(2)
    return cond, uncond


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


def _scale_at(
    scale: float | Tensor, interval: tuple[float, float], sigma: float | Tensor, x: Tensor
) -> float | Tensor | None:
    """The scale at these levels: 1 for rows outside the interval, None if nothing is guided."""
    if not isinstance(scale, Tensor) and scale == 1:
        return None
    if interval == ALWAYS:
        return scale
    level = torch.as_tensor(sigma)
    inside = (level > interval[0]) & (level <= interval[1])
    if not inside.any():
        return None
    if inside.all():
        return scale
    rows = inside.to(x.device).view(-1, *[1] * (x.ndim - 1))
    return torch.where(
        rows, torch.as_tensor(scale, dtype=x.dtype, device=x.device), torch.ones_like(x[:, :1])
    )
