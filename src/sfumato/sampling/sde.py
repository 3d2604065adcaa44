"""Samplers that put fresh noise in at every step: the reverse SDE and its ancestral chains."""

from __future__ import annotations

import math

from torch import Tensor

from sfumato.diffusion.path import Path
from sfumato.errors import InputError
from sfumato.sampling.step import (
    Denoise,
    Noise,
    OnStep,
    draw,
    fresh_share,
    intervals,
    jump,
    level,
    renew,
    report,
)


def euler_a(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method to below the next level, then fresh noise back up: k-diffusion's ancestral sampler.

    One call a step. It is DDIM's chain (Song et al. 2021, eqs. 12, 16). eta: 0 gives `euler`, 1 DDPM's chain;
    s_noise: standard deviation of the fresh noise.
    """
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        kept, fresh = renew(path, sigma, sigma_next, eta)
        x = jump(path, x, denoised, sigma, sigma_next, kept)
        if fresh:
            x = x + (s_noise * fresh) * draw(noise, i)
        report(on_step, sigmas, i, x, denoised)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eqs. 12, 16): `euler_a` with eta 0, where it equals `euler`, by default."""
    return euler_a(denoise, x, sigmas, path=path, noise=noise, on_step=on_step, eta=eta)


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    variance: str = "small",
) -> Tensor:
    """The DDPM chain (Ho et al. 2020, alg. 2) on the given levels, one call a step.

    variance: "small" is that of the posterior q(x' | x, x0) (eq. 7; then it equals `euler_a`), "large" that
    of q(x | x') (beta; sec. 3.2). A step to 0 adds no noise.
    """
    if variance not in ("small", "large"):
        raise InputError(f"variance of ddpm must be small or large, not {variance!r}", argument="variance")
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        kept, _ = renew(path, sigma, sigma_next, 1.0)
        x = jump(path, x, denoised, sigma, sigma_next, kept)
        if sigma_next > 0:
            spread = (sigma_next if variance == "small" else sigma) * math.sqrt(
                fresh_share(path, sigma, sigma_next)
            )
            x = x + spread * draw(noise, i)
        report(on_step, sigmas, i, x, denoised)
    return x


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """Multistep consistency sampling: believe x0_hat, renoise it whole (Song et al. 2023, alg. 1; LCM, Luo et
    al. 2023, 2310.04378, alg. 3). One call a step, for distilled models; a step to 0 adds no noise.
    """
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        x = path.alpha(sigma_next) * denoised
        if sigma_next > 0:
            x = x + sigma_next * draw(noise, i)
        report(on_step, sigmas, i, x, denoised)
    return x


def dpmpp_2s_a(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, 2211.01095, alg. 1, r = 1/2) to a lower level, then noise back up.

    Two calls a step. eta: 0 is the plain solver, of order 2. A step from no signal, or to 0, is of order 1.
    """
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        kept, fresh = renew(path, sigma, sigma_next, eta)
        ahead = denoised
        if kept > 0 and path.alpha(sigma) > 0:
            arrival = math.log(path.alpha(sigma_next) / kept)  # lambda before the noise goes back in
            middle = path.sigma_at((path.half_log_snr(sigma) + arrival) / 2)
            ahead = denoise(jump(path, x, denoised, sigma, middle), level(middle))
        x = jump(path, x, ahead, sigma, sigma_next, kept)
        if fresh:
            x = x + (s_noise * fresh) * draw(noise, i)
        report(on_step, sigmas, i, x, denoised)
    return x


def dpmpp_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Tensor:
    """Single-step DPM-Solver++ for the SDE (Lu et al. 2022, 2211.01095, alg. 1 with k-diffusion's noise).

    Two calls a step. Both stages of a step follow one Brownian motion in sigma/alpha: the whole step's noise
    contains the noise of its first part. eta: 0 is the ODE, of order 2; r: where in lambda the inner level
    lies.
    """
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        ahead, whole = denoised, None
        if sigma_next > 0 and path.alpha(sigma) > 0:
            lam, lam_next = path.half_log_snr(sigma), path.half_log_snr(sigma_next)
            middle = path.sigma_at(lam + r * (lam_next - lam))
            kept, fresh = renew(path, sigma, middle, eta)
            halfway = jump(path, x, denoised, sigma, middle, kept)
            if fresh:
                part = draw(noise, i)
                halfway = halfway + (s_noise * fresh) * part
                share = brownian_share(path, sigma, middle, sigma_next)
                whole = math.sqrt(share) * part + math.sqrt(1 - share) * draw(noise, i, 1)
            ahead = denoised + (denoise(halfway, level(middle)) - denoised) / (2 * r)
        kept, fresh = renew(path, sigma, sigma_next, eta)
        x = jump(path, x, ahead, sigma, sigma_next, kept)
        if fresh:
            x = x + (s_noise * fresh) * (draw(noise, i) if whole is None else whole)
        report(on_step, sigmas, i, x, denoised)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    variant: str = "midpoint",
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, sec. 5 and eq. 18), one call a step.

    eta: the SDE's noise, as a factor of the reverse SDE's: e^(−eta h) of the noise in x outlives a step of
    length h in lambda; 0 gives the ODE and, with variant "midpoint", `dpmpp_2m`.
    variant: how the change of x0_hat enters: "midpoint" (its value in the middle of the step) or "heun" (its
    exact integral).
    """
    if variant not in ("midpoint", "heun"):
        raise InputError(
            f"variant of dpmpp_2m_sde must be midpoint or heun, not {variant!r}", argument="variant"
        )
    before: Tensor | None = None
    h_before = math.inf
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        h = path.half_log_snr(sigma_next) - path.half_log_snr(sigma)
        ahead = denoised
        if before is not None and math.isfinite(h) and math.isfinite(h_before):
            length = h * (1 + eta)
            place = 0.5 if variant == "midpoint" else -1 / math.expm1(-length) - 1 / length
            ahead = denoised + (place * h / h_before) * (denoised - before)
        outliving = math.exp(-eta * h) if eta else 1.0
        x = jump(path, x, ahead, sigma, sigma_next, sigma_next * outliving)
        fresh = sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
        if fresh:
            x = x + (s_noise * fresh) * draw(noise, i)
        before, h_before = denoised, h
        report(on_step, sigmas, i, x, denoised)
    return x


def brownian_share(path: Path, sigma: float, middle: float, sigma_next: float) -> float:
    """The part of a step's Brownian time before `middle`; time is sigma/alpha, as in k-diffusion."""
    start, inner, end = (s / path.alpha(s) for s in (sigma, middle, sigma_next))
    return (start - inner) / (start - end)
