"""What a study's stored results say: which are complete, which order they allow, how much cheaper one way is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sfumato.storage import read_json
from sfumato.study.recipe import Arm, StudyRecipe
from sfumato.study.run import kept_result, place_of

AGREE = 3  # seeds that must agree before an order is claimed
KEPT = ("seed", "complete", "plan", "ceiling", "points", "machine")  # of a curve, as JSON
TOLD = 0.05  # strict score below which curves are not compared: a handful of pictures
MEASURES = {"strict": True, "kernel_distance": False}  # and whether more of it is better


@dataclass(frozen=True)
class Curve:
    """One arm and seed, as far as it has come. points: rising in compute, each with its measures."""

    arm: Arm
    seed: int
    points: tuple[dict[str, Any], ...]
    complete: bool
    ceiling: dict[str, Any] | None
    plan: dict[str, Any]
    machine: dict[str, Any]

    @property
    def before(self) -> float:
        """FLOPs that were spent before the denoiser's first step."""
        return float(self.plan["autoencoder"] + self.plan["encoding"])

    def last(self, measure: str) -> float:
        return float(self.points[-1][measure])


@dataclass(frozen=True)
class Results:
    """All curves that have a point. scenes: the measures of renders of the captions' own scenes, if known."""

    study: StudyRecipe
    curves: tuple[Curve, ...]
    scenes: dict[str, Any]

    def of(self, arm: Arm) -> list[Curve]:
        """The complete curves of an arm, by seed."""
        return [curve for curve in self.curves if curve.arm.name == arm.name and curve.complete]

    def everything(self) -> bool:
        """Whether nothing is left to run."""
        return sum(curve.complete for curve in self.curves) == len(self.study.arms) * len(self.study.seeds)


def read_results(study: StudyRecipe, out: Path) -> Results:
    """What stands in a study's folder. `CheckpointError` when it is of another recipe."""
    curves = []
    for arm in study.arms:
        for seed in study.seeds:
            kept = kept_result(study, arm, seed, place_of(out, arm, seed))
            if kept["points"]:
                curves.append(
                    Curve(
                        arm,
                        seed,
                        tuple(kept["points"]),
                        bool(kept["complete"]),
                        kept.get("ceiling"),
                        kept["plan"],
                        kept.get("machine", {}),
                    )
                )
    scenes = out / "scenes.json"
    return Results(study, tuple(curves), read_json(scenes) if scenes.exists() else {})


def orders(results: Results, measure: str) -> list[tuple[Arm, Arm]]:
    """Pairs (better, worse) of arms at the end of the budget that three seeds or more allow to be put in order:
    every seed of the one is better than every seed of the other. A strict score counts from `TOLD` on.
    """
    sign = 1 if MEASURES[measure] else -1
    least = TOLD if measure == "strict" else -math.inf
    ends = {arm.name: [sign * curve.last(measure) for curve in results.of(arm)] for arm in results.study.arms}
    return [
        (a, b)
        for a in results.study.arms
        for b in results.study.arms
        if min(len(ends[a.name]), len(ends[b.name])) >= AGREE
        and min(ends[a.name]) > max(ends[b.name])
        and min(ends[a.name]) >= least
    ]


def reached_at(curve: Curve, measure: str, value: float) -> float | None:
    """FLOPs at which a curve first is as good as `value`, between its points by the logarithm of compute; None: never.

    Where its first point is good enough already, that point: the true amount is no more.
    """
    sign = 1 if MEASURES[measure] else -1
    before: tuple[float, float] | None = None
    for point in curve.points:
        here = math.log(point["compute"]), sign * point[measure]
        if here[1] >= sign * value:
            if before is None:
                return float(point["compute"])
            share = (sign * value - before[1]) / (here[1] - before[1])
            return math.exp(before[0] + share * (here[0] - before[0]))
        before = here
    return None


@dataclass(frozen=True)
class Cheaper:
    """How many times less compute than pixels a latent arm takes to the same quality; below 1: how many times more."""

    latent: Arm
    pixel: Arm
    measure: str
    ratios: tuple[float, ...]  # by seed
    at_most: bool = False  # some are: the pixel arm was as good at its first point already
    at_least: bool = False  # some are: the latent arm was

    @property
    def middle(self) -> float:
        return median(self.ratios)


def cheaper(results: Results, latent: Arm, measure: str, *, given: bool = False) -> Cheaper | None:
    """A latent arm against the best pixel arm, seed by seed, at the quality that both of a seed reach: the worse of
    their ends. None without a seed that both have completed. given: the autoencoder and the latents cost nothing, as
    where many denoisers share them. A seed says nothing where both were as good at their first points already.
    """
    pixels = [arm for arm in results.study.arms if arm.pixels and results.of(arm)]
    if not pixels:
        return None
    sign = 1 if MEASURES[measure] else -1
    best = max(pixels, key=lambda arm: sign * mean([c.last(measure) for c in results.of(arm)]))
    theirs = {curve.seed: curve for curve in results.of(best)}
    ratios, at_most, at_least = [], False, False
    for curve in results.of(latent):
        if other := theirs.get(curve.seed):
            both = min(sign * curve.last(measure), sign * other.last(measure)) * sign
            if measure == "strict" and both < TOLD:
                continue  # hardly a picture of one of them was right: there is no quality to compare at
            mine, its = (reached_at(c, measure, both) for c in (curve, other))
            soon, sooner = (at == c.points[0]["compute"] for at, c in ((mine, curve), (its, other)))
            if mine is None or its is None or (soon and sooner):
                continue
            ratios.append(its / (mine - (curve.before if given else 0.0)))
            at_most, at_least = at_most or sooner, at_least or soon
    return Cheaper(latent, best, measure, tuple(ratios), at_most, at_least) if ratios else None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plain(results: Results) -> list[dict[str, Any]]:
    """Every curve as JSON has it."""
    return [
        {"arm": asdict(curve.arm), **{name: getattr(curve, name) for name in KEPT}}
        for curve in results.curves
    ]
