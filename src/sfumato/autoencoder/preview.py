"""A quick look at a latent: each cell's colour as a linear function of its channels, one pixel per cell.

A KL autoencoder's latent looks like a small picture in wrong colours, so a 3×C matrix and a bias find the colours in
microseconds where decoding takes seconds. Who has no published matrix fits one on pictures that the model decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.autoencoder.kl import KLConfig, to_frames
from sfumato.autoencoder.model import from_frames
from sfumato.errors import InputError

# Red, green and blue of each channel and a last row of bias, for normalised latents, by (channels, scaling factor),
# which tell the published latent spaces apart. Fitted by the community, as ComfyUI's latent_formats.py has them.
PUBLISHED = {
    (4, 0.18215): (  # the autoencoder of 2022 and its finetunes
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        (0.0, 0.0, 0.0),
    ),
    (4, 0.13025): (  # of 2023, for 1024²
        (0.3651, 0.4232, 0.4341),
        (-0.2533, -0.0042, 0.1068),
        (0.1076, 0.1111, -0.0362),
        (-0.3165, -0.2492, -0.2188),
        (0.1084, -0.0175, -0.0011),
    ),
    (16, 1.5305): (  # of 2024, with 16 channels
        (-0.0922, -0.0175, 0.0749),
        (0.0311, 0.0633, 0.0954),
        (0.1994, 0.0927, 0.0458),
        (0.0856, 0.0339, 0.0902),
        (0.0587, 0.0272, -0.0496),
        (-0.0006, 0.1104, 0.0309),
        (0.0978, 0.0306, 0.0427),
        (-0.0042, 0.1038, 0.1358),
        (-0.0194, 0.0020, 0.0669),
        (-0.0488, 0.0130, -0.0268),
        (0.0922, 0.0988, 0.0951),
        (-0.0278, 0.0524, -0.0542),
        (0.0332, 0.0456, 0.0895),
        (-0.0069, -0.0030, -0.0810),
        (-0.0596, -0.0465, -0.0293),
        (-0.1448, -0.1463, -0.1189),
        (0.2394, 0.2135, 0.1925),
    ),
}


def has_factors(config: KLConfig) -> bool:
    """Whether the preview factors of a latent space are known."""
    return bool(_rows(config))


def _rows(config: KLConfig) -> tuple[tuple[float, ...], ...] | None:
    return config.preview or PUBLISHED.get((config.latent_channels, round(config.scaling_factor, 5)))


def factors_of(config: KLConfig) -> Tensor:
    """The preview factors of a latent space, (C + 1, 3) float32: the config's own, or the published ones.

    `InputError` if there are none.
    """
    rows = _rows(config)
    if not rows:
        raise InputError(
            f"no preview factors are known for {config.latent_channels} channels scaled by {config.scaling_factor}; "
            "fit them with fit_factors and give them as the config's preview",
            argument="preview",
        )
    return torch.tensor(rows, dtype=torch.float32)


def preview(config: KLConfig, latent: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W) in [-1, 1], one per cell, of a normalised latent (B, C, T, H, W) of config's space.

    `InputError` if no factors are known for it, or the latent is not of its shape.
    """
    return colours(factors_of(config), latent)


def colours(factors: Tensor, latent: Tensor) -> Tensor:
    """As `preview`, by given factors (C + 1, 3). The latent may be noisy or far off: the result is clamped."""
    if latent.ndim != 5 or factors.shape != (latent.shape[1] + 1, 3):
        raise InputError(
            f"factors of shape {tuple(factors.shape)} do not fit a latent of shape {tuple(latent.shape)}: they must be "
            "(C + 1, 3) and (B, C, T, H, W)",
            argument="factors",
        )
    factors = factors.to(latent.device, torch.float32)
    pixels = latent.float().movedim(1, -1) @ factors[:-1] + factors[-1]  # (B, T, H, W, 3)
    return pixels.movedim(-1, 1).clamp(-1, 1)


def fit_factors(latent: Tensor, pixels: Tensor) -> Tensor:
    """The factors (C + 1, 3) whose preview is closest in mean square to pictures averaged over cells.

    latent: normalised (B, C, T, H, W); pixels: (B, 3, T, H·f, W·f) in [-1, 1], what the model decodes it to. Some
    thousand cells of varied pictures are enough; fewer cells than C + 1 are an `InputError`.
    """
    B, C, T, H, W = latent.shape
    f = pixels.shape[-1] // W
    if pixels.shape != (B, 3, T, H * f, W * f) or f < 1:
        raise InputError(
            f"pixels of shape {tuple(pixels.shape)} are not what a latent of shape {tuple(latent.shape)} decodes to",
            argument="pixels",
        )
    cells = latent.double().movedim(1, -1).reshape(-1, C)  # (N, C)
    if len(cells) <= C:
        raise InputError(
            f"{len(cells)} cells cannot fix {C + 1} factors; give more pictures", argument="latent"
        )
    small = from_frames(F.avg_pool2d(to_frames(pixels.double().clamp(-1, 1)), f), B)  # (B, 3, T, H, W)
    known = torch.cat([cells, cells.new_ones(len(cells), 1)], dim=1).cpu()
    wanted = small.movedim(1, -1).reshape(-1, 3).cpu()
    return torch.linalg.lstsq(known, wanted, driver="gelsd").solution.float()
