"""Guidance: a denoiser made from denoisers. Samplers and networks know nothing of it.

Everything acts on x0_hat. For classifier-free guidance that changes nothing (noise, v and flow predictions
are affine in x0_hat with the same coefficients for both branches); the rescale is defined on x0_hat here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.parameterization import Denoise

ALWAYS = (0.0, math.inf)


@dataclass(frozen=True)
class Skipping:
    """Skip-layer guidance: guided + scale · (cond − skipping), away from what the network answers without some of its
    layers (Hyung et al. 2024, 2411.18664; for SD 3.5 Medium Stability's sd3_impls.py, and diffusers' pipeline).

    denoise: the conditional branch by a network that leaves layers out. interval: act only where low < sigma <= high;
    elsewhere nothing is called. It comes on top of other guidance, and after its rescaling.
    """

    denoise: Denoise
    scale: float
    interval: tuple[float, float] = ALWAYS

    def added(self, guided: Tensor, cond: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """What the guided estimate becomes; cond: the estimate of the conditional branch by the whole network."""
        level = torch.as_tensor(sigma)
        inside = (level > self.interval[0]) & (level <= self.interval[1])
        if self.scale == 0 or not inside.any():
            return guided
        pushed = guided + self.scale * (cond - self.denoise(x, sigma))
        rows = inside.to(x.device).view(-1, *[1] * (x.ndim - 1))
        return pushed if inside.all() else torch.where(rows, pushed, guided)


def cfg(
    denoise_cond: Denoise,
    denoise_uncond: Denoise,
    scale: float | Tensor,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
    skipping: Skipping | None = None,
) -> Denoise:
    """Classifier-free guidance: uncond + scale · (cond − uncond)  (Ho & Salimans 2022, eq. 6; scale = 1 + w).

    scale: 1 is no guidance; a tensor must broadcast against x (a scale per frame, say).
    interval: guide only where low < sigma <= high (Kynkäänniemi et al. 2024, eq. 5); elsewhere one call does.
    rescale: see `rescaled`. skipping: guidance on top, with one call more.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        cond = guided = denoise_cond(x, sigma)
        here = _scale_at(scale, interval, sigma, x)
        if here is not None:
            guided = _guided(cond, denoise_uncond(x, sigma), here, rescale)
        return guided if skipping is None else skipping.added(guided, cond, x, sigma)

    return denoise


def cfg_batched(
    denoise_both: Denoise,
    denoise_cond: Denoise,
    scale: float | Tensor,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
    skipping: Skipping | None = None,
) -> Denoise:
    """`cfg` with one network call for both branches.

    denoise_both: closed over the conditions of a doubled batch, conditional half first; it is given (2B, …).
    denoise_cond: closed over the conditional half alone; used outside the interval.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        here = _scale_at(scale, interval, sigma, x)
        if here is None:
            cond = guided = denoise_cond(x, sigma)
        else:
            cond, uncond = _both(denoise_both, x, sigma)
            guided = _guided(cond, uncond, here, rescale)
        return guided if skipping is None else skipping.added(guided, cond, x, sigma)

    return denoise


def composed_batched(
    denoise_both: Denoise,
    denoise_others: Sequence[Denoise],
    weights: Sequence[float],
    scale: float | Tensor,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
    skipping: Skipping | None = None,
) -> Denoise:
    """Conditions that hold together: uncond + scale · Σ w_i (cond_i − uncond)  (Liu et al. 2022, 2206.01714, eq. 11).

    denoise_both: as in `cfg_batched`, for the first condition; denoise_others: one for each of the rest. weights: of
    all of them. Where nothing is guided the scale is 1. skipping: about the first condition.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        first, uncond = _both(denoise_both, x, sigma)
        conds = [first, *(denoise_other(x, sigma) for denoise_other in denoise_others)]
        cond = uncond.clone()
        for weight, each in zip(weights, conds, strict=True):
            cond += weight * (each - uncond)
        here = _scale_at(scale, interval, sigma, x)
        guided = cond if here is None else _guided(cond, uncond, here, rescale)
        return guided if skipping is None else skipping.added(guided, first, x, sigma)

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
