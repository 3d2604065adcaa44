"""How far a reconstruction lies from its picture. Pictures are (B, 3, T, H, W) in [-1, 1]; answers are one
number per picture.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = 2.0  # pixel values span [-1, 1]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,); infinite for equal pictures. Both are clamped to [-1, 1] first."""
    error = (a.double().clamp(-1, 1) - b.double().clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / error)


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity, (B,), at most 1 (Wang et al. 2004, eq. 13).

    Gaussian window, K = (0.01, 0.03), colour channels averaged. Population (not sample) variances, and
    only windows that fit inside the picture, as the paper's code does. Sides must be at least `window` pixels.
    """
    batch = len(a)
    a, b = (x.double().clamp(-1, 1).reshape(-1, 1, *x.shape[-2:]) for x in (a, b))  # (B·3·T, 1, H, W)
    offsets = torch.arange(window, dtype=torch.float64, device=a.device) - (window - 1) / 2
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    moments = torch.cat([a, b, a * a, b * b, a * b])
    moments = F.conv2d(F.conv2d(moments, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    mean_a, mean_b, aa, bb, ab = moments.chunk(5)
    var_a, var_b, cov = aa - mean_a.square(), bb - mean_b.square(), ab - mean_a * mean_b
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    score = score / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return score.reshape(batch, -1).mean(1)


def spectral_error(reconstruction: Tensor, pixels: Tensor, bands: int = 8) -> Tensor:
    """log10(amplitude of reconstruction / amplitude of picture) per radial frequency band, (B, bands).

    Band i holds frequencies from i/bands to (i+1)/bands of Nyquist (0.5 cycles per pixel); corners beyond
    Nyquist and the mean are left out. Amplitude is the root of the band's mean power over a Hann-windowed
    picture. −1 says a tenth of the amplitude is left (blur), 0 that all is there, positive that texture was
    invented.
    """
    height, width = pixels.shape[-2:]
    options: dict[str, Any] = {"dtype": torch.float64, "device": pixels.device}
    window = torch.hann_window(height, **options)[:, None] * torch.hann_window(width, **options)
    radius = torch.sqrt(
        torch.fft.fftfreq(height, **options)[:, None].square() + torch.fft.rfftfreq(width, **options).square()
    )
    band = (radius / 0.5 * bands).long()
    band[(radius > 0.5) | (radius == 0)] = bands
    band = band.clamp(max=bands).flatten()

    def power(x: Tensor) -> Tensor:
        x = x.double().clamp(-1, 1)
        x = (x - x.mean((-2, -1), keepdim=True)) * window
        energy = torch.fft.rfft2(x).abs().square().flatten(1, 2).mean(1).flatten(1)  # (B, frequencies)
        sums = energy.new_zeros(len(energy), bands + 1).index_add_(1, band, energy)
        return sums[:, :bands] / torch.bincount(band, minlength=bands + 1)[:bands].clamp(min=1)

    tiny = 1e-12
    return 0.5 * torch.log10((power(reconstruction) + tiny) / (power(pixels) + tiny))
