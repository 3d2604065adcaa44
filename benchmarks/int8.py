"""What eight-bit products cost a picture: a model draws the same captions in float32, bfloat16 and int8.

The packaged model's weights are trained, which random ones of other networks are not: there an error says little about
a picture. PSNR is of the pictures in 8-bit colour against those drawn in float32, same seeds, the median over captions.
Of the packaged model the text encoder and autoencoder stay in float32, so that the denoiser alone differs; a checkpoint
is opened as `sfumato generate --dtype` opens it, with int8 of OpenVINO besides where that is installed.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import arguments, keep, probe, show

from sfumato.data.scenes import SceneSource
from sfumato.generate import Model, load
from sfumato.nn.dit import KEPT
from sfumato.nn.quantized import quantize
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
        quantize(denoiser.dit, KEPT)
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


def packaged() -> Iterator[tuple[str, Model]]:
    """The model in the package, with its transformer in each precision."""
    exact = load("pocket", device="cpu")
    exact = Model(exact.system, exact.device, exact.name, torch.float32)
    for name in ("float32", "bfloat16", "int8", "int8, nothing kept"):
        yield name, with_denoiser(exact, name)


def opened(file: Path) -> Iterator[tuple[str, Model]]:
    """A checkpoint in each precision, one after the other in memory."""
    yield "float32", load(file, device="cpu", dtype=torch.float32)
    yield "bfloat16", load(file, device="cpu", dtype=torch.bfloat16)
    yield "int8", load(file, device="cpu", dtype=torch.int8)
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf"):
        yield "int8 by OpenVINO", load(file, device="cpu", dtype=torch.int8, engine="openvino")


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="pixels per side (default: the model's own)")
    args = parser.parse_args()
    captions = SceneSource(args.pictures)
    size = (args.size, args.size) if args.size else None
    requests = [
        Request(captions.caption(i), seed=i, steps=args.steps, size=size) for i in range(args.pictures)
    ]
    drawn = {}
    for name, model in opened(Path(args.model)) if args.model else packaged():
        drawn[name] = [np.asarray(model.generate(request).images[0]) for request in requests]
    found = {
        name: [psnr(a, b) for a, b in zip(pictures, drawn["float32"], strict=True)]
        for name, pictures in drawn.items()
        if name != "float32"
    }
    machine = probe()
    title = Path(args.model).name if args.model else "pocket"
    show(
        f"{title}: {args.pictures} pictures in {args.steps} steps, against float32",
        machine,
        [
            (name, f"{statistics.median(values):.1f} dB", f"{min(values):.1f} … {max(values):.1f}")
            for name, values in found.items()
        ]
        + ([] if args.model else [("kept in the network's type", "", ", ".join(KEPT))]),
    )
    keep(args.json, {"probe": machine, "psnr": found})


if __name__ == "__main__":
    main()
