"""Approximate modes that need no training against simply taking fewer steps: time against the error of the picture.

The packaged model draws the same prompts and seeds in every mode, and in 100 exact steps as the reference. Time is that
of the processor, so that waiting does not count; modes alternate from batch to batch. Target: at least one mode has a
smaller error than fewer steps have in the same time. `strict` is the share of pictures that show what was asked, by the
network detector. With --unet: what a call that skips its deep part costs at the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from chart import chart
from common import arguments, keep, model_folder, probe, scratch, show
from torch import Tensor
from unet import CONTEXT, TOKENS, shape_of

import sfumato
from sfumato.evaluate.detect_network import load_detector
from sfumato.evaluate.score import score
from sfumato.evaluate.tasks import Task, task_groups
from sfumato.flops import count_flops
from sfumato.generate import BATCH, Model
from sfumato.nn.packed import pack
from sfumato.nn.unet import UNet

GROUPS = ("single", "colors", "two", "binding", "counting", "relations", "three", "held_pairs")
REFERENCE = 100  # steps
EARLY = {"guidance_interval": (0.5, 1.0)}  # guided in the noisier half alone
FEWER = "fewer steps"
MODES: dict[
    str, tuple[tuple[int, ...], dict[str, Any]]
] = {  # name → numbers of steps, other fields of the request
    FEWER: ((4, 5, 6, 8, 10, 12, 16, 20, 30), {}),
    "guidance where sigma > 0.5": ((6, 8, 12, 16, 20), EARLY),
    "reuse 2": ((8, 12, 16, 20, 30), {"reuse": 2}),
    "reuse 3": ((12, 18, 24, 36), {"reuse": 3}),
    "reuse 2, guidance where sigma > 0.5": ((8, 12, 16, 20, 30), {"reuse": 2, **EARLY}),
}


def drawn(
    model: Model, tasks: list[Task], start: int, fields: dict[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """Latents (B, C, H, W) and pixels (B, 3, H, W) of one batch, and the processor's seconds."""
    request = model.complete(sfumato.Request(**fields))
    began = time.process_time()
    cond = model.condition([*(task.prompt for task in tasks), *[None] * len(tasks)], request)
    latent = model.sample(cond, range(start, start + len(tasks)), request)
    pixels = model.decode_pixels(latent)
    return latent[:, :, 0], pixels[:, :, 0], time.process_time() - began


def decibels(pixels: Tensor, reference: Tensor) -> list[float]:
    """PSNR of each picture, of values in [-1, 1]."""
    errors = (pixels - reference).square().flatten(1).mean(1)
    return [10 * math.log10(4 / max(float(error), 1e-10)) for error in errors]


def measured(model: Model, each: int) -> list[dict[str, Any]]:
    """One row for each mode and number of steps, and the reference first."""
    tasks = [task for group in task_groups(each, names=GROUPS).values() for task in group]
    rows: list[dict[str, Any]] = [{"mode": "reference", "steps": REFERENCE, "fields": {"steps": REFERENCE}}]
    for mode, (numbers, more) in MODES.items():
        rows += [{"mode": mode, "steps": n, "fields": {"steps": n, **more}} for n in numbers]
    detector = load_detector()
    for row in rows:
        row |= {"seconds": [], "psnr": [], "latent": [], "strict": []}
    drawn(model, tasks[:1], 0, {"steps": 2})  # warm
    for number, start in enumerate(range(0, len(tasks), BATCH)):
        batch = tasks[start : start + BATCH]
        reference: tuple[Tensor, Tensor] | None = None
        for row in [rows[0], *rows[1:][:: -1 if number % 2 else 1]]:
            latent, pixels, seconds = drawn(model, batch, start, row["fields"])
            reference = reference or (latent, pixels)
            row["seconds"].append(seconds / len(batch))
            row["psnr"] += decibels(pixels, reference[1])
            apart = (latent - reference[0]).flatten(1).norm(dim=1) / reference[0].flatten(1).norm(dim=1)
            row["latent"] += apart.tolist()
            pairs = zip(detector.detect(pixels), batch, strict=True)
            row["strict"] += [score(seen, task.statement).strict for seen, task in pairs]
    for row in rows:
        request = model.complete(sfumato.Request("a red cube", **row["fields"]))
        row["gflop"] = count_flops(model.generate, request) / 1e9
        row["seconds"] = statistics.median(row["seconds"])
        for name in ("psnr", "latent", "strict"):
            row[name] = statistics.mean(row[name])
    return rows


def at_equal_time(rows: list[dict[str, Any]], seconds: float) -> float:
    """PSNR that fewer steps give in that time, between two of them by log time; the end's beyond."""
    curve = sorted((math.log(row["seconds"]), row["psnr"]) for row in rows if row["mode"] == FEWER)
    now = math.log(seconds)
    for (t0, p0), (t1, p1) in pairwise(curve):
        if t0 <= now <= t1:
            return p0 + (p1 - p0) * (now - t0) / (t1 - t0)
    return curve[0][1] if now < curve[0][0] else curve[-1][1]


def described(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    gain = ""
    if row["mode"] not in (FEWER, "reference"):
        gain = f", {row['psnr'] - at_equal_time(rows, row['seconds']):+.1f} dB against fewer steps"
    return (
        f"{row['mode']}, {row['steps']}",
        f"{row['seconds']:.3f} s",
        f"{row['gflop']:6.1f} GFLOP, {row['psnr']:5.1f} dB, latent {row['latent']:.3f}, "
        f"strict {row['strict']:4.0%}{gain}",
    )


def processor_seconds(calls: dict[str, Callable[[], Any]], rounds: int = 3) -> dict[str, float]:
    """The median of each call over rounds in the order A B, B A, …, each called once before."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            began = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def unet_calls(size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Processor's seconds and GFLOP, of a whole call and one with deep features: SD 1.5's shape, batch 2."""
    config, cells = shape_of([320, 640, 1280, 1280]), size // 8
    torch.manual_seed(0)
    with torch.device("meta"):
        counted = UNet(config)
    network = UNet(config).to(torch.bfloat16).eval().requires_grad_(False)
    pack(network)
    x, context = torch.randn(2, 4, cells, cells), torch.randn(2, TOKENS, CONTEXT)
    given = (x, torch.tensor(500.0), context)

    with torch.inference_mode():
        _, deep = network.forward_with_deep(*given)
        _, none = counted.forward_with_deep(*(value.to("meta") for value in given))
        calls = {
            "whole": lambda: network(*given),
            "with deep features": lambda: network.forward_with_deep(*given, deep=deep),
        }
        there = [value.to("meta") for value in given]
        flops = {
            "whole": count_flops(counted, *there) / 1e9,
            "with deep features": count_flops(lambda *a: counted.forward_with_deep(*a, deep=none), *there)
            / 1e9,
        }
        return processor_seconds(calls), flops


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument(
        "--each", type=int, default=8, help=f"prompts of each of {len(GROUPS)} groups (default 8)"
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the chart there, as SVG")
    parser.add_argument(
        "--unet", action="store_true", help="measure calls of a U-Net of SD 1.5's size instead"
    )
    parser.add_argument("--size", type=int, default=512, help="pixels per side, with --unet (default 512)")
    args = parser.parse_args()
    machine = probe()
    if args.unet:
        times, flops = unet_calls(args.size)
        whole, part = times.values()
        lines = [(name, f"{seconds:.3f} s", f"{flops[name]:.0f} GFLOP") for name, seconds in times.items()]
        lines += [(f"reuse {n}", f"{whole * n / (whole + (n - 1) * part):.2f} times", "") for n in (2, 3, 5)]
        show(f"U-Net of SD 1.5's size, {args.size}×{args.size}, batch 2, bfloat16, packed", machine, lines)
        keep(args.json, {"probe": machine, "size": args.size, "seconds": times, "gflop": flops})
        return
    with scratch() as temporary:
        folder, name = model_folder(args.model, Path(temporary))
        model = sfumato.load(folder)
    rows = measured(model, args.each)
    title = f"{name}: {args.each * len(GROUPS)} prompts, {model.dtype}, processor's seconds for one picture"
    show(title, machine, [described(row, rows) for row in rows])
    after = probe()
    print(f"probe afterwards: {after['fast']:.0f} GFLOP/s, before {machine['fast']:.0f}")
    if args.chart:
        series = {
            mode: sorted(
                (row["seconds"], row["psnr"], str(row["steps"])) for row in rows if row["mode"] == mode
            )
            for mode in MODES
        }
        picture = chart(
            f"Time against error: pocket, numbers are steps, against {REFERENCE} exact steps",
            "processor's seconds for one picture",
            "PSNR, dB",
            series,
        )
        args.chart.write_text(picture, encoding="utf-8")
    keep(args.json, {"model": name, "probe": machine, "probe_after": after, "rows": rows})


if __name__ == "__main__":
    main()
