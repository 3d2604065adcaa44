"""A training step beside a LoRA against the same step without one, and what the LoRA's own products would take.

The U-Net of Stable Diffusion 1, with random weights; batch 1. "Without" is the same step with the gradient flowing
through the frozen network to its input, so that both do the same products of the network. The LoRA's own share is its
FLOPs, counted, over the network's. Target: with ≤ 1.10 × (without + own share).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import arguments, interleaved, keep, probe, show

from sfumato.adapters.trainable import TrainedLora, chosen, layers_of
from sfumato.flops import count_flops
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import fast_dtype, pick_device

TOKENS = 77


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels (default 256)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = pick_device()
    dtype = fast_dtype(device)
    torch.manual_seed(0)
    config = UNetConfig()
    unet = UNet(config).to(device, dtype).eval().requires_grad_(False)
    unet = unet.to(memory_format=torch.channels_last)
    cells = args.size // 8
    x = torch.randn(1, 4, cells, cells, device=device, requires_grad=True)
    time, context = (
        torch.tensor([500.0], device=device),
        torch.randn(1, TOKENS, config.context, device=device),
    )
    layers = chosen(dict(layers_of(unet)), args.targets)
    lora = TrainedLora(layers, args.rank, float(args.rank)).to(device)

    def with_it() -> None:
        lora(unet, x, time, context).square().mean().backward()
        lora.zero_grad(set_to_none=True)

    def without() -> None:
        with lora.aside():
            lora(unet, x, time, context).square().mean().backward()

    flops = {"with": count_flops(with_it), "without": count_flops(without)}
    own = (flops["with"] - flops["without"]) / flops["without"]
    machine = probe()
    times = interleaved({"without": without, "with": with_it}, args.rounds)
    bound = times["without"] * (1 + own)
    rate = flops["without"] / times["without"] / 1e9
    rows = [
        (
            "step without",
            f"{times['without']:.2f} s",
            f"{flops['without'] / 1e12:.2f} TFLOP, {rate:.0f} GFLOP/s",
        ),
        ("step with", f"{times['with']:.2f} s", f"{len(layers)} layers of rank {args.rank}"),
        ("own share of FLOPs", f"{own:.1%}", ""),
        ("with ÷ (without + own share)", f"{times['with'] / bound:.3f}", "target ≤ 1.10"),
    ]
    show(f"LoRA training step, Stable Diffusion 1, {args.size}², {args.targets}", machine, rows)
    result: dict[str, Any] = {"probe": machine, "seconds": times, "flops": flops, "own_share": own}
    keep(args.json, result)


if __name__ == "__main__":
    main()
