"""Beginning from a latent instead of noise: which steps are left, what stays as it is, how latents are enlarged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import checks
from sfumato.diffusion.parameterization import Denoise
from sfumato.diffusion.path import Path
from sfumato.diffusion.schedules import NoiseLevels
from sfumato.errors import InputError

UPSCALERS = {  # name → mode of `torch.nn.functional.interpolate`, or None for those that enlarge pixels
    "latent-nearest": "nearest-exact",
    "latent-bilinear": "bilinear",
    "latent-bicubic": "bicubic",
    "lanczos": None,
}


@dataclass(frozen=True)
class Origin:
    """What sampling begins with when it is not noise alone.

    latent: (1, C, 1, H, W) shared by all pictures, or (B, C, 1, H, W); strength: the share of the schedule to run.
    pixels: (1, 3, 1, H·f, W·f) in [-1, 1], what `latent` was encoded from, and mask: (1, 1, 1, H·f, W·f), 1 where to
    paint and 0 where to keep; both only where something is to be kept.
    """

    latent: Tensor
    strength: float
    pixels: Tensor | None = None
    mask: Tensor | None = None


def steps_to_run(steps: int, strength: float, argument: str = "strength") -> int:
    """int(steps · strength) of the schedule's last steps, as diffusers counts them; 0 exactly for strength 0.

    Raises `InputError` for a strength above 0 that would run none.
    """
    count = min(int(steps * strength), steps)
    if count == 0 and strength > 0:
        raise InputError(
            f"{argument} {strength:g} of {steps} steps is less than one step; give at least {1 / steps:.3g}, "
            "or 0 to leave the picture as it is",
            argument=argument,
        )
    return count


def steps_before(sigmas: Tensor, levels: NoiseLevels, share: float) -> int:
    """How many of the schedule's steps begin within the first `share` of the noise levels, counted from the noisy end.

    As diffusers counts `denoising_end`: of N time steps, those from round(N (1 − share)) on.
    """
    cutoff = round(len(levels.sigmas) * (1 - share))
    times = levels.time(sigmas[:-1].double()) - levels.offset
    return int(
        (times >= cutoff - 1e-3).sum()
    )  # a table's level comes back as a whole number but for rounding


def begin(sigmas: Tensor, origin: Origin, noise: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """The levels that are left, (S' + 1,), and the sample at the first of them, (B, C, 1, H, W).

    noise: standard normal. With all steps left the sample is noise alone, as for text to image; with none, the latent.
    """
    steps = len(sigmas) - 1
    left = sigmas[steps - steps_to_run(steps, origin.strength) :]
    first = float(left[0])
    if len(left) == len(sigmas):
        return left, noise * path.prior_scale(first)
    latent = origin.latent.to(noise).expand_as(noise)
    return left, (path.noisy(latent, noise, first) if len(left) > 1 else latent.clone())


def cells_to_paint(mask: Tensor, height: int, width: int) -> Tensor:
    """(1, 1, 1, H·f, W·f) → (1, 1, 1, H, W) bool: every latent cell with a pixel to paint."""
    return F.adaptive_max_pool2d(mask[:, :, 0].float(), (height, width))[:, :, None] > 0


def keeping(denoise: Denoise, latent: Tensor, cells: Tensor, noise: Tensor, path: Path) -> Denoise:
    """A denoiser that is sure of the cells it must not paint.

    There the network is shown the known latent at the level it asks for, under each picture's own noise, and the
    answer is the known latent; so every sampler arrives at it. With a deterministic sampler this is RePaint without
    resampling (Lugmayr et al. 2022, eq. 8) and what diffusers and ComfyUI do.

    latent: (1 or B, C, 1, H, W); cells: (1, 1, 1, H, W), True where to paint; noise: (B, C, 1, H, W).
    """

    def denoise_the_rest(x: Tensor, sigma: Tensor) -> Tensor:
        known = latent.to(x)
        shown = torch.where(cells, x, path.noisy(known.expand_as(x), noise, sigma))
        return torch.where(cells, denoise(shown, sigma), known)

    return denoise_the_rest


def enlarged(latent: Tensor, height: int, width: int, upscaler: str) -> Tensor:
    """(B, C, 1, H, W) → (B, C, 1, height, width) by an interpolation of latents."""
    mode = UPSCALERS[upscaler]
    assert mode is not None
    align = None if mode == "nearest-exact" else False
    return F.interpolate(latent[:, :, 0], (height, width), mode=mode, align_corners=align)[:, :, None]


def pixel_upscaler(name: str) -> bool:
    """Whether the upscaler enlarges the picture and not the latent; an unknown one is an `InputError`."""
    if name not in UPSCALERS:
        raise InputError(
            f"hires.upscaler {checks.shown(name)} is unknown; use one of {', '.join(UPSCALERS)}",
            argument="hires.upscaler",
        )
    return UPSCALERS[name] is None
