"""A study's recipe: a training recipe with one more table, [study], and its arms, [[study.arms]].

What stands outside [study] is the recipe of every arm. An arm says what it has of its own: the factor and channels of
its autoencoder, what its denoiser predicts, and any other value by its dotted key.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import InputError
from sfumato.train.recipe import Recipe, build, parse_recipe, read_tables, set_values

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")  # of an arm: it is a folder's too
MAY_NOT = ("seed", "data", "preset.size")  # what an arm may not change: the question would be another


@dataclass(frozen=True)
class Arm:
    """One way to compress. factor 1 is no compression: the denoiser works on pixels."""

    name: str
    factor: int
    channels: int = 3  # of a latent cell; of pixels 3
    prediction: str = "flow"  # what the denoiser predicts: flow (the velocity, JiT's v), x or v
    turn: int = 0  # arms of a later turn wait until those of the earlier have all their seeds
    set: dict = field(default_factory=dict)  # further values, by dotted keys of a training recipe

    @property
    def pixels(self) -> bool:
        return self.factor == 1


@dataclass(frozen=True)
class StudyRecipe:
    """What is compared, and by what measure. `tables` is the training recipe that all arms share."""

    name: str
    arms: tuple[Arm, ...]
    tables: dict[str, Any]
    budget: float  # FLOPs of one arm and seed, its autoencoder's training included
    seeds: tuple[int, ...] = (0, 1, 2)
    points: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # shares of the budget at which pictures are drawn
    autoencoder: float = 0.2  # share of the budget that an autoencoder's training takes
    token: int = 8  # side in pixels of what one token stands for, or the factor where that is more
    pictures: int = 200  # drawn and scored at every point
    steps: int = 0  # of the sampler when they are drawn; 0 for the preset's

    @property
    def ranged(self) -> list[Arm]:
        """The arms from pixels to the coarsest latents, as a reader looks for them."""
        return sorted(self.arms, key=lambda arm: (arm.factor, arm.channels, arm.name))

    def order(self) -> list[tuple[Arm, int]]:
        """Arms and seeds as they are run: by turns, within a turn seed by seed, so that what is there is comparable."""
        turns = sorted({arm.turn for arm in self.arms})
        return [(arm, seed) for turn in turns for seed in self.seeds for arm in self.arms if arm.turn == turn]

    def recipe(self, arm: Arm, seed: int) -> Recipe:
        """The training recipe of one arm and seed, its steps still those of the tables."""
        return parse_recipe(self.tables_of(arm, seed))

    def tables_of(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The same as the tables of a recipe file."""
        tables = copy.deepcopy(self.tables)
        set_values(tables, {"autoencoder.factor": arm.factor, "denoiser.prediction": arm.prediction})
        set_values(tables, {"denoiser.patch": max(1, self.token // arm.factor)})
        if not arm.pixels:
            set_values(tables, {"autoencoder.latent_channels": arm.channels})
        set_values(tables, {**arm.set, "seed": seed, "name": f"{self.name}-{arm.name}-{seed}"})
        return tables

    def identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        """What decides the numbers of one arm and seed: what was written, so that a later version with more to say does
        not take its results for another's.
        """
        return {
            "recipe": self.tables_of(arm, seed),
            **{name: getattr(self, name) for name in ("budget", "autoencoder", "pictures", "steps")},
            "points": list(self.points),
        }


def read_study(path: str | Path) -> StudyRecipe:
    """Read and check a study's recipe; every arm's training recipe is checked too. Raises `InputError`."""
    path = Path(path)
    tables = read_tables(path)
    own = tables.pop("study", None)
    if not isinstance(own, dict):
        raise InputError(
            f"{path} has no table [study]; a recipe that trains one model is for `sfumato train`",
            argument="study",
        )
    name = tables.pop("name", path.stem)
    arms = own.pop("arms", None)
    if not isinstance(arms, list) or not arms:
        raise InputError("the study needs its arms, a table [[study.arms]] for each", argument="study.arms")
    made = tuple(build(Arm, table, f"study.arms[{i}]") for i, table in enumerate(arms))
    study: StudyRecipe = build(StudyRecipe, own, "study", name=name, arms=made, tables=tables)
    _check(study)
    return study


def _check(study: StudyRecipe) -> None:
    names = [arm.name for arm in study.arms]
    for name in names:
        if not NAME.fullmatch(name) or names.count(name) > 1:
            raise InputError(
                f"the arm {name!r} needs a name of its own, of small letters, digits and hyphens",
                argument="study.arms",
            )
    rising = all(a < b for a, b in zip((0.0, *study.points), study.points, strict=False))
    if not study.points or not rising or study.points[-1] != 1.0:
        raise InputError(
            f"study.points must rise from above 0 to 1.0, not {list(study.points)}", argument="study.points"
        )
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise InputError(
            f"study.seeds must be different numbers, not {list(study.seeds)}", argument="study.seeds"
        )
    for name, value, right in (
        ("budget", study.budget, study.budget > 0),
        ("autoencoder", study.autoencoder, 0 < study.autoencoder < 1),
        ("token", study.token, study.token in (1, 2, 4, 8, 16, 32)),
        ("pictures", study.pictures, study.pictures >= 2),
        ("steps", study.steps, study.steps >= 0),
    ):
        if not right:
            raise InputError(f"study.{name} is out of its range: {value}", argument=f"study.{name}")
    for arm in study.arms:
        for key in arm.set:
            if any(key == kept or key.startswith(f"{kept}.") for kept in MAY_NOT):
                raise InputError(f"an arm may not set {key}: all share it", argument="study.arms")
        _check_arm(study.recipe(arm, study.seeds[0]))


def _check_arm(recipe: Recipe) -> None:
    """`InputError` for what a study cannot compare or count."""
    if recipe.autoencoder is None or recipe.denoiser is None:
        raise InputError("a study needs [autoencoder] and [denoiser]", argument="study")
    wrong = {
        "data.kind must be scenes, whose content can be scored": recipe.data.kind != "scenes",
        "denoiser.train.decay must be 0: all points lie along one run": recipe.denoiser.train.decay != 0,
        "autoencoder.loss.adversarial must be 0: a discriminator's FLOPs are not counted": bool(
            recipe.autoencoder.loss.adversarial
        ),
        "autoencoder.train.crop must be 0": bool(recipe.autoencoder.train.crop),
        "init must be empty: what it took to train is not known": bool(
            recipe.autoencoder.init or recipe.denoiser.init
        ),
    }
    for said, holds in wrong.items():
        if holds:
            raise InputError(f"in a study {said}", argument=said.split()[0])
