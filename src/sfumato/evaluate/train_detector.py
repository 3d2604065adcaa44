"""Train the learned detector: `python -m sfumato.evaluate.train_detector --out FOLDER`.

Renders a pool of training scenes once (kept in FOLDER, so a second run starts at once), trains on damaged,
shifted and mirrored copies, and writes `detector.safetensors` with a card of what it scores on scenes it never saw.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.evaluate.ceiling import ceiling_card
from sfumato.evaluate.degrade import degrade
from sfumato.evaluate.detect import SIDE
from sfumato.evaluate.detect_network import (
    GRID,
    REACH,
    SPAN,
    STRIDE,
    UNUSED,
    WORDS,
    DetectorConfig,
    DetectorNetwork,
    NetworkDetector,
    load_detector,
)
from sfumato.runtime import autocast, fast_dtype
from sfumato.scenes.graph import Scene
from sfumato.scenes.render import render
from sfumato.scenes.sample import sample_scene
from sfumato.storage import load_tensors, read_json, save_tensors, write_json

ROOM = 6  # objects a row of labels has room for


@dataclass(frozen=True)
class Plan:
    """scenes: pool size; samples: pictures seen in training; peak learning rate of a one-cycle schedule."""

    scenes: int = 12_000
    samples: int = 60_000
    batch: int = 32
    rate: float = 3e-3
    weight_decay: float = 0.02
    ema: float = 0.998
    seed: int = 500_000_000


def pool_scene(seed: int) -> Scene:
    """Scene of a seed for training the detector: a fifth from splits that hold what pictures' own models never
    train on.

    A detector that had never seen an orange cone would call one something else, and held-out scores would
    measure the detector. Scenes of `val` are left out: they are what the ceiling is measured on. A quarter of
    the scenes have three objects or more.
    """
    split = ("pairs", "pairs", "relations", "counts")[seed % 20] if seed % 20 < 4 else "train"
    return sample_scene(seed, split=split, objects=(3, 5) if seed % 4 == 0 else (1, 5))


def make_pool(count: int, seed: int, chunk: int = 8) -> dict[str, Tensor]:
    """Rendered scenes with their labels.

    pixels (N, 3, 128, 128) uint8; cells (N, 32, 32) uint8, 0 floor and k for object k − 1; words (N, 6, 4)
    int8 attribute indices; floor (N, 6, 2) float32 right and away in world units.
    """
    pixels, cells = [], []
    words = torch.zeros(count, ROOM, len(WORDS), dtype=torch.int8)
    floor = torch.zeros(count, ROOM, 2)
    for start in range(0, count, chunk):
        scenes = [pool_scene(seed + i) for i in range(start, min(start + chunk, count))]
        out = render(scenes, size=SIDE)
        pixels.append((out.rgb[:, :, 0] * 255).round().clamp(0, 255).to(torch.uint8))
        cells.append(out.instances[:, 0, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].to(torch.uint8))
        for i, scene in enumerate(scenes, start):
            for k, obj in enumerate(scene.objects):
                words[i, k] = torch.tensor([WORDS[name].index(getattr(obj, name)) for name in WORDS])
                dx, dy = (obj.position[a] - scene.camera.target[a] for a in (0, 1))
                floor[i, k] = torch.tensor(scene.camera.floor_axes(dx, dy))
    return {"pixels": torch.cat(pixels), "cells": torch.cat(cells), "words": words, "floor": floor}


def batch_of(
    pool: dict[str, Tensor], rows: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Damaged, mirrored and shifted pictures (B, 3, 128, 128) in [-1, 1] with their labels."""
    pixels = pool["pixels"][rows].float() / 127.5 - 1
    cells, floor = pool["cells"][rows], pool["floor"][rows].clone()
    mirror = torch.rand(len(rows), generator=generator) < 0.5
    pixels[mirror], cells[mirror] = pixels[mirror].flip(-1), cells[mirror].flip(-1)
    floor[mirror, :, 0] *= -1
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()  # in cells, the same for the batch
    pixels = torch.roll(
        F.pad(pixels, [2 * STRIDE] * 4, mode="reflect"), (down * STRIDE, right * STRIDE), (2, 3)
    )
    pixels = pixels[:, :, 2 * STRIDE : -2 * STRIDE, 2 * STRIDE : -2 * STRIDE]
    cells = torch.roll(F.pad(cells, [2] * 4), (down, right), (1, 2))[:, 2:-2, 2:-2]
    pixels = degrade(pixels, generator) if torch.rand((), generator=generator) < 0.8 else pixels
    return pixels, {"cells": cells, "words": pool["words"][rows].long(), "floor": floor}


def targets(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dense training targets: owner (B, 6, cells) one-hot, centres (B, 6, 2) in cells, seen (B, 6), heat (B,
    32, 32), peak mask."""
    names = torch.arange(1, ROOM + 1, dtype=torch.uint8)[:, None]
    owner = (labels["cells"].flatten(1)[:, None] == names).float()  # (B, 6, cells)
    area = owner.sum(2)
    ys, xs = torch.meshgrid(torch.arange(GRID) + 0.5, torch.arange(GRID) + 0.5, indexing="ij")
    grid = torch.stack([xs, ys]).flatten(1)  # (2, cells)
    centres = torch.einsum("bkn,cn->bkc", owner, grid) / area.clamp(min=1)[..., None]
    seen = area >= 2
    sigma = (area.sqrt() / 6).clamp(0.7, 1.5)
    peak = centres.floor().clamp(0, GRID - 1)
    gap = (peak[..., None] + 0.5 - grid).square().sum(2)  # (B, 6, cells)
    bumps = torch.exp(-gap / (2 * sigma[..., None] ** 2)) * seen[..., None]
    is_peak = ((gap < 0.01) & seen[..., None]).any(1)
    return {
        "owner": owner,
        "centres": centres,
        "seen": seen,
        "heat": bumps.amax(1),
        "peak": is_peak,
        "grid": grid,
        "area": area,
    }


def loss_of(maps: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Terms of the training loss. Each object weighs the same, whatever its area."""
    t = targets(labels)
    flat = {name: value.flatten(2) for name, value in maps.items()}
    heat = flat["heat"][:, 0]
    p = heat.sigmoid()
    hit = t["peak"] * (1 - p) ** 2 * F.logsigmoid(heat)
    miss = ~t["peak"] * (1 - t["heat"]) ** 4 * p**2 * F.logsigmoid(-heat)
    objects = t["seen"].sum().clamp(min=1)
    weight = (
        t["owner"] / t["area"].clamp(min=1)[..., None] * t["seen"][..., None]
    )  # (B, 6, cells), sums to 1 per object
    terms = {
        "object": F.binary_cross_entropy_with_logits(flat["object"][:, 0], t["owner"].sum(1)),
        "heat": -(hit + miss).sum() / objects,
    }
    pull = (t["centres"][..., None] - t["grid"]) / REACH  # (B, 6, 2, cells)
    off = F.smooth_l1_loss(flat["offset"][:, None].expand_as(pull), pull, reduction="none", beta=0.1).sum(2)
    terms["offset"] = (off * weight).sum() / objects
    read = torch.einsum("bkn,bcn->bkc", weight, flat["floor"])
    error = read - labels["floor"] / SPAN
    some = t["seen"][..., None].float()
    error = error - 0.9 * (error * some).sum(1, keepdim=True) / some.sum(1, keepdim=True).clamp(min=1)
    terms["floor"] = (
        F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=0.1) * some
    ).sum() / objects
    for i, name in enumerate(WORDS):
        log_p = flat[name].log_softmax(1)  # (B, words, cells)
        right = log_p.gather(1, labels["words"][..., i, None].expand(-1, -1, log_p.shape[2]))  # (B, 6, cells)
        terms[name] = -(right * weight).sum() / objects
    return terms


def train(
    pool: dict[str, Tensor],
    plan: Plan,
    on_step: Callable[[int, int, float], None] | None = None,
    start: DetectorNetwork | None = None,
) -> DetectorNetwork:
    """One-cycle AdamW from random weights or from `start`; returns the exponential average of the weights."""
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    network = copy.deepcopy(start) if start else DetectorNetwork(DetectorConfig())
    network = network.train().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(plan.ema), use_buffers=True
    )
    steps = plan.samples // plan.batch
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=plan.rate, weight_decay=plan.weight_decay, betas=(0.9, 0.98)
    )
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))) + 1e-3)
    )
    device = torch.device("cpu")
    dtype = fast_dtype(device)
    count = len(pool["pixels"])
    order = torch.randperm(count, generator=generator)
    for step in range(steps):
        start = step * plan.batch % (count - count % plan.batch)
        if start == 0:
            order = torch.randperm(count, generator=generator)
        pixels, labels = batch_of(pool, order[start : start + plan.batch], generator)
        with autocast(device, dtype):
            maps = network(pixels.contiguous(memory_format=torch.channels_last))
        loss = torch.stack(list(loss_of(maps, labels).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if on_step:
            on_step(step + 1, steps, float(loss.detach()))
    return average.module.eval()


@torch.no_grad()
def set_feature_scale(network: DetectorNetwork, pool: dict[str, Tensor], count: int = 1024) -> None:
    """Store mean and deviation of the features over real scenes, so that distances weigh all dimensions alike."""
    parts = (pool["pixels"][:count].float() / 127.5 - 1).split(64)
    values = torch.cat([network.trunk(part)[1] for part in parts])
    network.feature_mean.copy_(values.mean(0))
    network.feature_std.copy_(values.std(0).clamp_min(1e-3))


def save(network: DetectorNetwork, folder: Path, card: dict) -> None:
    """Weights in float16 (the feature scale in float32) and the card beside them."""
    tensors = {k: v for k, v in network.state_dict().items() if not k.endswith(UNUSED)}
    tensors = {k: v if k.startswith("feature") or "running" in k else v.half() for k, v in tensors.items()}
    save_tensors(folder / "detector.safetensors", tensors)
    write_json(folder / "detector.json", card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pool, the weights and the card"
    )
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--start", type=Path, help="folder of weights to go on from, with their card")
    parser.add_argument("--check", type=int, default=1000, help="unseen scenes to measure on")
    given = vars(parser.parse_args())
    folder, check, origin = given.pop("out"), given.pop("check"), given.pop("start")
    plan = Plan(**given)
    began = time.time()
    stored = folder / f"pool-{plan.scenes}-{plan.seed}.safetensors"
    if not stored.exists():
        save_tensors(stored, make_pool(plan.scenes, plan.seed))
    pool = load_tensors(stored)
    rendered = time.time() - began

    def report(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            sys.stderr.write(f"step {step}/{steps}  loss {loss:.3f}  {time.time() - began:.0f} s\n")

    earlier = read_json(origin / "detector.json")["rounds"] if origin else []
    network = train(pool, plan, report, load_detector(folder=origin).network if origin else None)
    set_feature_scale(network, pool)
    seconds = time.time() - began - rendered
    card = {
        "what": "Detector of objects and their attributes in pictures of Sfumato's scenes; used by evaluation only",
        "parameters": sum(p.numel() for p in network.parameters()),
        "rounds": [*earlier, {**asdict(plan), "seconds": round(seconds)}],
        "measured": ceiling_card(NetworkDetector(network), check),
    }
    save(network, folder, card)
    sys.stdout.write(json.dumps(card["measured"], indent=2) + "\n")


if __name__ == "__main__":
    main()
