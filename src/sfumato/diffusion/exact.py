"""Data whose best denoiser is known in closed form: what samplers are measured against, and a toy to learn with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.parameterization import Denoise
from sfumato.diffusion.path import Path, levels_like


@dataclass(frozen=True)
class Gaussian:
    """Every element of the data is independently N(mean, std²)."""

    mean: float = 0.0
    std: float = 1.0

    def marginal(self, path: Path, sigma: float) -> tuple[float, float]:
        """Mean and standard deviation of x at a level."""
        alpha = path.alpha(sigma)
        return alpha * self.mean, math.hypot(alpha * self.std, sigma)

    def denoiser(self, path: Path) -> Denoise:
        """E[x0 | x], which is affine in x."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = levels_like(torch.as_tensor(sigma), x)
            alpha = path.alpha(level)
            gain = alpha * self.std**2 / (alpha * alpha * self.std**2 + level * level)
            return self.mean + gain * (x - alpha * self.mean)

        return denoise

    def carry(self, path: Path, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The probability-flow ODE solved exactly: along it, (x − mean) / deviation of the marginal stays the same."""
        mean, std = self.marginal(path, sigma)
        mean_next, std_next = self.marginal(path, sigma_next)
        return mean_next + (std_next / std) * (x - mean)


@dataclass(frozen=True)
class TwoPeaks:
    """Every element is N(place, std²) or N(−place, std²) with equal chance: a denoiser that is not affine."""

    place: float = 1.0
    std: float = 0.5

    def denoiser(self, path: Path) -> Denoise:
        """E[x0 | x] = tanh(alpha · place · x / v) · place · sigma² / v + alpha std² x / v, v = alpha² std² + sigma²."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = levels_like(torch.as_tensor(sigma), x)
            alpha = path.alpha(level)
            v = alpha * alpha * self.std**2 + level * level
            side = (x * (alpha * self.place / v)).tanh()
            return side * (self.place * level * level / v) + x * (alpha * self.std**2 / v)

        return denoise

    def carry(self, path: Path, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The probability-flow ODE solved exactly (float64): it keeps order, so each x keeps its quantile."""
        quantile = self._below(path, x, sigma)
        low = torch.full_like(x, -self.place - 12 * math.hypot(self.std, sigma_next))
        high = -low
        for _ in range(64):
            middle = (low + high) / 2
            under = self._below(path, middle, sigma_next) < quantile
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        return (low + high) / 2

    def _below(self, path: Path, x: Tensor, sigma: float) -> Tensor:
        alpha = path.alpha(sigma)
        std = math.hypot(alpha * self.std, sigma)
        peaks = (torch.special.ndtr((x - side * alpha * self.place) / std) for side in (-1, 1))
        return sum(peaks) / 2
