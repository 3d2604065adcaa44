"""How well pocket's ControlNets are obeyed, by the renderer's truth: drawn with and without a control picture.

    python benchmarks/control.py --scenes 64

Scenes are of a held-out split. Edges: Canny's of the drawn picture against the exact ones of the scene, F1 within two
pixels; the real render's own Canny edges are the ceiling, since shadows and glints are edges to it too. Depth: a small
network, trained here on other scenes, tells the depth of each cell from the picture's latent; the error is the mean of
|ln d − ln d'| over cells that show objects, and that on real renders is its floor.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from sfumato import Request, load
from sfumato.data.scenes import SceneSource
from sfumato.generate import Model
from sfumato.scenes import render
from sfumato.scenes.controls import control_pictures, edges
from sfumato.types import Control

SIDE = 128
REACH = 2  # pixels by which an edge may be off
PROBE_SCENES, PROBE_STEPS, PROBE_BATCH = 1500, 400, 64


def rendered(source: SceneSource, start: int = 0) -> dict[str, Tensor]:
    """Pictures (N, 3, H, W) in [-1, 1], exact edges, depth and masks (N, H, W), and control pictures of a source."""
    parts: dict[str, list[Tensor]] = {}
    for first in range(start, len(source), 32):
        made = render([source.scene(i) for i in range(first, min(first + 32, len(source)))], size=SIDE)
        found = {
            "pixels": made.rgb[:, :, 0] * 2 - 1,
            "edges": edges(made.instances[:, 0], made.normals[:, :, 0]),
            "depth": made.depth[:, 0],
            "objects": made.instances[:, 0] > 0,
            **{f"shown_{kind}": control_pictures(made, kind) for kind in ("depth", "edge", "mask")},
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


def picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], or uint8."""
    if pixels.dtype != torch.uint8:
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def edge_scores(drawn: Image.Image, truth: Tensor) -> tuple[float, float]:
    """(share of Canny's edges that are true, share of the true ones found) of one picture."""
    found = cv2.Canny(np.asarray(drawn.convert("RGB")), 60, 120) > 0
    true = truth.numpy()
    kernel = np.ones((2 * REACH + 1,) * 2, np.uint8)
    near_true, near_found = (cv2.dilate(e.astype(np.uint8), kernel) > 0 for e in (true, found))
    right = (found & near_true).sum() / max(found.sum(), 1)
    got = (true & near_found).sum() / max(true.sum(), 1)
    return float(right), float(got)


def f1(scores: list[tuple[float, float]]) -> float:
    """Of the mean precision and recall."""
    precision, recall = np.mean(scores, axis=0)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


class Probe(nn.Module):
    """Latents (B, 8, H/8, W/8) to ln depth of their cells (B, H/8, W/8)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 2, 64, 5, padding=2), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 1, 1),
        )  # fmt: skip

    def forward(self, latent: Tensor) -> Tensor:
        B, _, H, W = latent.shape
        y, x = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
        place = torch.stack([y, x]).expand(B, -1, -1, -1)
        return self.layers(torch.cat([latent, place], 1))[:, 0]


@torch.no_grad()
def latents(model: Model, pixels: Tensor) -> Tensor:
    return torch.cat([model.system.encode(part[:, :, None])[:, :, 0].float() for part in pixels.split(32)])


def cells(values: Tensor, side: int = 8) -> Tensor:
    return functional.avg_pool2d(values[:, None].float(), side)[:, 0]


def probe(model: Model) -> Probe:
    """Trained on scenes of the training split."""
    made = rendered(SceneSource(PROBE_SCENES, 991, "train", SIDE))
    known, told = latents(model, made["pixels"]), cells(made["depth"].log())
    torch.manual_seed(0)
    net = Probe(known.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(PROBE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / PROBE_STEPS)
        chosen = torch.randint(len(known), (PROBE_BATCH,))
        loss = (net(known[chosen]) - told[chosen]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def depth_error(model: Model, net: Probe, pictures: Tensor, made: dict[str, Tensor]) -> float:
    shows = cells(made["objects"]) > 0.5
    off = (net(latents(model, pictures)) - cells(made["depth"].log())).abs()
    return float(off[shows].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--split", default="val")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--controlnet", action="append", default=[], metavar="KIND=FILE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    files = dict(text.split("=", 1) for text in given.controlnet)
    model = load("pocket", controlnets={k: Path(v) for k, v in files.items()} or None)
    source = SceneSource(given.scenes, 3, given.split, SIDE)
    made, net = rendered(source), probe(model)
    rows = {"real renders": made["pixels"]}
    for kind in (None, *model.system.controls):
        drawn = []
        for k in range(given.scenes):
            controls = None if kind is None else (Control(kind, picture(made[f"shown_{kind}"][k])),)
            result = model.generate(Request(source.caption(k), seed=k, steps=given.steps, controls=controls))
            drawn.append(torch.from_numpy(np.array(result.images[0])).permute(2, 0, 1) / 127.5 - 1)
        rows["no control" if kind is None else kind] = torch.stack(drawn)
    table = {
        name: {
            "edge F1": f1([edge_scores(picture(p), t) for p, t in zip(pictures, made["edges"], strict=True)]),
            "depth error": depth_error(model, net, pictures, made),
        }
        for name, pictures in rows.items()
    }
    if given.json:
        print(
            json.dumps({"scenes": given.scenes, "split": given.split, "steps": given.steps, "table": table})
        )
        return
    print(f"{given.scenes} scenes of the split {given.split}, {given.steps} steps")
    for name, scores in table.items():
        print(f"{name:14}" + "  ".join(f"{what} {value:.3f}" for what, value in scores.items()))


if __name__ == "__main__":
    main()
