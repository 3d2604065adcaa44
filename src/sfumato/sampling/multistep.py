"""Samplers that remember earlier answers of the denoiser: one call a step at any order."""

from __future__ import annotations

import math

from torch import Tensor

from sfumato.diffusion.path import Path
from sfumato.sampling.step import Denoise, Noise, OnStep, intervals, jump, level, report


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, *, path: Path, noise: Noise | None = None, on_step: OnStep = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, alg. 2). Order 2, one call a step. `noise` is not used.

    x0_hat is extrapolated linearly in lambda = log(alpha / sigma) to the middle of the step. The first step, and one to
    sigma 0 (where lambda is infinite), are of first order.
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
