"""Damage that generated pictures show: softness, noise, block and reconstruction artefacts, a cast of colour.

The learned detector trains on renders damaged this way, so that it reads what a picture shows and not how
crisp it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def degrade(pixels: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Randomly damaged copies of (B, 3, H, W) in [-1, 1]; each picture draws its own amounts. strength 0
    changes nothing.

    Per picture: a radial low-pass with ripple and phase noise (what an autoencoder does to texture), 8×8 block
    quantisation (a third of the pictures), white and coarse noise, and a slight change of gain, tint and gamma.
    """
    if strength == 0:
        return pixels.clone()
    pixels = spectral_damage(pixels, generator, strength)
    pixels = torch.where(
        _chance(pixels, generator, 0.33), block_quantise(pixels, generator, strength), pixels
    )
    amount = _uniform(pixels, generator, 0.0, 0.09 * strength) * _chance(pixels, generator, 0.5)
    pixels = pixels + amount * torch.randn(pixels.shape, generator=generator)
    coarse = torch.randn((len(pixels), 3, 16, 16), generator=generator)
    amount = _uniform(pixels, generator, 0.0, 0.07 * strength) * _chance(pixels, generator, 0.5)
    pixels = pixels + amount * F.interpolate(coarse, pixels.shape[-2:], mode="bilinear")
    light = ((pixels + 1) / 2).clamp(0, 1)
    gain = 1 + 0.08 * strength * (2 * torch.rand((len(pixels), 1, 1, 1), generator=generator) - 1)
    tint = 1 + 0.025 * strength * (2 * torch.rand((len(pixels), 3, 1, 1), generator=generator) - 1)
    gamma = torch.exp(0.12 * strength * (2 * torch.rand((len(pixels), 1, 1, 1), generator=generator) - 1))
    return (light.clamp_min(1e-4) ** gamma * gain * tint).clamp(0, 1) * 2 - 1


def spectral_damage(pixels: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Low-pass of Gaussian width down to a fifth of Nyquist, ±20 % ripple and phase noise that grows with
    frequency."""
    height, width = pixels.shape[-2:]
    radius = torch.sqrt(torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2) / 0.5
    blur = _uniform(pixels, generator, 0.0, 2.4 * strength) * _chance(
        pixels, generator, 0.7
    )  # 1 / Gaussian width
    gain = torch.exp(-0.5 * (radius * blur * 2) ** 2)  # (B, 1, H, W/2 + 1)
    ripple = _uniform(pixels, generator, 0.0, 0.2 * strength)
    gain = gain * (
        1
        + ripple
        * torch.sin(radius * 12 + _uniform(pixels, generator, 0.0, 2 * math.pi))
        * radius.clamp(max=1)
    )
    spectrum = torch.fft.rfft2(pixels) * gain
    twist = _uniform(pixels, generator, 0.0, 1.2 * strength) * _chance(pixels, generator, 0.4)
    phase = torch.randn((len(pixels), 1, *radius.shape), generator=generator) * radius.clamp(max=1) * twist
    return torch.fft.irfft2(spectrum * torch.polar(torch.ones_like(phase), phase), s=(height, width))


def block_quantise(pixels: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Round the 8×8 cosine coefficients in steps that grow with frequency, as JPEG does."""
    n = torch.arange(8.0)
    basis = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / 16) * 0.5
    basis[0] /= math.sqrt(2)
    blocks = pixels.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, H/8, W/8, 8, 8)
    coefficients = basis @ blocks @ basis.T
    step = 0.03 + 0.05 * (n[:, None] + n[None])
    step = step * _uniform(pixels, generator, 0.2 * strength, 2.0 * strength)[..., None, None]
    blocks = basis.T @ ((coefficients / step).round() * step) @ basis
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)


def _uniform(like: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand((len(like), 1, 1, 1), generator=generator)


def _chance(like: Tensor, generator: torch.Generator, share: float) -> Tensor:
    return torch.rand((len(like), 1, 1, 1), generator=generator) < share
