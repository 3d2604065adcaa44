"""Decoding one latent of the published 4-channel autoencoder: seconds, memory and error, ours beside diffusers.

Times are interleaved in one process; memory is the peak of a process of its own for each variant, above what it held
with its weights. By default the ways in which pictures are drawn, in two minutes; --full adds the others. Targets: as
fast as OpenVINO in bfloat16, in 40 % of the memory of diffusers' plain decode. Error is ‖x − reference‖ / ‖reference‖,
the reference being diffusers' plain decode in float32.
Weights are random and the same on both sides: they cost what trained ones do, but errors are those of these weights.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, in_own_process, interleaved, keep, probe, show
from torch import nn

from sfumato.autoencoder.banded import BAND, decode_banded
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.autoencoder.memory import peak_bytes
from sfumato.flops import count_flops
from sfumato.nn.openvino import converted, settings

WAYS = ("ours, full", "ours, banded", "diffusers, plain", "diffusers, tiled")
DEFAULT = ("ours, banded, bfloat16, channels-last", "diffusers, plain, bfloat16, channels-last")
OPENVINO = "OpenVINO, bfloat16"  # of diffusers' network
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 1 << 20


def variants(dtypes: list[str]) -> list[str]:
    """Every way × type × memory format. Banded always works in channels-last memory."""
    names = [OPENVINO] if importlib.util.find_spec("openvino") else []
    for dtype in dtypes:
        for way in WAYS:
            names.append(f"{way}, {dtype}, channels-last")
            if way != "ours, banded":
                names.append(f"{way}, {dtype}")
    return names


def reference_weights(config: KLConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return AutoencoderKL(config).state_dict()


def decoder(
    name: str, weights: dict[str, torch.Tensor], size: int, band: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """One variant: latent → pixels, its encoder dropped. size: pixels per side; the reference's tiles depend on it."""
    if name == OPENVINO:
        return openvino_decoder(weights, size)
    way, dtype = name.removesuffix(", channels-last").rsplit(", ", 1)
    config = KLConfig()
    model: Any
    if way.startswith("ours"):
        model = AutoencoderKL(config)
    else:
        model = diffusers_model(config)
    model.load_state_dict(weights)
    model.encoder = None
    model = model.to(DTYPES[dtype]).eval().requires_grad_(False)
    if name.endswith("channels-last"):
        model = model.to(memory_format=torch.channels_last)
    if way == "ours, full":
        return model.decode
    if way == "ours, banded":
        return lambda latent: decode_banded(model, latent, band=band)
    if way == "diffusers, tiled":
        model.enable_tiling()
        model.tile_sample_min_size = min(512, size // 2)  # its own 512 would leave a picture of 512 whole
        model.tile_latent_min_size = model.tile_sample_min_size // 8
    return lambda latent: model.decode(latent[:, :, 0].to(DTYPES[dtype])).sample.float()[:, :, None]


def diffusers_model(config: KLConfig) -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=config.widths,
        layers_per_block=config.resnets,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=512,
    )


class Decode(nn.Module):
    """latent (B, 4, h, w) → pixels by diffusers' network, its encoder dropped."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.model = diffusers_model(KLConfig())
        self.model.load_state_dict(weights)
        self.model.encoder = None

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.model.decode(latent, return_dict=False)[0]


def openvino_decoder(weights: dict[str, torch.Tensor], size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compiled for pictures of `size` pixels per side; others are compiled when they come."""
    import openvino

    network = Decode(weights).eval()
    compiled: dict[torch.Size, Any] = {}

    def decode(latent: torch.Tensor) -> torch.Tensor:
        given = latent[:, :, 0].contiguous()
        if given.shape not in compiled:
            model = converted(network, {"latent": given})
            compiled[given.shape] = openvino.Core().compile_model(
                model, "CPU", settings("CPU", torch.bfloat16)
            )
        return torch.from_numpy(compiled[given.shape]([given.numpy()])[0])[:, :, None]

    decode(latent_of(size))
    return decode


def latent_of(size: int) -> torch.Tensor:
    cells = size // 8
    return torch.randn(1, 4, 1, cells, cells, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def child(name: str, size: int, band: int) -> None:
    """Decode once and print the peak of resident memory above what was there before, in bytes. Linux alone can."""
    decode = decoder(name, reference_weights(KLConfig()), size, band)
    latent = latent_of(size)
    decode(latent_of(64))  # what libraries allocate once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what building left free, or the decode would hide in it
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
    decode(latent)
    print(json.dumps({"peak": resident("VmHWM") - before}))


def resident(what: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=512, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--band", type=int, default=BAND, help="bytes of a band")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--only", default="", help="variants whose name contains this, beside the reference")
    parser.add_argument("--full", action="store_true", help="every variant: a quarter of an hour and more")
    parser.add_argument("--child", help="measure the memory of one variant and leave")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.size, args.band)
        return
    every = args.full or args.only
    names = [
        name
        for name in variants(args.dtypes)
        if args.only in name and (every or name in (OPENVINO, *DEFAULT))
    ]
    peaks = {}
    for name in names:
        words = "--child", name, "--size", str(args.size), "--band", str(args.band)
        peaks[name] = in_own_process(*words)["peak"]
    before = probe()
    weights = reference_weights(KLConfig())
    with torch.inference_mode():
        latent = latent_of(args.size)
        reference = decoder("diffusers, plain, float32", weights, args.size, args.band)
        truth: list[torch.Tensor] = []
        flops = count_flops(lambda: truth.append(reference(latent)))
        calls = {name: partial(decoder(name, weights, args.size, args.band), latent) for name in names}
        errors = {name: float((call() - truth[0]).norm() / truth[0].norm()) for name, call in calls.items()}
        times = interleaved(calls, args.rounds)
    planned = {
        name: peak_bytes(
            KLConfig(),
            "decode",
            args.size,
            args.size,
            DTYPES["bfloat16" if "bfloat16" in name else "float32"],
            band=args.band if "banded" in name else None,
        )
        for name in names
        if name.startswith("ours")
    }
    show(
        f"decoding {args.size}×{args.size}: {flops / 1e9:.0f} GFLOP as the reference counts them",
        before,
        [
            (
                name,
                f"{times[name]:.2f} s",
                f"peak {peaks[name] / MIB:5.0f} MiB"
                + (f" (planned {planned[name] / MIB:.0f})" if name in planned else "")
                + f", error {errors[name]:.1e}, {flops / times[name] / 1e9:.0f} GFLOP/s",
            )
            for name in names
        ],
    )
    keep(
        args.json,
        {
            "size": args.size,
            "band": args.band,
            "flops": flops,
            "probe": before,
            "seconds": times,
            "peak_bytes": peaks,
            "planned_bytes": planned,
            "error": errors,
        },
    )


if __name__ == "__main__":
    main()
