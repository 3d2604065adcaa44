"""A fresh ControlNet beside a frozen Stable Diffusion, as training wants it: of layers through which gradients pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sfumato.families.published import training
from sfumato.nn.controlnet import ControlNet
from sfumato.types import Conditioning

if TYPE_CHECKING:
    from sfumato.families.sd.system import System

WIDTHS = (16, 32, 96, 256)  # of the control picture's features, from the finest; as published ones have


class ControlTrainee(training.ControlTrainee):
    """The network reads the control picture itself, at every step."""

    def __init__(self, system: System):
        unet = training.frozen(system, "a ControlNet")
        halvings = system.shapes.vae.factor.bit_length() - 1
        super().__init__(system, unet, ControlNet.of(unet, WIDTHS[-halvings - 1 :]))

    def hint(self, pixels: Tensor) -> Tensor:
        """Control pictures (B, 3, H, W) in [0, 1], which the network itself reads."""
        return pixels

    def adds(
        self, network: ControlNet, x: Tensor, time: Tensor, cond: Conditioning, hints: Tensor
    ) -> tuple[Tensor, ...]:
        """What it adds at a step."""
        x = x[:, : network.config.in_channels, 0]
        return network(x, time, cond.tokens, cond.vector, hint=network.features(hints))

    def answer(self, x: Tensor, time: Tensor, cond: Conditioning, control: tuple[Tensor, ...]) -> Tensor:
        """What the U-Net answers with that."""
        *down, middle = control
        out = self.base(
            x[:, :, 0],
            time,
            cond.tokens,
            cond.vector,
            time_cond=cond.guidance,
            down_residuals=down,
            mid_residual=middle,
        )
        return out[:, :, None]
