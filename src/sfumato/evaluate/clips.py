"""Clips against exact truth: do things stay what they are, go where was asked, as fast, and through nothing?

Scenes in motion that training never shows are rendered, and their captions are drawn: from words alone, and from words
and the first frame. The network detector reads every frame of each. Beside the model's clips stand copies of the first
frame, which keep everything and move nothing (the floor), real clips through the autoencoder, and real clips (the
ceiling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.autoencoder.causal import check_frames
from sfumato.drawing.clips import makes_clips
from sfumato.errors import InputError
from sfumato.evaluate.detect import Detection, Detector
from sfumato.evaluate.statistics import Interval, bootstrap
from sfumato.generate import Model, to_image, to_pixels
from sfumato.scenes import Scene, describe, render, sample_scene
from sfumato.scenes.graph import HALF_WIDTH, RADIUS, STILL, Object, camera_move, motion_of
from sfumato.scenes.motion import flow, paths
from sfumato.types import Request

ARMS = ("copies", "words", "picture", "autoencoder", "real")
METRICS = {  # name → (what it says, whether more is better)
    "identity": "objects found again, with shape and colour",
    "colour": "objects found again, with their colour",
    "count": "frames with as many objects as the first",
    "direction": "straight movers that go where they shall",
    "speed_error": "error of their speed, as a share of it",
    "apart": "frames in which no two objects overlap",
    "flicker": "change of the still floor, of 255 levels",
    "warp_error": "change of objects along the true flow, of 255 levels",
}
OVERLAP = 0.7  # of the distance at which two solids touch: what a detector's error may take off it
SEEN = 0.5  # share of the frames that an object must be found in for its motion to count
DRAWN = 8  # clips in memory at a time


@dataclass(frozen=True)
class ClipReport:
    """arms[arm][metric], each an interval over clips; a metric that an arm has nothing to say of is absent."""

    split: str
    clips: int
    frames: int
    arms: dict[str, dict[str, Interval]]

    def to_dict(self) -> dict[str, object]:
        arms = {
            arm: {name: value.to_dict() for name, value in found.items()} for arm, found in self.arms.items()
        }
        return {"split": self.split, "clips": self.clips, "frames": self.frames, "arms": arms}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: a metric each, an arm a column."""
        rows = []
        for name, what in METRICS.items():
            cells = [_shown(name, self.arms[arm].get(name)) for arm in self.arms]
            rows.append([what, *cells])
        return ["", *self.arms], rows


def _shown(name: str, value: Interval | None) -> str:
    if value is None:
        return "–"
    if name in ("warp_error", "flicker"):
        return f"{value.mean:.1f}"
    if name == "speed_error":
        return f"{100 * value.mean:.0f} %"
    return f"{100 * value.mean:.0f} % ({100 * value.low:.0f}–{100 * value.high:.0f})"


def evaluate_clips(
    model: Model,
    detector: Detector,
    count: int,
    seed: int = 0,
    *,
    split: str = "val",
    frames: int = 9,
    steps: int | None = None,
    guidance: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ClipReport:
    """Measure `count` clips of a split, "val" or "motions" (speeds in directions that training never shows).

    Clips whose camera stands still, of one or two objects. Raises `InputError` for a model that draws no clips.
    """
    if not makes_clips(model) or model.system.animates:
        raise InputError(f"{model.name!r} draws no clips from prompts", argument="model")
    check_frames(frames)
    scenes = clip_scenes(count, seed, split, frames)
    values: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in METRICS} for arm in ARMS}
    for start in range(0, count, DRAWN):
        some = scenes[start : start + DRAWN]
        made = render(some, model.preset["size"][0])
        real = 2 * made.rgb - 1  # (B, 3, T, H, W)
        flows, valid = flow(some, made), still_seen(made.instances)
        things = (made.instances > 0)[:, :-1]
        for k, scene in enumerate(some):
            clips = _drawn(model, scene, real[k], seed + start + k, steps, guidance)
            for arm, pixels in clips.items():
                truth = None if arm == "words" else (flows[k], valid[k] & things[k], valid[k] & ~things[k])
                for name, value in measured(detector, scene, pixels, truth).items():
                    values[arm][name].append(value)
            if on_progress:
                on_progress("clips", start + k + 1, count)
    arms = {
        arm: {name: bootstrap(found) for name, found in names.items() if found}
        for arm, names in values.items()
    }
    return ClipReport(split, count, frames, arms)


def clip_scenes(count: int, seed: int, split: str, frames: int) -> list[Scene]:
    """Scenes of a split in which something moves and the camera does not, one or two objects each."""
    found: list[Scene] = []
    at = 1_000_003 * (seed + 1)
    while len(found) < count:
        scene = sample_scene(at, split=split, objects=(1, 2), frames=frames)
        at += 1
        if camera_move(scene) is None and any(obj.moves for obj in scene.objects):
            found.append(scene)
    return found


def _drawn(
    model: Model, scene: Scene, real: Tensor, seed: int, steps: int | None, guidance: float | None
) -> dict[str, Tensor]:
    """The clip of every arm, (3, T, H, W) in [-1, 1]."""
    prompt = describe(scene, seed, "full")[0]
    first = to_image(real[:, :1])
    asked = Request(prompt, seed=seed, frames=scene.frames, fps=scene.fps, steps=steps, guidance=guidance)

    def drawn(request: Request) -> Tensor:
        clip = model.generate(request).clips[0]
        return torch.cat([to_pixels(frame) for frame in clip.frames], 1)

    coded = model.decode_pixels(model.encode_pixels(real[None]))[0].cpu()
    return {
        "copies": real[:, :1].expand_as(real),
        "words": drawn(asked),
        "picture": drawn(replace(asked, image=first)),
        "autoencoder": coded,
        "real": real,
    }


def measured(
    detector: Detector, scene: Scene, pixels: Tensor, truth: tuple[Tensor, Tensor, Tensor] | None
) -> dict[str, float]:
    """What one clip (3, T, H, W) scores; truth: flow (2, T − 1, H, W), and where it holds (T − 1, H, W) of objects and
    of the floor, of clips that begin with the scene's own first frame.
    """
    seen = detector.detect(pixels.transpose(0, 1))
    found: dict[str, float] = {}
    if seen[0]:
        found["identity"], found["colour"] = (persistence(seen, shape) for shape in (True, False))
        found["count"] = sum(len(frame) == len(seen[0]) for frame in seen[1:]) / (len(seen) - 1)
    if any(len(frame) > 1 for frame in seen):
        crowded = [frame for frame in seen if len(frame) > 1]
        found["apart"] = sum(_apart(frame) for frame in crowded) / len(crowded)
    right, errors = [], []
    places = paths(scene)
    for k, obj in enumerate(scene.objects):
        motion = motion_of(scene, obj)
        if motion is None or obj.hop > 0 or motion[1] == "around":
            continue
        true = velocity(places[:, k], scene.times())
        own = tracked(seen, obj, scene)
        right.append(float(own is not None and _heading(own) == _heading(true)))
        errors.append(math.dist(own or (0.0, 0.0), true) / math.hypot(*true))
    if right:
        found["direction"], found["speed_error"] = sum(right) / len(right), sum(errors) / len(errors)
    if truth is not None:
        moved, things, floor = truth
        found["warp_error"] = warp_error(pixels, moved, things)
        found["flicker"] = warp_error(pixels, moved, floor)
    return found


def persistence(seen: Sequence[list[Detection]], shape: bool) -> float:
    """Share of the first frame's objects that later frames show, each once, by colour and perhaps shape."""

    def names(frame: list[Detection]) -> list[tuple[str, ...]]:
        return [(d.color, d.shape) if shape else (d.color,) for d in frame]

    wanted, kept = names(seen[0]), 0
    for frame in seen[1:]:
        left = names(frame)
        for name in wanted:
            if name in left:
                left.remove(name)
                kept += 1
    return kept / (len(wanted) * (len(seen) - 1))


def tracked(seen: Sequence[list[Detection]], obj: Object, scene: Scene) -> tuple[float, float] | None:
    """Floor velocity, right and away per second, of what looks like an object of the scene; None if it is not to be
    found in enough frames.
    """
    times, places = [], []
    for seconds, frame in zip(scene.times(), seen, strict=True):
        alike = [d for d in frame if (d.color, d.shape) == (obj.color, obj.shape)]
        if not alike:
            continue
        near = alike[0]
        if places:
            near = min(alike, key=lambda d: math.dist((d.right, d.away), places[-1]))
        times.append(seconds)
        places.append((near.right, near.away))
    if len(times) < max(2, SEEN * scene.frames):
        return None
    return velocity(torch.tensor(places, dtype=torch.float64), times)


def velocity(places: Tensor, times: Sequence[float]) -> tuple[float, float]:
    """Slope (right, away) of places (T, 2) over times, by least squares."""
    t = torch.tensor(times, dtype=torch.float64)
    t = t - t.mean()
    slope = (t[:, None] * (places - places.mean(0))).sum(0) / t.square().sum()
    return float(slope[0]), float(slope[1])


def _heading(speed: tuple[float, float]) -> str | None:
    """The word for a velocity, or None where there is hardly any: twice what counts as still, for a detector errs."""
    right, away = speed
    if math.hypot(right, away) < 2 * STILL:
        return None
    if abs(right) >= abs(away):
        return "right" if right > 0 else "left"
    return "away" if away > 0 else "toward"


def _apart(frame: list[Detection]) -> bool:
    """Whether no two solids stand in one another, as far as a detector can tell."""
    for a, b in combinations(frame, 2):
        touch = HALF_WIDTH[a.shape] * RADIUS[a.size] + HALF_WIDTH[b.shape] * RADIUS[b.size]
        if math.dist((a.right, a.away), (b.right, b.away)) < OVERLAP * touch:
            return False
    return True


def still_seen(instances: Tensor) -> Tensor:
    """(B, T, H, W) uint8 → (B, T − 1, H, W): pixels well inside something that is there in the next frame as well,
    where the flow may be compared: neither edges nor what comes out from behind."""
    x = instances.float()
    inside = F.max_pool2d(x, 3, 1, 1) == -F.max_pool2d(-x, 3, 1, 1)
    return inside[:, :-1]


def warp_error(pixels: Tensor, moved: Tensor, valid: Tensor) -> float:
    """Mean absolute difference, of 255 levels, between each frame (3, T, H, W) and the next one fetched back along the
    flow (2, T − 1, H, W), where `valid` and where it does not leave the picture."""
    _, T, H, W = pixels.shape
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    total, count = 0.0, 0
    for t in range(T - 1):
        u, v = (x + moved[0, t]) * (2 / W) - 1, (y + moved[1, t]) * (2 / H) - 1
        grid = torch.stack([u, v], -1)[None]
        back = F.grid_sample(pixels[None, :, t + 1], grid, padding_mode="border", align_corners=False)[0]
        where = valid[t] & (u.abs() < 1) & (v.abs() < 1)
        total += float((back - pixels[:, t]).abs().mean(0)[where].sum())
        count += int(where.sum())
    return 127.5 * total / max(1, count)
