"""What a reconstruction is asked to be. Every picture term is a mean over pixel values, so weights do not
depend on size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.autoencoder.model import Posterior, shrink_planes


@dataclass(frozen=True)
class LossConfig:
    """Weights of the autoencoder's loss; 0 leaves a term out and costs nothing."""

    l1: float = 1.0  # mean |error|; 1 sets the scale of all others
    gradient: float = 1.0  # edges at several scales, which L1 alone blurs
    gradient_scales: int = 3  # full, half and quarter size
    haar: float = 0.0  # wavelet details at three levels: `gradient` with diagonals, tied to even positions
    spectral: float = 0.02  # log-amplitudes of blocks: texture energy, wherever it lies inside a block
    spectral_block: int = 16  # pixels per side of a block; also at half size
    kl: float = 1e-6  # LDM's weight, times the summed KL per pixel value (see `kl_loss`)
    equivariance: float = 0.25  # alpha of 2502.14831: a shrunk latent decodes to the shrunk picture
    equivariance_scales: tuple[int, ...] = (2, 4)  # drawn evenly per step
    equivariance_share: float = 0.5  # part of the batch that pays for it
    adversarial: float = 0.0  # LDM's PatchGAN weight is 0.5; off, because scenes reconstruct without it
    adversarial_start: int = 50_001  # first step with it, LDM's `disc_start`
    adversarial_limit: float = 1e4  # clamp of the adaptive weight, LDM


def picture_loss(
    reconstruction: Tensor, pixels: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the picture terms, and each term unweighted. Both (B, 3, T, H, W) in [-1, 1],
    float32.
    """
    terms = {}
    if config.l1:
        terms["l1"] = (reconstruction - pixels).abs().mean()
    if config.gradient:
        terms["gradient"] = gradient_loss(reconstruction, pixels, config.gradient_scales)
    if config.haar:
        terms["haar"] = haar_loss(reconstruction, pixels)
    if config.spectral:
        terms["spectral"] = spectral_loss(reconstruction, pixels, config.spectral_block)
    total = sum((getattr(config, name) * value for name, value in terms.items()), start=pixels.new_zeros(()))
    return total, terms


def gradient_loss(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean |difference of finite differences| along x and y, averaged over `scales` halvings (those that
    fit).
    """
    error = planes(a - b)
    total, used = error.new_zeros(()), 0
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        if min(error.shape[-2:]) < 2:
            break
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        used += 1
    return total / max(used, 1)


def haar_loss(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean |error| of the orthonormal Haar details, averaged over levels (those that fit)."""
    error = planes(a - b)
    total, used = error.new_zeros(()), 0
    for _ in range(levels):
        if error.shape[-1] % 2 or error.shape[-2] % 2:
            break
        low, *details = haar(error)
        total = total + sum(d.abs().mean() for d in details) / 3
        error = low
        used += 1
    return total / max(used, 1)


def haar(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of the orthonormal Haar transform of (B, H, W): low, along x, along y, diagonal, each (B,
    H/2, W/2).
    """
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2


def spectral_loss(a: Tensor, b: Tensor, block: int = 16) -> Tensor:
    """Mean |difference of log-amplitudes| of block spectra, at full and half size.

    After the Watson-DFT distance (2006.15057), which also compares amplitudes of blocks so that texture may
    shift, without its visibility tables: the logarithm, softened below the amplitude 0.05, plays the part of
    contrast masking. Sizes smaller than a block are skipped, as are rows and columns beyond the last whole
    block.
    """
    a, b = planes(a), planes(b)
    total, used = a.new_zeros(()), 0
    for scale in range(2):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        if min(a.shape[-2:]) < block:
            break
        total = total + (log_amplitude(a, block) - log_amplitude(b, block)).abs().mean()
        used += 1
    return total / max(used, 1)


def log_amplitude(x: Tensor, block: int, softening: float = 0.05) -> Tensor:
    """(B, H, W) -> log amplitudes of blocks (B, blocks y, blocks x, block, block/2 + 1)."""
    blocks = x.unfold(-2, block, block).unfold(-2, block, block)
    spectrum = torch.fft.rfft2(blocks, norm="forward")  # a unit grating has amplitude 1/2
    return 0.5 * torch.log(spectrum.real.square() + spectrum.imag.square() + softening**2)


def kl_loss(posterior: Posterior, pixels: Tensor) -> Tensor:
    """KL summed over all latent numbers, per pixel value.

    LDM divides both the summed absolute error and the summed KL by the batch; dividing both by the pixel
    values as well keeps the ratio and makes its weight of 1e-6 mean the same here, beside an L1 that is a
    mean.
    """
    return posterior.kl().sum() / pixels.numel()


def equivariance_loss(small: Tensor, pixels: Tensor, config: LossConfig) -> Tensor:
    """Picture loss between decoded shrunk latents (B', 3, T, H/s, W/s) and the first B' pictures shrunk as
    much (2502.14831, eq. 5).
    """
    scale = pixels.shape[-1] // small.shape[-1]
    return picture_loss(small, shrink_planes(pixels[: len(small)], scale), config)[0]


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(E max(0, 1 − D(x)) + E max(0, 1 + D(x̂))) / 2 over patches (LDM `hinge_d_loss`)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """−E D(x̂)."""
    return -fake.mean()


def adaptive_weight(picture: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """|∇ picture| / (|∇ adversarial| + 1e-4) at the decoder's last layer, clamped to [0, limit] (VQGAN
    2012.09841, eq. 7; LDM).
    """
    (grad_picture,) = torch.autograd.grad(picture, last_layer, retain_graph=True)
    (grad_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (grad_picture.norm() / (grad_adversarial.norm() + 1e-4)).clamp(0, limit).detach()


def planes(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·C·T, H, W)."""
    return x.reshape(-1, *x.shape[-2:])
