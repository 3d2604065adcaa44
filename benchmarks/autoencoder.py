"""Encoding and decoding 128×128 pictures, alone and in batches: seconds per picture and FLOP rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, interleaved, keep, model_folder, probe, scratch, show

import sfumato
from sfumato.flops import count_flops, module_size
from sfumato.runtime import autocast


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    with scratch() as temporary:
        folder, name = model_folder(args.model, Path(temporary))
        model = sfumato.load(folder)
    before = probe()
    autoencoder = model.system.autoencoder

    def under(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Callable[[], Any]:
        @torch.inference_mode()
        def once() -> None:
            with autocast(model.device, model.dtype):
                call(x)

        return once

    calls: dict[str, Callable[[], Any]] = {}
    pictures: dict[str, int] = {}
    for batch in args.batches:
        pixels = torch.rand(batch, 3, 1, args.size, args.size, device=model.device) * 2 - 1
        shape = autoencoder.latent_shape(1, args.size, args.size)
        latent = torch.randn(batch, *shape, device=model.device)
        for what, call, x in (
            ("encode", autoencoder.encode_normalized, pixels),
            ("decode", autoencoder.decode_normalized, latent),
        ):
            calls[f"{what}, batch {batch}"] = under(call, x)
            pictures[f"{what}, batch {batch}"] = batch
    flops = {key: count_flops(call) / pictures[key] for key, call in calls.items()}
    times = {key: value / pictures[key] for key, value in interleaved(calls, args.rounds).items()}
    peak = max(before["fast"], probe()["fast"]) * 1e9
    parameters = module_size(autoencoder).parameters
    show(
        f"{name}: autoencoder of {parameters / 1e6:.2f} million parameters, {args.size}×{args.size}",
        before,
        [
            (
                key,
                f"{times[key] * 1e3:.2f} ms",
                f"a picture: {flops[key] / 1e9:.2f} GFLOP at {flops[key] / times[key] / 1e9:.0f} GFLOP/s, "
                f"{flops[key] / times[key] / peak:.0%} of the probe",
            )
            for key in calls
        ],
    )
    keep(
        args.json,
        {
            "model": name,
            "parameters": parameters,
            "size": args.size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "probe": before,
            "seconds_per_picture": times,
            "flops_per_picture": flops,
            "share_of_probe": {key: flops[key] / times[key] / peak for key in calls},
        },
    )


if __name__ == "__main__":
    main()
