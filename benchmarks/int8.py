"""What eight-bit products cost a picture: the packaged model draws the same captions in float32, bfloat16 and int8.

Its weights are trained, which random ones of other networks are not: there an error says little about a picture. PSNR
is of the pictures in 8-bit colour against those drawn in float32, same seeds, the median over captions. Text encoder
and autoencoder stay in float32, so that the denoiser alone differs.
"""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace

import numpy as np
import torch
from common import arguments, keep, probe, show

from sfumato.data.scenes import SceneSource
from sfumato.generate import Model, load
from sfumato.nn.quantized import KEPT, quantize
from sfumato.types import Request


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels between two pictures of 0 … 255; infinite for equal ones."""
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def with_denoiser(model: Model, change: str) -> Model:
    """The float32 model with its transformer in another precision."""
    denoiser = copy.deepcopy(model.system.denoiser)
    if change == "bfloat16":
        in_bfloat16(denoiser.dit)
    elif change == "int8":
        quantize(denoiser.dit)
    elif change == "int8, nothing kept":
        quantize(denoiser.dit, kept=())
    return Model(replace(model.system, denoiser=denoiser), model.device, model.name, torch.float32)


def in_bfloat16(network: torch.nn.Module) -> None:
    """Products in bfloat16, as drawing does it, and the rest in float32."""
    plain = network.forward

    def forward(*inputs, **named):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*inputs, **named).float()

    network.forward = forward


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    exact = load(args.model or "pocket", device="cpu")
    exact = Model(exact.system, exact.device, exact.name, torch.float32)
    captions = SceneSource(args.pictures)
    requests = [Request(captions.caption(i), seed=i, steps=args.steps) for i in range(args.pictures)]
    drawn = {}
    for name in ("float32", "bfloat16", "int8", "int8, nothing kept"):
        model = with_denoiser(exact, name)
        drawn[name] = [np.asarray(model.generate(request).images[0]) for request in requests]
    found = {
        name: [psnr(a, b) for a, b in zip(pictures, drawn["float32"], strict=True)]
        for name, pictures in drawn.items()
        if name != "float32"
    }
    machine = probe()
    show(
        f"{exact.name}: {args.pictures} pictures in {args.steps} steps, against float32",
        machine,
        [
            (name, f"{statistics.median(values):.1f} dB", f"{min(values):.1f} … {max(values):.1f}")
            for name, values in found.items()
        ]
        + [("kept in the network's type", "", ", ".join(KEPT))],
    )
    keep(args.json, {"probe": machine, "psnr": found})


if __name__ == "__main__":
    main()
