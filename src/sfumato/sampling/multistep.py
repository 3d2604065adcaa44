"""Samplers that remember earlier answers of the denoiser: one call a step at any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.diffusion.path import Path
from sfumato.errors import InputError
from sfumato.sampling.step import Denoise, Noise, OnStep, intervals, jump, level, move, report, slope


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, alg. 2).

    Order 2, one call a step. x0_hat is extrapolated linearly in lambda = log(alpha / sigma) to the middle of
    the step. The first step, and a step to sigma 0 (where lambda is infinite), are of first order. `noise` is
    not used.
    """
    before: Tensor | None = None
    h_before = math.inf
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        h = path.half_log_snr(sigma_next) - path.half_log_snr(sigma)
        ahead = denoised
        if before is not None and math.isfinite(h) and math.isfinite(h_before):
            ahead = denoised + (h / (2 * h_before)) * (denoised - before)
        x = jump(path, x, ahead, sigma, sigma_next)
        before, h_before = denoised, h
        report(on_step, sigmas, i, x, denoised)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    order: int = 4,
) -> Tensor:
    """The linear multistep method of Adams and Bashforth on the ODE of Karras et al. 2022, eq. 4.

    Order `order` (1 to 4), one call a step; the first steps use what slopes there are. `noise` is not used.
    """
    if order not in (1, 2, 3, 4):
        raise InputError(f"order of lms must be 1, 2, 3 or 4, not {order!r}", argument="order")
    taus: list[float] = []  # sigma / s of the slopes, the latest first
    slopes: list[Tensor] = []
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        if path.scale(sigma) > 0:
            taus = [sigma / path.scale(sigma), *taus][:order]
            slopes = [slope(path, x, denoised, sigma), *slopes][:order]
            weights = adams_bashforth(taus, sigma_next / path.scale(sigma_next))
            combined = sum(
                (w * d for w, d in zip(weights[1:], slopes[1:], strict=True)), weights[0] * slopes[0]
            )
            x = move(path, x, combined, sigma, sigma_next)
        else:
            x = jump(path, x, denoised, sigma, sigma_next)
        report(on_step, sigmas, i, x, denoised)
    return x


def adams_bashforth(taus: list[float], tau_next: float) -> list[float]:
    """Weights, of sum 1, of the slopes at `taus` (latest first, at most 4) for the step taus[0] → tau_next.

    Each is the mean over the step of a Lagrange polynomial of degree at most 3: exact with two Gauss points.
    """
    middle, half = (taus[0] + tau_next) / 2, (tau_next - taus[0]) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [
        sum(math.prod((p - b) / (a - b) for k, b in enumerate(taus) if k != j) for p in points) / 2
        for j, a in enumerate(taus)
    ]


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    noise: Noise | None = None,
    on_step: OnStep = None,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
) -> Tensor:
    """UniPC, predicting data (Zhao et al. 2023, 2302.04867, algs. 5–8 with B(h) of sec. 4.1).

    The call at the start of a step serves twice: it corrects the step before and predicts the next, so that
    the order is order + 1 (order without the corrector) at one call a step. `noise` is not used.
    order: 1 to 3; variant: B(h) = h ("bh1") or e^h − 1 ("bh2"). Steps next to sigma 0 are of lower order.
    """
    if order not in (1, 2, 3):
        raise InputError(f"order of unipc must be 1, 2 or 3, not {order!r}", argument="order")
    if variant not in ("bh1", "bh2"):
        raise InputError(f"variant of unipc must be bh1 or bh2, not {variant!r}", argument="variant")
    total = len(sigmas) - 1
    start, sigma_start = x, math.nan  # where the step before began, after its correction
    history: list[tuple[float, Tensor]] = []  # (lambda, x0_hat), the latest first
    for i, sigma, sigma_next in intervals(sigmas):
        denoised = denoise(x, level(sigma))
        if corrector and history:
            x = unified_step(path, start, history, sigma_start, sigma, variant, denoised)
        lam = path.half_log_snr(sigma)
        reach = order if float(sigmas[-1]) > 0 else min(order, total - i)
        history = [(lam, denoised), *history][:reach] if math.isfinite(lam) else []
        start, sigma_start = x, sigma
        if history:
            x = unified_step(path, x, history, sigma, sigma_next, variant)
        else:
            x = jump(path, x, denoised, sigma, sigma_next)
        report(on_step, sigmas, i, x, denoised)
    return x


def unified_step(
    path: Path,
    x: Tensor,
    history: list[tuple[float, Tensor]],
    sigma: float,
    sigma_next: float,
    variant: str,
    arrived: Tensor | None = None,
) -> Tensor:
    """One step of UniP, or of UniC when x0_hat at sigma_next has `arrived` (2302.04867, eqs. 3, 8, 9).

    history: (lambda, x0_hat) at sigma and before. The order is the length of the history, plus one for UniC.
    """
    (lam, newest), *older = history
    base = jump(path, x, newest, sigma, sigma_next)
    h = path.half_log_snr(sigma_next) - lam
    ratios = [(lam_k - lam) / h for lam_k, _ in older]
    differences = [(x0 - newest) / r for r, (_, x0) in zip(ratios, older, strict=True)]
    if arrived is not None:
        ratios, differences = [*ratios, 1.0], [*differences, arrived - newest]
    if not ratios:
        return base
    size = -h if variant == "bh1" else math.expm1(-h)
    correction = sum(w * d for w, d in zip(unified_weights(ratios, h, size), differences, strict=True))
    return base - (path.alpha(sigma_next) * size) * correction


def unified_weights(ratios: list[float], h: float, size: float) -> list[float]:
    """The weights rho of eq. 9: sum_m rho_m r_m^(n−1) = n! phi_{n+1}(−h) · (−h) / size for n = 1, 2, ….

    A single weight is 1/2, its limit for small h, as the authors' code has it.
    """
    if len(ratios) == 1:
        return [0.5]
    right, phi, factorial = [], math.expm1(-h), 1
    for n in range(1, len(ratios) + 1):
        phi = phi / -h - 1 / factorial
        right.append(phi * math.factorial(n) / size)
        factorial = math.factorial(n + 1)
    matrix = torch.tensor(
        [[r ** (n - 1) for r in ratios] for n in range(1, len(ratios) + 1)], dtype=torch.float64
    )
    return torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
