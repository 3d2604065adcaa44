"""What every training run has in common: a recipe in a folder, in this process; its pictures; what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.data.folder import FolderSource
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Source, to_float
from sfumato.errors import InputError
from sfumato.families import family_named
from sfumato.train.loop import Event, OnEvent, World
from sfumato.train.recipe import DataRecipe, Recipe, check, read_recipe

HELD_OUT_SCENES = 256  # of the val split, to measure on
VOLATILE = {"steps", "save_every", "sheet_every"}  # may change between two starts of one run


def with_data(recipe: Recipe, data: str | Path | None) -> Recipe:
    """The recipe with its pictures from the folder `data`, whatever they are by its own words; as it is without one."""
    if data is None:
        return recipe
    changed = replace(recipe, data=replace(recipe.data, kind="folder", path=str(data)))
    check(changed)
    return changed


def source_of(
    recipe: Recipe, multiple: int, part: str = "all", cache: str | Path | None = None
) -> SceneSource | FolderSource:
    """The pictures of a recipe, their sides multiples of `multiple`.

    part: all, or what the autoencoder sees (train) or is measured on (held_out). cache: a folder for what is made of
    them once; None keeps nothing but the scenes of a recipe that names a cache itself. Raises `InputError` when the
    recipe names no pictures, `DataError` for unusable ones.
    """
    d = recipe.data
    if d.kind == "scenes":
        split = "val" if part == "held_out" else d.split
        count = HELD_OUT_SCENES if part == "held_out" else d.count
        kept = d.cache or (None if cache is None else Path(cache) / "scenes")
        return SceneSource(count, d.seed, split, d.size, cache=kept, options=options_of(d))
    if not d.path:
        raise InputError(
            "no pictures were named: give --data DIR, or data.path in the recipe", argument="data"
        )
    return FolderSource(
        d.path,
        d.size,
        multiple=multiple,
        seed=d.seed,
        flip=d.flip,
        part=part,
        held_out=d.held_out,
        cache=None if cache is None else Path(cache) / "pictures",
    )


def options_of(data: DataRecipe) -> dict[str, Any]:
    """What a recipe asks of its scenes beyond their split; nothing where it asks for what they are anyway."""
    return {} if data.objects == DataRecipe.objects else {"objects": data.objects}


def training_pictures(recipe: str | Path, data: str | Path | None, most: int) -> Tensor:
    """The first `most` pictures that a recipe trains on, of its commonest shape: (M, 3, H, W) in [-1, 1]."""
    read = with_data(read_recipe(recipe), data)
    source = source_of(read, multiple_of(read))
    members = max(source.buckets().values(), key=len)[:most]
    return to_float(source.pixels(members))[:, :, 0]


def multiple_of(recipe: Recipe) -> int:
    """What the sides of a recipe's pictures must be multiples of, by its autoencoder and its denoiser's family."""
    if recipe.autoencoder is None:
        raise InputError("the recipe has no [autoencoder]: give one with init = a model to take it from")
    if recipe.denoiser is None:
        return recipe.autoencoder.model.factor
    shape = recipe.autoencoder.model, recipe.denoiser.model
    return family_named(recipe.family).configure(*shape, (), recipe.preset).multiple


@dataclass
class Job:
    """One recipe in one folder, in this process. stage: what notes are about where they do not say."""

    recipe: Recipe
    folder: Path
    device: torch.device
    listener: OnEvent

    stage = ""

    def __post_init__(self) -> None:
        self.world = World.current()

    def whole(self) -> Path:
        """Do all of it; what to open afterwards."""
        raise NotImplementedError

    def tell(self, event: Event) -> None:
        if self.world.leads:
            self.listener(event)

    def note(self, text: str, stage: str = "") -> None:
        self.tell(Event("note", stage or self.stage, text=text))

    def progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.tell(Event("prepare", stage, done, total))

    def source(self, multiple: int, part: str = "all") -> Source:
        """The pictures to learn from, as `source_of` says; scenes are rendered. All processes call this together."""
        source = source_of(self.recipe, multiple, part, self.folder)
        if isinstance(source, SceneSource):
            if self.world.leads:
                source.prepare(on_progress=self.progress("rendering"))
            self.world.wait()
        return source

    def describe(self, source: Source, more: str = "") -> None:
        """Say how many pictures there are, and what was set aside."""
        self.note(f"{len(source):,} pictures in {len(source.buckets())} sizes{more}")
        if problems := getattr(source, "problems", ()):
            first = problems[0]
            self.note(f"{len(problems):,} set aside, the first {first.path}: {first.reason}")


def data_identity(data: DataRecipe) -> dict[str, Any]:
    """What of a recipe's [data] decides the weights; the objects of scenes where they are not what they always were."""
    return {
        name: value
        for name, value in (asdict(data) | {"cache": ""}).items()
        if name != "objects" or options_of(data)
    }


def fingerprint(parts: Any) -> str:
    """A hash of plain values: of what decides the weights at a given step."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
