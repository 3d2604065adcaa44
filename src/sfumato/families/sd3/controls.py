"""ControlNets of a Stable Diffusion 3 at work: what they read of a picture, and what they add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.families.published.controls import Controller
from sfumato.nn.mmdit_control import MMDiTControl, MMDiTControlConfig
from sfumato.types import Conditioning

if TYPE_CHECKING:
    from sfumato.families.sd3.system import System


def read_picture(system: System, config: MMDiTControlConfig, pixels: Tensor, mask: Tensor | None) -> Tensor:
    """What a ControlNet reads of pixels (B, 3, H, W) in [0, 1]: their latent, and behind it what is to be kept.

    mask: (1, 1, H, W), 1 where to paint, which is shown black; None is everywhere. It is for those that read one.
    """
    vae, (black, white) = system.shapes.vae, config.span
    values = black + (white - black) * pixels
    if config.extra:
        mask = torch.ones_like(values[:1, :1]) if mask is None else mask
        values = torch.where(mask > 0.5, black, values)
    latent = system.encode(values[:, :, None])[:, :, 0]
    if not config.shifted:
        latent = latent + vae.shift_factor * vae.scaling_factor
    if mask is None or not config.extra:
        return latent
    kept = (1 - mask)[..., :: vae.factor, :: vae.factor]  # a cell is painted when its first pixel is
    return torch.cat([latent, kept.to(latent).expand(len(latent), -1, -1, -1)], dim=1)


def controller(network: MMDiTControl, shown: Tensor, times: int = 1) -> Controller:
    """What a ControlNet adds to the transformer's tokens. shown: of `read_picture`. times: how often each tensor comes,
    so that it can be added to those of another one with as many blocks more.
    """

    def adds(x: Tensor, time: Tensor, cond: Conditioning, guess: bool) -> tuple[Tensor, ...]:
        found = network(x[:, :, 0], time, cond.tokens, cond.vector, cond.mask, hint=shown)
        return tuple(tensor for tensor in found for _ in range(times))

    return adds
