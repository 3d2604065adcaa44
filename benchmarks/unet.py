"""One pass of Stable Diffusion 1.5's U-Net, guided (batch 2), by ours, by diffusers and by OpenVINO, interleaved.

Targets: bfloat16 at least as fast as OpenVINO's and 1.35 times as fast as diffusers' eager, 78 % of the probe; int8 1.6
times as fast as OpenVINO's bfloat16.
"""

from __future__ import annotations

import torch
from common import arguments
from denoiser import Inputs, Subject, add_arguments, installed, measure
from torch import Tensor, nn

from sfumato.nn.unet import KEPT, UNet, UNetConfig

CONTEXT, TOKENS = 768, 77


def shape_of(channels: list[int]) -> UNetConfig:
    """SD 1.x with these channels: attention at every level but the coarsest, eight heads."""
    levels = len(channels)
    return UNetConfig(
        channels=tuple(channels),
        depths=(*[1] * (levels - 1), 0),
        heads=(8,) * levels,
        context=CONTEXT,
    )


def diffusers_network(config: UNetConfig) -> nn.Module:
    """diffusers' network of that shape with random weights."""
    from diffusers import UNet2DConditionModel

    plain = len(config.channels) - 1
    return UNet2DConditionModel(
        block_out_channels=config.channels,
        down_block_types=(*["CrossAttnDownBlock2D"] * plain, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * plain),
        attention_head_dim=8,
        cross_attention_dim=config.context,
    ).eval()


def ask(network: nn.Module, inputs: Inputs) -> Tensor:
    return network(inputs["x"], inputs["time"], inputs["context"]).sample


def main() -> None:
    parser = arguments(__doc__)
    add_arguments(parser, 512)
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[320, 640, 1280, 1280], help="channels per level"
    )
    args = parser.parse_args()
    config, cells = shape_of(args.channels), args.size // 8
    x = torch.randn(args.batch, 4, cells, cells)
    if args.batch % 2 == 0:  # guidance: both halves begin as one
        x = torch.cat([x[::2], x[::2]])
    inputs = {
        "x": x,
        "time": torch.full((args.batch,), 500.0),
        "context": torch.randn(args.batch, TOKENS, CONTEXT),
    }
    theirs = (lambda: diffusers_network(config)) if installed("diffusers") else None
    subject = Subject("U-Net", lambda: UNet(config), theirs, inputs, inputs, ask, maps=True, kept=KEPT)
    measure(subject, args, {"channels": args.channels})


if __name__ == "__main__":
    main()
