"""A study run: arm by arm and seed by seed, each point measured and kept before the next one begins."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import CheckpointError
from sfumato.generate import load
from sfumato.receipts.machine import processor_name
from sfumato.runtime import pick_device
from sfumato.storage import read_json, write_json
from sfumato.study.budget import Plan, plan, with_steps, words_of
from sfumato.study.measure import Judge
from sfumato.study.recipe import Arm, StudyRecipe
from sfumato.train.job import fingerprint
from sfumato.train.loop import OnEvent
from sfumato.train.recipe import Recipe
from sfumato.train.start import run

RESULT = "result.json"
Told = Callable[[str], None]


def place_of(out: Path, arm: Arm, seed: int) -> Path:
    return out / arm.name / f"seed-{seed}"


def run_study(
    study: StudyRecipe,
    out: Path,
    *,
    device: str | None = None,
    on_event: OnEvent | None = None,
    told: Told | None = None,
) -> Path:
    """Do all of a study, or what is left of it; return its folder.

    Each arm and seed has a folder with its checkpoints, and a `result.json` that gains a point whenever one is
    measured. Killed at any moment, the same call goes on. A point's seconds are those since the point before it, of the
    processor on a CPU (so that pauses do not count) and of the clock on a GPU. Raises `CheckpointError` when the folder
    holds results of another recipe, and what training raises.
    """
    say = told or (lambda text: None)
    words = words_of(study)
    judge: Judge | None = None
    for arm, seed in study.order():
        place = place_of(out, arm, seed)
        kept = kept_result(study, arm, seed, place)
        if kept["complete"]:
            say(f"{arm.name}, seed {seed}: complete")
            continue
        if judge is None:
            data = study.recipe(arm, seed).data
            judge = Judge(study.pictures, data.size, data.objects)
            write_json(out / "scenes.json", judge.rendered() | {"pictures": study.pictures})
        follow(study, plan(study, arm, seed, words), place, kept, judge, device, on_event, say)
    return out


def kept_result(study: StudyRecipe, arm: Arm, seed: int, place: Path) -> dict[str, Any]:
    """What stands of an arm and seed; a new beginning where nothing does."""
    identity = fingerprint(study.identity(arm, seed))
    if not (place / RESULT).exists():
        return {"arm": arm.name, "seed": seed, "identity": identity, "points": [], "complete": False}
    kept = read_json(place / RESULT)
    if kept.get("identity") != identity:
        raise CheckpointError(
            f"{place} holds results of another recipe; give another --out, or remove that folder to start anew"
        )
    return kept


def follow(
    study: StudyRecipe,
    way: Plan,
    place: Path,
    kept: dict[str, Any],
    judge: Judge,
    device: str | None,
    on_event: OnEvent | None,
    say: Told,
) -> None:
    """Train one arm and seed from point to point, and measure at each."""
    kept["plan"] = {
        name: value for name, value in asdict(way).items() if name not in ("arm", "seed", "recipe")
    } | {"autoencoder_steps": way.recipe.autoencoder.train.steps if way.recipe.autoencoder else 0}
    recipe = sheltered(way.recipe, place.parent.parent)
    for k in range(len(kept["points"]), len(way.steps)):
        broken = kept.get("begun") == k  # this way was begun before, and its seconds are not known whole
        write_json(place / RESULT, kept | {"begun": k})
        clock = time.perf_counter if pick_device(device).type == "cuda" else time.process_time
        began = clock()
        model = load(
            run(with_steps(recipe, way.steps[k]), out=place, device=device, on_event=on_event), device
        )
        seconds = None if broken else clock() - began
        if "ceiling" not in kept and not way.arm.pixels:
            kept["ceiling"] = judge.rebuilt(model.system.autoencoder)
        measured = judge.drawn(model, study.steps or None)
        kept["points"].append(
            {"compute": way.compute[k], "steps": way.steps[k], "seconds": seconds, **measured}
        )
        kept |= {"begun": k, "machine": machine(model.device), "complete": k + 1 == len(way.steps)}
        write_json(place / RESULT, kept)
        say(
            f"{way.arm.name}, seed {way.seed}, {way.compute[k]:.2e} FLOPs: strict {measured['strict']:.1%}, "
            f"kernel distance {measured['kernel_distance']:.3f}"
        )
    shutil.rmtree(place / "latents", ignore_errors=True)  # large, and made again from the weights that stay


def sheltered(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with its renders kept once for all arms, where it names no place itself."""
    cache = recipe.data.cache or str(out / "scenes")
    return replace(recipe, data=replace(recipe.data, cache=cache))


def machine(device: torch.device) -> dict[str, Any]:
    """What the seconds were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
