"""Reports: how often a model draws what it was asked, between what real pictures and wrong pictures would score.

`evaluate_model` asks the task groups, `distribution_report` compares pictures of captions with real scenes, and
`reconstruction_report` asks what an autoencoder alone loses. All are plain data, as a table and as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from sfumato.autoencoder.metrics import psnr, spectral_error, ssim
from sfumato.errors import InputError
from sfumato.evaluate import statistics as stats
from sfumato.evaluate.ceiling import CHECK_SEED, bounds, complete, pictures, scene_of
from sfumato.evaluate.detect import SIDE, Detection, Detector
from sfumato.evaluate.detect_network import NetworkDetector, fit, load_detector
from sfumato.evaluate.score import COLUMNS, score
from sfumato.evaluate.statistics import Interval
from sfumato.evaluate.tasks import Task, task_groups
from sfumato.scenes import describe, sample_scene

Progress = Callable[[str, int, int], None]  # what is being done, done, of how many
CHUNK = 32  # pictures drawn between two calls of on_progress
THUMBNAIL = 16  # pixels a side when pictures are compared as pictures


class Draws(Protocol):
    """What is asked of a model: pixels (B, 3, H, W) in [-1, 1], picture k a function of prompt k and seed k alone."""

    def generate_pixels(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> Tensor: ...


@dataclass(frozen=True)
class Report:
    """scores: group → detector → column → interval. bounds: group → detector → ceiling or floor → interval.

    agreement: group → share of pictures on which all detectors give the same strict score. settings: what
    was asked for.
    """

    scores: dict[str, dict[str, dict[str, Interval]]]
    bounds: dict[str, dict[str, dict[str, Interval]]]
    agreement: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""

        def plain(value: Any) -> Any:
            if isinstance(value, Interval):
                return value.to_dict()
            return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

        return {name: plain(getattr(self, name)) for name in ("settings", "scores", "bounds", "agreement")}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column names and one row of text for each group and detector; shares in per cent."""
        columns = ["group", "detector", "strict", "95 % interval", *COLUMNS[1:], "ceiling", "floor"]
        rows = []
        for group, by_detector in self.scores.items():
            for detector, found in by_detector.items():
                strict = found["strict"]
                cells = [_percent(found[name].mean) if name in found else "" for name in COLUMNS[1:]]
                limits = self.bounds.get(group, {}).get(detector, {})
                ends = [_percent(limits[k].mean) if k in limits else "" for k in ("ceiling", "floor")]
                span = f"{_percent(strict.low)}–{_percent(strict.high)}"
                rows.append([group, detector, _percent(strict.mean), span, *cells, *ends])
        return columns, rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def default_detectors(device: str = "cpu") -> list[Detector]:
    """The two detectors that ship in the package."""
    from sfumato.evaluate.detect_analytic import load_analytic

    return [load_detector(device), load_analytic()]


def evaluate_model(
    model: Draws,
    groups: Sequence[str] | None = None,
    per_group: int = 100,
    seed: int = 0,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    detectors: Sequence[Detector] | None = None,
    with_bounds: bool = True,
    on_progress: Progress | None = None,
) -> Report:
    """Draw one picture for each prompt of each group and score it with each detector.

    None for steps or guidance means the model's own preset. Intervals draw whole statements, since prompts that
    state one thing are not independent. `with_bounds` also renders real scenes for the ceiling and the floor.
    Raises `InputError` for unknown groups.
    """
    detectors = list(default_detectors() if detectors is None else detectors)
    tasks_by_group = task_groups(per_group, seed, groups)
    scores: dict[str, dict[str, dict[str, Interval]]] = {}
    agreement: dict[str, float] = {}
    size = SIDE
    for name, tasks in tasks_by_group.items():
        pixels = draw(model, name, tasks, seed, steps, guidance, on_progress)
        size = pixels.shape[-1]
        strict = []
        scores[name] = {}
        for detector in detectors:
            seen = detector.detect(pixels)
            scores[name][detector.name] = summarise(seen, tasks, seed)
            strict.append([score(d, t.statement).strict for d, t in zip(seen, tasks, strict=True)])
        agreement[name] = sum(len(set(row)) == 1 for row in zip(*strict, strict=True)) / len(tasks)
    limits: dict[str, dict[str, dict[str, Interval]]] = {}
    if with_bounds:
        for name, tasks in tasks_by_group.items():
            if on_progress:
                on_progress(f"ceiling of {name}", 0, len(tasks))
            found = bounds(detectors, {name: tasks}, size=size, seed=CHECK_SEED + seed)[name]
            limits[name] = {
                d: {k: stats.bootstrap(v, seed=seed) for k, v in f.items()} for d, f in found.items()
            }
    settings = {"per_group": per_group, "seed": seed, "steps": steps, "guidance": guidance, "size": size}
    return Report(scores, limits, agreement, settings)


def draw(
    model: Draws,
    group: str,
    tasks: Sequence[Task],
    seed: int,
    steps: int | None,
    guidance: float | None,
    on_progress: Progress | None = None,
) -> Tensor:
    """One picture for each task, (B, 3, H, W) on the CPU; picture i depends on the group, i and the seed alone."""
    seeds = [Random(f"{group} {i} {seed}").randrange(2**32) for i in range(len(tasks))]
    parts = []
    for start in range(0, len(tasks), CHUNK):
        if on_progress:
            on_progress(f"drawing {group}", start, len(tasks))
        prompts = [task.prompt for task in tasks[start : start + CHUNK]]
        pixels = model.generate_pixels(prompts, seeds[start : start + CHUNK], steps=steps, guidance=guidance)
        parts.append(pixels.float().cpu())
    if on_progress:
        on_progress(f"drawing {group}", len(tasks), len(tasks))
    return torch.cat(parts)


def summarise(
    seen: Sequence[Sequence[Detection]], tasks: Sequence[Task], seed: int = 0
) -> dict[str, Interval]:
    """Mean and interval of every column that the group's statements speak of."""
    found = [score(d, task.statement) for d, task in zip(seen, tasks, strict=True)]
    numbers = {task.statement: i for i, task in enumerate(tasks)}
    clusters = [numbers[task.statement] for task in tasks]
    result = {}
    for name in COLUMNS:
        values = [(v, c) for s, c in zip(found, clusters, strict=True) if (v := getattr(s, name)) is not None]
        if values:
            result[name] = stats.bootstrap([v for v, _ in values], clusters=[c for _, c in values], seed=seed)
    return result


def distribution_report(
    model: Draws,
    count: int = 256,
    seed: int = 0,
    *,
    training: Tensor | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    detector: NetworkDetector | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Pictures of captions of unseen scenes against other unseen scenes; each number stands beside that of
    real pictures.

    training: pictures (M, 3, H, W) in [-1, 1] the model was trained on, among which the nearest neighbours are
    looked for; without them nothing is said of copying. Kernel and Fréchet distances are in the network detector's
    features, and comparable only between reports of one `count`.
    """
    detector = detector or load_detector()
    scenes = [sample_scene(CHECK_SEED + 3 * i + seed, split="val") for i in range(3 * count)]
    described, other, reference = scenes[:count], scenes[count : 2 * count], scenes[2 * count :]
    tasks = [Task(*describe(scene, seed + i, "full")) for i, scene in enumerate(described)]
    drawn = draw(model, "distribution", tasks, seed, steps, guidance, on_progress)
    size = drawn.shape[-1]
    real, held = pictures(other, size), pictures(reference, size)
    features = {"model": detector.features(drawn), "real": detector.features(real)}
    target = detector.features(held)
    result: dict[str, Any] = {"count": count, "seed": seed}
    for name, values in features.items():
        mean, spread = stats.kernel_distance(values, target, seed=seed)
        result[name] = {
            "kernel_distance": mean,
            "kernel_deviation": spread,
            "frechet_distance": stats.frechet_distance(values, target),
        }
    if training is not None:
        result["nearest_training"] = neighbours(detector, drawn, real, training)
    result["diversity"] = diversity(model, detector, seed, steps, guidance)
    return result


def neighbours(detector: NetworkDetector, drawn: Tensor, real: Tensor, training: Tensor) -> dict[str, Any]:
    """How near the training set drawn pictures lie, in features and as small pictures, beside unseen real ones.

    copying_z: see `statistics.copying_z`; closer: share of drawn pictures nearer to a training picture than
    99 % of real ones.
    """
    if training.ndim != 4:
        raise InputError(f"training must be (M, 3, H, W), not {tuple(training.shape)}", argument="training")
    result: dict[str, Any] = {}
    for name, read in (("features", detector.features), ("pixels", thumbnails)):
        bank = read(training)
        near, index = stats.nearest(read(drawn), bank)
        base, _ = stats.nearest(read(real), bank)
        closest = int(near.argmin())
        result[name] = {
            "median": float(near.median()),
            "median_of_real": float(base.median()),
            "copying_z": stats.copying_z(near, base),
            "closer": float((near < base.quantile(0.01)).double().mean()),
            "closest": {
                "picture": closest,
                "training": int(index[closest]),
                "distance": float(near[closest]),
            },
        }
    return result


def thumbnails(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, D): small pictures without their mean colour, scaled so that a distance is a root
    mean square."""
    small = torch.nn.functional.interpolate(fit(pixels.float()), (THUMBNAIL, THUMBNAIL), mode="area")
    small = small - small.mean((2, 3), keepdim=True)
    return small.flatten(1) / small[0].numel() ** 0.5


def diversity(
    model: Draws,
    detector: NetworkDetector,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    prompts: int = 8,
    each: int = 8,
) -> dict[str, float]:
    """How different pictures of one prompt are, and how different real scenes of the same statements are."""
    tasks = task_groups(prompts, seed, ["two"])["two"]
    drawn = draw(model, "diversity", [t for t in tasks for _ in range(each)], seed, steps, guidance)
    scenes = [
        scene_of(t.statement, CHECK_SEED + each * i + k) for i, t in enumerate(tasks) for k in range(each)
    ]
    found: dict[str, float] = {}
    for name, pixels in (("model", drawn), ("real", pictures(scenes, drawn.shape[-1]))):
        rows = detector.features(pixels).split(each)
        found[f"{name}_spread"] = sum(stats.pairwise_spread(r) for r in rows) / prompts
        found[f"{name}_vendi"] = sum(stats.vendi(r) for r in rows) / prompts
    return found


@torch.no_grad()
def reconstruction_report(
    autoencoder: Any,
    count: int = 200,
    seed: int = 0,
    *,
    size: int = SIDE,
    detectors: Sequence[Detector] | None = None,
    batch: int = 16,
) -> dict[str, Any]:
    """What is left of unseen scenes after encoding (the posterior's mode) and decoding.

    psnr (dB), ssim, spectral_error (log10 amplitude by frequency band, see `autoencoder.metrics`), each a
    mean with its interval where it is one number; scene: for each detector the scores of complete
    statements, of the renders themselves and of their reconstructions.
    """
    detectors = list(default_detectors() if detectors is None else detectors)
    scenes = [sample_scene(CHECK_SEED + seed + i, split="val") for i in range(count)]
    real = pictures(scenes, size)
    device = next((p.device for p in autoencoder.parameters()), torch.device("cpu"))
    parts = []
    for part in real.split(batch):
        latent = autoencoder.encode(part[:, :, None].to(device)).mode()
        parts.append(autoencoder.decode(latent).float().cpu().clamp(-1, 1)[:, :, 0])
    rebuilt = torch.cat(parts)
    a, b = rebuilt[:, :, None], real[:, :, None]
    measured = {
        "psnr": stats.bootstrap(
            psnr(a, b).clamp(max=120.0), seed=seed
        ).to_dict(),  # equal pictures count as 120 dB
        "ssim": stats.bootstrap(ssim(a, b), seed=seed).to_dict(),
        "spectral_error": [round(v, 4) for v in spectral_error(a, b).mean(0).tolist()],
    }
    tasks = [Task("", complete(scene)) for scene in scenes]
    scene: dict[str, Any] = {}
    for detector in detectors:
        scene[detector.name] = {
            kind: {k: v.to_dict() for k, v in summarise(detector.detect(shown), tasks, seed).items()}
            for kind, shown in (("render", real), ("reconstruction", rebuilt))
        }
    return {"count": count, "seed": seed, "size": size, **measured, "scene": scene}
