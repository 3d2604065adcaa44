"""What every sampler is built from: the report of a step, and the moves a sample can make along a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from sfumato.diffusion.path import Path
from sfumato.errors import InputError

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma: scalar float64 tensor) -> x0_hat
Noise = Callable[..., Tensor]  # (step, draw=0) -> standard normal, shaped like x


@dataclass(frozen=True)
class Step:
    """Step `index` (from 0) of `total` is done.

    sigma: the level it started from; x: the sample after it; denoised: x0_hat at its start.
    """

    index: int
    total: int
    sigma: float
    x: Tensor
    denoised: Tensor


OnStep = Callable[[Step], None] | None  # may raise to cancel; the exception passes through the sampler


def level(sigma: float) -> Tensor:
    """A noise level as a denoiser takes it: a float64 scalar on the CPU, whatever the device of x."""
    return torch.tensor(sigma, dtype=torch.float64)


def intervals(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(index, sigma, next sigma) of each step, as floats: coefficients are worked out in float64."""
    values = [float(sigma) for sigma in sigmas]
    if len(values) < 2 or any(not b < a for a, b in pairwise(values)) or values[-1] < 0:
        raise InputError(
            "sigmas must hold at least two levels, decrease, and not go below 0", argument="sigmas"
        )
    yield from ((i, sigma, sigma_next) for i, (sigma, sigma_next) in enumerate(pairwise(values)))


def report(on_step: OnStep, sigmas: Tensor, index: int, x: Tensor, denoised: Tensor) -> None:
    if on_step is not None:
        on_step(Step(index, len(sigmas) - 1, float(sigmas[index]), x, denoised))


def continued(noise: Noise, on_step: OnStep, done: int, total: int) -> tuple[Noise, OnStep]:
    """`noise` and `on_step` for a sampler that begins after `done` of `total` steps: both count from the first."""

    def more(step: int, number: int = 0) -> Tensor:
        return noise(step + done, number)

    def hear(step: Step) -> None:
        assert on_step is not None
        on_step(replace(step, index=step.index + done, total=total))

    return more, None if on_step is None else hear


def draw(noise: Noise | None, step: int, number: int = 0) -> Tensor:
    """The fresh noise of a step; a sampler that needs it and was given none says so."""
    if noise is None:
        raise InputError(
            "this sampler draws noise; give it, for example as SeededNoise(...)", argument="noise"
        )
    return noise(step, number)


def jump(
    path: Path, x: Tensor, denoised: Tensor, sigma: float, sigma_next: float, kept: float | None = None
) -> Tensor:
    """Keep x0_hat and the noise eps it implies, and go to sigma_next: alpha' · x0_hat + sigma' · eps.

    This is DDIM's step (Song et al. 2021, eq. 12), DPM-Solver++'s first order (Lu et al. 2022, eq. 9), and
    Euler's step on any straight path. kept: how much of eps to keep when the rest of sigma_next is to be
    fresh noise.
    """
    kept = sigma_next if kept is None else kept
    share = kept / sigma
    return share * x + (path.alpha(sigma_next) - share * path.alpha(sigma)) * denoised


def slope(path: Path, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """d(x/s) / d(sigma/s) = (x/s − x0_hat) / (sigma/s) on the straight path (Karras et al. 2022, eq. 4)."""
    return (x - path.scale(sigma) * denoised) / sigma


def move(path: Path, x: Tensor, slope: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Follow `slope` from sigma to sigma_next along the straightened path."""
    s, s_next = path.scale(sigma), path.scale(sigma_next)
    return (s_next / s) * x + (sigma_next - sigma * s_next / s) * slope


def fresh_share(path: Path, sigma: float, sigma_next: float) -> float:
    """1 − SNR/SNR': the share of the noise variance at sigma_next that a reverse chain's step renews."""
    return -math.expm1(2 * (path.half_log_snr(sigma) - path.half_log_snr(sigma_next)))


def renew(path: Path, sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Split the noise at sigma_next into (kept, fresh) with kept² + fresh² = sigma_next².

    fresh = eta · sigma_next · sqrt(1 − SNR/SNR'): DDIM's eq. 16, and k-diffusion's ancestral step, which are
    the same.
    """
    fresh = (
        min(sigma_next, eta * sigma_next * math.sqrt(fresh_share(path, sigma, sigma_next))) if eta else 0.0
    )
    return math.sqrt(sigma_next**2 - fresh**2), fresh
