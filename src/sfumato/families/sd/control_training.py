"""A fresh ControlNet beside a frozen Stable Diffusion, as training wants it: of layers through which gradients pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.checkpoint.fill import fill
from sfumato.errors import InputError
from sfumato.nn.controlnet import ControlNet
from sfumato.nn.unet import UNet
from sfumato.storage import save_tensors
from sfumato.types import Conditioning

if TYPE_CHECKING:
    from sfumato.families.sd.system import System

WIDTHS = (16, 32, 96, 256)  # of the control picture's features, from the finest; as published ones have


class ControlTrainee:
    """What training asks of a ControlNet and its frozen base; as `families.pocket.control.ControlTrainee`.

    The U-Net is read a second time, since layers packed for a CPU pass no gradients. Its weights stay as they are.
    """

    encodes = False

    def __init__(self, system: System):
        if system.engine != "torch" or system.dtype == torch.int8:
            raise InputError(
                "a ControlNet is trained beside fp32 or bf16 weights, with the engine torch", argument="dtype"
            )
        with torch.device("meta"):
            unet = UNet(system.shapes.unet)
        fill(unet, system.parts["unet"], system.sources["unet"], system.kept, system.device)
        self.system, self.unet = system, unet.eval().requires_grad_(False)
        halvings = system.shapes.vae.factor.bit_length() - 1
        self.network = ControlNet.of(self.unet, WIDTHS[-halvings - 1 :]).float()
        self.network.requires_grad_(True)

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
        out = self.unet(
            x[:, :, 0],
            time,
            cond.tokens,
            cond.vector,
            time_cond=cond.guidance,
            down_residuals=down,
            mid_residual=middle,
        )
        return out[:, :, None]

    def save(self, state: Mapping[str, Tensor], path: Path) -> Path:
        """Write these weights of the network, under diffusers' names, in float16."""
        save_tensors(path, {name: tensor.to(torch.float16) for name, tensor in state.items()})
        return path
