"""PatchGAN: a small convolutional critic that judges overlapping patches (Isola et al. 2017; LDM's schedule)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.autoencoder.model import PIXEL_CHANNELS, to_frames


@dataclass(frozen=True)
class DiscriminatorConfig:
    width: int = 64  # channels of the first layer, LDM's ndf; doubled per layer, at most 8×
    layers: int = 3  # stride-2 layers: 3 judge patches of 70 pixels (for 256²), 2 of 34 (for 128² and below)


class Discriminator(nn.Module):
    """Pixels (B, 3, T, H, W) -> logits (B·T, 1, h, w), one per patch.

    GroupNorm stands where LDM has BatchNorm: the judgement of a picture then depends on no other, and there
    are no running statistics to keep in step between processes.
    """

    def __init__(self, config: DiscriminatorConfig = DiscriminatorConfig()):
        super().__init__()
        self.config = config
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(PIXEL_CHANNELS, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for level in range(1, config.layers + 1):
            stride = 2 if level < config.layers else 1
            layers += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, widths[level] // 4), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*layers)
        self.out = nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)  # LDM `weights_init`
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(self.body(to_frames(pixels))).float()
