"""The path from data to noise: x = alpha(sigma) · x0 + sigma · noise.

A path is alpha as a function of sigma, so that one number, sigma, says where on the path a sample is.

    VE    alpha = 1                  sigma in [0, inf)   k-diffusion; SD's eps and v networks run here
    VP    alpha = sqrt(1 - sigma²)   sigma in [0, 1]     DDPM, diffusers; the same networks
    FLOW  alpha = 1 - sigma          sigma in [0, 1]     rectified flow (SD3, Flux); sigma is the time too

Divided by alpha all three are one process with noise-to-signal ratio sigma / alpha. The samplers use that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.errors import InputError

Level = TypeVar("Level", float, Tensor)  # a noise level: a Python float, or a tensor of levels


@dataclass(frozen=True)
class Path:
    """One of VE, VP, FLOW. Every method takes a float or a tensor of levels and returns the same kind.

    alpha: the amount of signal at sigma.
    from_ratio: the sigma at which sigma / alpha has the given value in [0, inf].
    scale: the factor s(sigma) for which x / s moves along a straight line in sigma / s while the denoiser's
        answer stays the same: d(x/s) / d(sigma/s) = (x/s − x0_hat) / (sigma/s).  VE and FLOW are straight as
        they are; VP is straight once divided by alpha.
    max_sigma: the largest level the path knows.
    """

    name: str
    alpha: Callable
    from_ratio: Callable
    scale: Callable
    max_sigma: float

    def __reduce__(self) -> tuple:
        return (path_named, (self.name,))

    def half_log_snr(self, sigma: Level) -> Level:
        """lambda = log(alpha / sigma), the clock of DPM-Solver; inf at sigma 0, −inf where alpha is 0."""
        alpha = self.alpha(sigma)
        if isinstance(sigma, Tensor):
            return torch.log(alpha) - torch.log(sigma)
        return _log(alpha) - _log(sigma)

    def log_snr(self, sigma: Level) -> Level:
        """log(alpha² / sigma²), twice `half_log_snr`."""
        return 2 * self.half_log_snr(sigma)

    def sigma_at(self, half_log_snr: Level) -> Level:
        """The inverse of `half_log_snr`."""
        if isinstance(half_log_snr, Tensor):
            return self.from_ratio(torch.exp(-half_log_snr))
        return self.from_ratio(_exp(-half_log_snr))

    def noisy(self, x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """alpha · x0 + sigma · noise, in the dtype of x0. x0, noise: (B, …); sigma: a number or (B,)."""
        sigma = levels_like(sigma, x0)
        return self.alpha(sigma) * x0 + sigma * noise

    def prior_scale(self, sigma: float, data_std: float = 0.0) -> float:
        """Standard deviation of x at `sigma` when data has `data_std`: what to multiply initial noise by.

        0 gives sigma itself (k-diffusion; diffusers' linspace and trailing grids); 1 gives sqrt(alpha² +
        sigma²) (diffusers' leading grid, and exactly 1 on VP).
        """
        return math.hypot(self.alpha(sigma) * data_std, sigma)


def levels_like(sigma: float | Tensor, x: Tensor) -> Tensor | float:
    """Levels in a shape that multiplies x: one level as a float, (B,) as (B, 1, …) in the dtype of x."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return float(sigma)
    return sigma.to(device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))


def path_named(name: str) -> Path:
    """VE, VP or FLOW by its lower-case name; anything else is an `InputError`."""
    if name not in PATHS:
        raise InputError(f"path {name!r} is unknown; use one of {', '.join(PATHS)}", argument="path")
    return PATHS[name]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _one(sigma: Level) -> Level:
    return 0 * sigma + 1


def _cosine(sigma: Level) -> Level:
    return ((1 - sigma) * (1 + sigma)) ** 0.5


def _rest(sigma: Level) -> Level:
    return 1 - sigma


def _same(ratio: Level) -> Level:
    return ratio


def _sine_of_ratio(ratio: Level) -> Level:
    return (
        1 / (1 + (1 / ratio) ** 2) ** 0.5
        if isinstance(ratio, Tensor)
        else (ratio and 1 / math.hypot(1, 1 / ratio))
    )


def _share_of_ratio(ratio: Level) -> Level:
    return 1 / (1 + 1 / ratio) if isinstance(ratio, Tensor) else (ratio and 1 / (1 + 1 / ratio))


VE = Path("ve", _one, _same, _one, math.inf)
VP = Path("vp", _cosine, _sine_of_ratio, _cosine, 1.0)
FLOW = Path("flow", _rest, _share_of_ratio, _one, 1.0)
PATHS: dict[str, Path] = {path.name: path for path in (VE, VP, FLOW)}
