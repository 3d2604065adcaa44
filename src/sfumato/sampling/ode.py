"""Samplers that solve the probability-flow ODE one step at a time."""

from __future__ import annotations

import math

from torch import Tensor

from sfumato.diffusion.path import Path
from sfumato.sampling.step import Denoise, Noise, OnStep, draw, intervals, jump, level, move, report, slope


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """Euler's method (Karras et al. 2022, alg. 1 without churn), which is DDIM with eta 0.

    Order 1, one call a step. x: (B, …) at level sigmas[0]; sigmas: (S + 1,) decreasing, usually to 0; returns
    x at sigmas[-1]. `noise` is not used.
    """
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        x = jump(path, x, denoised, sigma, sigma_next)
        report(on_step, sigmas, i, x, denoised)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with EDM's churn (Karras et al. 2022, alg. 2).

    Order 2, two calls a step; the step to 0 is Euler's.
    churn: S_churn, 0 for none (then `noise` is not used); it acts where sigma/alpha lies in churn_range
    (S_tmin, S_tmax), with noise of standard deviation s_noise (S_noise).
    """
    for i, sigma, sigma_next in intervals(sigmas):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        if gamma and path.alpha(sigma) and churn_range[0] <= sigma / path.alpha(sigma) <= churn_range[1]:
            x, sigma = churned(path, x, sigma, gamma, s_noise, draw(noise, i))
        denoised = denoise(x, level(sigma))
        ahead = jump(path, x, denoised, sigma, sigma_next)
        if sigma_next > 0 and path.scale(sigma) > 0:
            first = slope(path, x, denoised, sigma)
            second = slope(path, ahead, denoise(ahead, level(sigma_next)), sigma_next)
            ahead = move(path, x, (first + second) / 2, sigma, sigma_next)
        x = ahead
        report(on_step, sigmas, i, x, denoised)
    return x


def dpm2(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """The midpoint method with the midpoint in log sigma, as k-diffusion writes DPM-Solver-2 (Lu et al. 2022,
    2206.00927, alg. 1).

    Order 2, two calls a step; the step to 0 is Euler's. `noise` is not used.
    """
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        ahead = jump(path, x, denoised, sigma, sigma_next)
        if sigma_next > 0 and path.scale(sigma) > 0:
            middle = midpoint(path, sigma, sigma_next)
            halfway = jump(path, x, denoised, sigma, middle)
            direction = slope(path, halfway, denoise(halfway, level(middle)), middle)
            ahead = move(path, x, direction, sigma, sigma_next)
        x = ahead
        report(on_step, sigmas, i, x, denoised)
    return x


def midpoint(path: Path, sigma: float, sigma_next: float) -> float:
    """The level whose sigma/s is the geometric mean of the two (s straightens the path)."""
    if path.scale is path.alpha:
        return path.sigma_at((path.half_log_snr(sigma) + path.half_log_snr(sigma_next)) / 2)
    return math.sqrt(sigma * sigma_next)


def churned(
    path: Path, x: Tensor, sigma: float, gamma: float, s_noise: float, noise: Tensor
) -> tuple[Tensor, float]:
    """Raise sigma/alpha by the factor 1 + gamma with fresh noise, keeping x on the path."""
    raised = path.from_ratio(sigma / path.alpha(sigma) * (1 + gamma))
    share = path.alpha(raised) / path.alpha(sigma)
    added = math.sqrt(raised**2 - (share * sigma) ** 2)
    return share * x + (s_noise * added) * noise, raised
