"""ControlNet: a copy of a U-Net's way down that reads a picture too, and adds what it finds to the U-Net's skips.

Source: Zhang et al. 2023 (arXiv 2302.05543), sec. 3. Names of parameters are those of diffusers' `ControlNetModel`; the
original files (cldm/cldm.py) hold the same tensors under other names. What it adds comes through 1×1 convolutions that
begin as zeros, so that a fresh one changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import InputError
from sfumato.nn.unet import UNet, UNetConfig, WayDown

GUESSED = (
    0.1  # weight of the finest residual when the network must guess without a prompt; the coarsest has 1
)


@dataclass(frozen=True)
class ControlNetConfig:
    """unet: the shape of the U-Net that it controls, of which it has the way down; its own depths may be others."""

    unet: UNetConfig
    hint_channels: tuple[int, ...] = (
        16,
        32,
        96,
        256,
    )  # of the picture's features; each next halves the sides
    pooled: bool = False  # residuals are averaged over the picture (the one for shuffled content)
    bgr: bool = False  # the picture is read blue first

    def __post_init__(self) -> None:
        if not self.hint_channels or min(self.hint_channels) < 1:
            raise InputError(
                f"hint_channels must be at least one number from 1 on, not {self.hint_channels}",
                argument="hint_channels",
            )

    @property
    def factor(self) -> int:
        """Pixels of the control picture per latent cell and side."""
        return 2 ** (len(self.hint_channels) - 1)


class HintEmbedding(nn.Module):
    """Pixels (B, 3, H·f, W·f) in [0, 1] → features (B, C, H, W) that are added where the latent enters."""

    def __init__(self, channels: Sequence[int], out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(channels):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(channels[-1], out, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        h = functional.silu(self.conv_in(pixels))
        for block in self.blocks:
            h = functional.silu(block(h))
        return self.conv_out(h)


class ControlNet(WayDown):
    """(noisy latent, time, text, features of the picture) → residuals for the skips and the middle of a U-Net.

    As `UNet`: build it under `torch.device("meta")` when weights are about to be read, and pack it on a CPU.
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.control = config
        skips = [width for width, _ in config.unet.skips]
        self.controlnet_cond_embedding = HintEmbedding(config.hint_channels, config.unet.channels[0])
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(width, width, 1) for width in skips])
        self.controlnet_mid_block = nn.Conv2d(skips[-1], skips[-1], 1)

    def begin(self) -> ControlNet:
        """Zeros where it adds to the U-Net and where the picture enters: it begins by changing nothing."""
        for layer in (
            self.controlnet_cond_embedding.conv_out,
            *self.controlnet_down_blocks,
            self.controlnet_mid_block,
        ):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return self

    @classmethod
    def of(cls, unet: UNet, hint_channels: tuple[int, ...] = (16, 32, 96, 256)) -> ControlNet:
        """A fresh one for a U-Net, which must hold plain weights: a copy of its way down, in their type."""
        shape = replace(unet.config, in_channels=unet.config.out_channels, time_cond=0)
        made = cls(ControlNetConfig(shape, hint_channels)).begin()
        theirs, own = unet.state_dict(), made.state_dict()
        for name, tensor in own.items():
            if (
                name in theirs
            ):  # an inpainting U-Net reads more channels than the noisy latent's, which come first
                tensor.copy_(theirs[name][:, : tensor.shape[1]] if name == "conv_in.weight" else theirs[name])
        return made.to(unet.dtype)

    def features(self, pixels: Tensor) -> Tensor:
        """Of a control picture (B, 3, H·f, W·f) in [0, 1]: (B, C, H, W), the same at every step."""
        f = self.control.factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[-2] % f or pixels.shape[-1] % f:
            raise InputError(
                f"a control picture must have shape (B, 3, H, W), its sides multiples of {f}, not "
                f"{tuple(pixels.shape)}",
                argument="pixels",
            )
        pixels = pixels.flip(1) if self.control.bgr else pixels
        return self.controlnet_cond_embedding(
            pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        )

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        *,
        hint: Tensor,
        guess: bool = False,
    ) -> tuple[Tensor, ...]:
        """Residuals of the skips, in the order of `config.skips`, and of the middle, the last.

        x, time, context, vector: as the U-Net has them. hint: (B or 1, C, H, W), of `features`. guess: the finer a
        residual the less of it, down to a tenth: diffusers' guess mode, for prompts that say nothing.
        """
        self.check(x, time, context, vector, None)
        dtype = self.dtype
        embedded = self.embed_time(time.expand(len(x)), vector, None)
        context = context.to(dtype)
        h = self.conv_in(x.to(dtype).contiguous(memory_format=torch.channels_last))
        if hint.shape[1:] != h.shape[1:]:
            raise InputError(
                f"hint must have shape (B, {', '.join(map(str, h.shape[1:]))}), not {tuple(hint.shape)}",
                argument="hint",
            )
        skips = list(self.way_down(h + hint.to(dtype), embedded, context))
        middle = self.mid_block(skips[-1], embedded, context)
        outputs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        residuals = [layer(each) for layer, each in zip(outputs, [*skips, middle], strict=True)]
        if self.control.pooled:
            return tuple(each.mean((2, 3), keepdim=True) for each in residuals)
        if guess:
            powers = torch.linspace(0, 1, len(residuals)).tolist()
            return tuple(GUESSED ** (1 - p) * each for p, each in zip(powers, residuals, strict=True))
        return tuple(residuals)
