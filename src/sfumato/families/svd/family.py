"""What the shared rooms need to know of Stable Video Diffusion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato import checks
from sfumato.errors import CheckpointError
from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.published.kinds import Family, Network
from sfumato.families.svd import folder, keys
from sfumato.families.svd.first_stage import FirstStage
from sfumato.families.svd.shapes import SAME_TENSORS, SYSTEMS
from sfumato.families.svd.signatures import signatures
from sfumato.nn.spacetime import KEPT, SpaceTimeConfig, SpaceTimeUNet

LONG = re.compile(r"(?<![a-z])xt(?![a-z])", re.IGNORECASE)
NOTES = ("modelspec.title", "modelspec.architecture")
MOST_FRAMES = 1000  # that a folder may name; beyond it is no clip


def settled(found: Checkpoint, source: str) -> Checkpoint:
    """As the long kind if its folder's JSON, its name or the notes in it say so: its tensors are those of the other."""
    said = found.configs.get("unet", {}).get("num_frames")
    if said is not None and (
        isinstance(said, bool) or not isinstance(said, int) or not 1 <= said <= MOST_FRAMES
    ):
        raise CheckpointError(f"{source}: num_frames of the U-Net must be a number of frames, not {said!r}")
    prediction = found.configs.get("scheduler", {}).get("prediction_type", "v_prediction")
    if prediction != "v_prediction":
        raise CheckpointError(
            f"{source}/scheduler asks for the prediction {prediction!r}; v_prediction is known"
        )
    long = said == SYSTEMS["svd-xt"].frames if said is not None else bool(long_by(found, source))
    kind = "svd-xt" if long and SAME_TENSORS.get("svd-xt") == found.kind else found.kind
    return replace(found, kind=kind)


def long_by(found: Checkpoint, source: str) -> str:
    """The name or the note that calls a checkpoint the long one, "" where nothing does."""
    told = [Path(source).absolute().name, *(found.metadata.get(note, "") for note in NOTES)]
    return next((text for text in told if LONG.search(text)), "")


def levels_of(found: Checkpoint, source: str) -> tuple[float, float]:
    """The ends of the noise levels, as the scheduler's JSON has them, or else the published models'."""
    said = found.configs.get("scheduler", {})
    low, high = (
        said.get(name) or usual for name, usual in zip(("sigma_min", "sigma_max"), folder.SIGMAS, strict=True)
    )
    if not (checks.is_number(low) and checks.is_number(high)) or not 0 < low < high < 1e6:
        raise CheckpointError(
            f"{source}: the scheduler's sigma_min and sigma_max must be numbers, the first smaller, not {low!r} and "
            f"{high!r}"
        )
    return float(low), float(high)


def unsayable(found: Checkpoint) -> str:
    if levels_of(found, "the checkpoint") != folder.SIGMAS:
        return "its noise levels are its own, which a single file cannot say; keep it as a folder"
    frames = found.configs.get("unet", {}).get("num_frames")
    if frames is not None and frames not in [system.frames for system in SYSTEMS.values()]:
        return f"it draws {frames} frames, which a single file cannot say; keep it as a folder"
    return ""


def markers(found: Checkpoint) -> Mapping[str, Tensor]:
    """The first stage's own encoder, from which other programs encode."""
    return FirstStage(found.parts["vae"], found.system.vae) if "vae" in found.parts else {}


def denoiser_config(found: Checkpoint) -> dict[str, Any]:
    system = found.system
    frames = SYSTEMS[found.kind].frames if found.kind in SYSTEMS else system.frames
    return folder.unet_config(system.unet, system.size // system.vae.factor, frames)


def scheduler_config(found: Checkpoint) -> dict[str, Any]:
    return folder.scheduler_config()


def model_index(found: Checkpoint, scheduler: str) -> dict[str, Any]:
    return folder.model_index(found.system, scheduler)


def pads(kind: str) -> Mapping[str, int | None]:
    """No part has a tokenizer."""
    return {}


FAMILY = Family(
    name="svd",
    denoiser="unet",
    called="a U-Net",
    systems=SYSTEMS,
    predictions=("v",),
    networks={SpaceTimeConfig: Network(SpaceTimeUNet, KEPT)},
    signatures=signatures,
    denoiser_map=keys.unet_map,
    extras=keys.EXTRAS,
    settled=settled,
    unsayable=unsayable,
    markers=markers,
    denoiser_config=denoiser_config,
    scheduler_config=scheduler_config,
    model_index=model_index,
    pads=pads,
    same_tensors=SAME_TENSORS,
    naming=None,
    vae_file_map=keys.first_stage_map,
)
