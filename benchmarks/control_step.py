"""What a ControlNet costs a step: the U-Net of Stable Diffusion 1.5 alone and with one, interleaved.

Random weights, packed in what this machine is fast in; guided, so a batch of 2. The ControlNet's share is its FLOPs,
counted, over the U-Net's. Target: with ≤ without × (1 + share) × 1.05. The picture's features, the same at every step,
are no part of it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import arguments, interleaved, keep, probe, show

from sfumato.flops import count_flops
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.packed import pack
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import fast_dtype, pick_device

TOKENS, WEIGHT = 77, 0.8


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels (default 512)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = pick_device()
    dtype = fast_dtype(device)
    torch.manual_seed(0)
    config, cells = UNetConfig(), args.size // 8
    networks = UNet(config), ControlNet(ControlNetConfig(config))
    unet, control = (
        network.to(device, dtype).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for network in networks
    )
    x, time = torch.randn(2, 4, cells, cells, device=device), torch.tensor([500.0], device=device)
    context = torch.randn(2, TOKENS, config.context, device=device)
    with torch.inference_mode():
        hint = control.features(torch.rand(1, 3, args.size, args.size, device=device))

        def alone() -> None:
            unet(x, time, context)

        def controlled() -> None:
            *down, middle = (WEIGHT * each for each in control(x, time, context, hint=hint))
            unet(x, time, context, down_residuals=down, mid_residual=middle)

        flops = {"alone": count_flops(alone), "with": count_flops(controlled)}
        if device.type == "cpu":
            pack(unet)
            pack(control)
        machine = probe()
        times = interleaved({"alone": alone, "with": controlled}, args.rounds)
    share = flops["with"] / flops["alone"] - 1
    rows = [
        ("step alone", f"{times['alone']:.3f} s", f"{flops['alone'] / times['alone'] / 1e9:.0f} GFLOP/s"),
        ("step with it", f"{times['with']:.3f} s", f"{flops['with'] / times['with'] / 1e9:.0f} GFLOP/s"),
        ("its share of FLOPs", f"{share:.1%}", ""),
        ("what it costs", f"{times['with'] / times['alone'] - 1:.1%}", ""),
        ("with ÷ (alone + share)", f"{times['with'] / times['alone'] / (1 + share):.3f}", "target ≤ 1.05"),
    ]
    show(f"A ControlNet beside Stable Diffusion 1.5's U-Net, {args.size}², guided", machine, rows)
    result: dict[str, Any] = {"probe": machine, "seconds": times, "flops": flops, "share": share}
    keep(args.json, result)


if __name__ == "__main__":
    main()
