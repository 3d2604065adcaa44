"""Solve for the constants of the analytic detector: `python -m sfumato.evaluate.fit_analytic --out FOLDER`.

Mixtures by expectation–maximisation, principal axes by eigenvectors, the crops' reading by ridge regression.
There is no gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.evaluate.ceiling import ceiling_card
from sfumato.evaluate.degrade import degrade
from sfumato.evaluate.detect import SIDE
from sfumato.evaluate.detect_analytic import FEATURES, AnalyticDetector, pixel_features
from sfumato.scenes.graph import COLORS, MATERIALS, SHAPES, Scene
from sfumato.scenes.render import render
from sfumato.scenes.sample import sample_scene
from sfumato.storage import save_tensors, write_json

SEED = 700_000_000
MIXTURE = 10  # Gaussians for the floor and for each colour
AXES = 80  # principal axes kept of a region's features
WAVES = 1500  # random cosines that stand for a Gaussian kernel (Rahimi & Recht 2007)
WIDTH = 14.0  # of the kernel, in whitened units
RIDGE = 0.3
PRIOR = 2.0  # nats against each colour


def fit_scene(seed: int) -> Scene:
    """Scenes to fit on, held-out content among them as for the learned detector, but none of its scenes."""
    split = ("pairs", "pairs", "relations", "counts")[seed % 20] if seed % 20 < 4 else "train"
    return sample_scene(seed, split=split)


def draw(start: int, count: int) -> tuple[list[Scene], Tensor, Tensor]:
    """Scenes, pictures (N, 3, 128, 128) in [-1, 1] of which every second is damaged, and instance maps."""
    scenes = [fit_scene(SEED + start + i) for i in range(count)]
    parts = [render(scenes[i : i + 8], size=SIDE) for i in range(0, count, 8)]
    pixels = torch.cat([part.rgb[:, :, 0] for part in parts]) * 2 - 1
    pixels[1::2] = degrade(pixels[1::2], torch.Generator().manual_seed(start), strength=0.5)
    return scenes, pixels, torch.cat([part.instances[:, 0] for part in parts]).long()


def mixture(rows: Tensor, generator: torch.Generator, rounds: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian mixture of rows (N, D) by EM: means (K, D), roots R with R R^T-whitening (K, D, D), log
    levels (K,)."""
    count, width = rows.shape
    scale = rows.std(0)
    means = rows[torch.randperm(count, generator=generator)[:MIXTURE]]
    share = torch.full((MIXTURE,), 1 / MIXTURE)
    spread = torch.diag((scale * 0.6) ** 2).repeat(MIXTURE, 1, 1)
    for _ in range(rounds):
        lower = torch.linalg.cholesky(spread)
        roots = torch.linalg.inv(lower)
        levels = share.log() - lower.diagonal(dim1=1, dim2=2).log().sum(1) - width / 2 * math.log(2 * math.pi)
        gap = torch.einsum("kij,nkj->nki", roots, rows[:, None] - means)
        part = (levels - 0.5 * gap.square().sum(2)).softmax(1)  # (N, K)
        mass = part.sum(0) + 1.0
        share = mass / mass.sum()
        means = (part.T @ rows + means) / mass[:, None]
        away = rows[:, None] - means
        spread = torch.einsum("nk,nki,nkj->kij", part, away, away) / mass[:, None, None] + 2e-3 * torch.eye(
            width
        )
    lower = torch.linalg.cholesky(spread)
    levels = share.log() - lower.diagonal(dim1=1, dim2=2).log().sum(1) - width / 2 * math.log(2 * math.pi)
    return means, torch.linalg.inv(lower), levels


def fit_pixels(count: int, per_class: int = 5000) -> dict[str, Tensor]:
    """Mixtures of floor and colours from the pixels of `count` scenes."""
    generator = torch.Generator().manual_seed(SEED)
    scenes, pixels, instances = draw(0, count)
    features = torch.cat([pixel_features(part) for part in pixels.split(16)])
    table = torch.zeros(count, 6, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for k, obj in enumerate(scene.objects):
            table[i, k + 1] = 1 + COLORS.index(obj.color)
    classes = table.gather(1, instances.flatten(1)).flatten()
    rows = features.movedim(1, -1).reshape(-1, FEATURES)
    near = (
        F.max_pool2d((instances > 0).float()[:, None], 15, 1, 7).flatten() > 0
    )  # half of the floor from beside objects
    found = []
    for k in range(len(COLORS) + 1):
        chosen = (classes == k).nonzero()[:, 0]
        take = torch.randperm(len(chosen), generator=generator)[: (3 if k == 0 else 1) * per_class]
        chosen = chosen[take]
        if k == 0:
            beside = ((classes == 0) & near).nonzero()[:, 0]
            chosen = torch.cat(
                [chosen, beside[torch.randperm(len(beside), generator=generator)[: 3 * per_class]]]
            )
        found.append(mixture(rows[chosen], generator))
    means, roots, levels = (torch.cat(part) for part in zip(*found, strict=True))
    prior = torch.tensor([0.0] + [-PRIOR] * len(COLORS))
    return {"means": means, "roots": roots, "levels": levels, "prior": prior}


def fit_regions(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The reading of crops, from the regions that the pixel stage itself finds in `count` further scenes."""
    detector = AnalyticDetector(tensors)
    scenes, pixels, instances = draw(1_000_000, count)
    rows, wanted = [], []
    for start in range(0, count, 8):
        for i, regions in enumerate(detector.regions(pixels[start : start + 8]), start):
            for region in regions:
                rows.append(region.row)
                wanted.append(truth(region.mask, instances[i], scenes[i]))
    x, y = torch.stack(rows), torch.stack(wanted)
    weight = torch.ones(len(x))
    centre = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    axes, spread = vectors[:, -AXES:], (values[-AXES:].clamp_min(1e-6) + 0.02 * values[-1]).sqrt()
    z = ((x - centre) @ axes) / spread
    generator = torch.Generator().manual_seed(SEED)
    frequencies = torch.randn(AXES, WAVES, generator=generator) / (WIDTH * 0.5)
    phases = torch.rand(WAVES, generator=generator) * 2 * math.pi
    phi = torch.cat([torch.cos(z @ frequencies + phases), z, torch.ones(len(z), 1)], dim=1)
    known = y[:, -1] > 0.5  # what is no object has no shape
    solution = torch.cat(
        [_ridge(phi[known], y[known, :-1], weight[known]), _ridge(phi, y[:, -1:], weight)], dim=1
    )
    fitted = {"centre": centre, "axes": axes, "spread": spread, "frequencies": frequencies, "phases": phases}
    return {**tensors, **fitted, "solution": solution}


def _ridge(phi: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    phi, y, weight = phi.double(), y.double(), weight.double()
    gram = phi.T @ (weight[:, None] * phi) + RIDGE * torch.eye(phi.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, phi.T @ (weight[:, None] * y)).float()


def truth(mask: Tensor, instances: Tensor, scene: Scene) -> Tensor:
    """What a region should be read as: one-hot shape and material of the object it covers, and whether it
    covers one."""
    answer = torch.zeros(len(SHAPES) + len(MATERIALS) + 1)
    names, sizes = instances[mask].unique(return_counts=True)
    name, size = int(names[sizes.argmax()]), int(sizes.max())
    if name == 0 or size < 0.5 * int(mask.sum()) or size < 0.5 * int((instances == name).sum()):
        return answer
    obj = scene.objects[name - 1]
    answer[SHAPES.index(obj.shape)] = answer[len(SHAPES) + MATERIALS.index(obj.material)] = answer[-1] = 1.0
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the constants and the card")
    parser.add_argument("--pixels", type=int, default=300, help="scenes the mixtures are fitted on")
    parser.add_argument("--regions", type=int, default=2500, help="scenes the reading of crops is fitted on")
    parser.add_argument("--check", type=int, default=500, help="unseen scenes to measure on")
    given = parser.parse_args()
    tensors = fit_regions(fit_pixels(given.pixels), given.regions)
    save_tensors(
        given.out / "analytic.safetensors",
        {k: v.half() if k in {"axes", "frequencies"} else v for k, v in tensors.items()},
    )
    card = {
        "what": "Analytic detector of objects in pictures of scenes; closed-form fits, used by evaluation only",
        "scenes": {"pixels": given.pixels, "regions": given.regions},
        "measured": ceiling_card(AnalyticDetector(tensors), given.check),
    }
    write_json(given.out / "analytic.json", card)
    sys.stdout.write(json.dumps(card["measured"], indent=2) + "\n")


if __name__ == "__main__":
    main()
