"""What the shared rooms need to know of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.published.kinds import Family, Network
from sfumato.families.sd3 import folder, keys
from sfumato.families.sd3.adapters import NAMING
from sfumato.families.sd3.condition import READERS
from sfumato.families.sd3.shapes import SAME_TENSORS, SYSTEMS
from sfumato.families.sd3.signatures import control_title, signatures
from sfumato.nn.mmdit import KEPT, MMDiT, MMDiTConfig
from sfumato.nn.mmdit_control import CONTROL_KEPT, MMDiTControl, MMDiTControlConfig
from sfumato.text.clip import ClipConfig

TURBO = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)
NOTES = ("modelspec.title", "modelspec.architecture")


def settled(found: Checkpoint, source: str) -> Checkpoint:
    """As the distilled one if its name or the notes in it say so: its tensors are those of the one it was made from."""
    turbo = f"{found.kind}-turbo"
    if SAME_TENSORS.get(turbo) == found.kind and distilled_by(found, source):
        return replace(found, kind=turbo)
    return found


def distilled_by(found: Checkpoint, source: str) -> str:
    """The name or the note that calls a checkpoint distilled, "" where nothing does."""
    told = [Path(source).absolute().name, *(found.metadata.get(note, "") for note in NOTES)]
    return next((text for text in told if TURBO.search(text)), "")


def unsayable(found: Checkpoint) -> str:
    shift = found.configs.get("scheduler", {}).get("shift", folder.SHIFT)
    if shift != folder.SHIFT:
        return f"its noise levels have the shift {shift}, which a single file cannot say; keep it as a folder"
    return ""


def markers(found: Checkpoint) -> dict[str, Tensor]:
    return {}


def denoiser_config(found: Checkpoint) -> dict[str, Any]:
    return folder.transformer_config(found.system.transformer, found.system.size // found.system.vae.factor)


def scheduler_config(found: Checkpoint) -> dict[str, Any]:
    return folder.scheduler_config()


def model_index(found: Checkpoint, scheduler: str) -> dict[str, Any]:
    return folder.model_index(found.system, scheduler, found.parts)


def pads(kind: str) -> Mapping[str, int | None]:
    """The CLIPs'; T5's tokenizer does not come with the package."""
    clips = {part.name for part in SYSTEMS[kind].text if isinstance(part.config, ClipConfig)}
    return {reader.part: reader.pad for reader in READERS if reader.part in clips}


FAMILY = Family(
    name="sd3",
    denoiser="transformer",
    called="a transformer",
    systems=SYSTEMS,
    predictions=("flow",),
    networks={MMDiTConfig: Network(MMDiT, KEPT), MMDiTControlConfig: Network(MMDiTControl, CONTROL_KEPT)},
    signatures=signatures,
    control_title=control_title,
    denoiser_map=keys.transformer_map,
    extras=keys.EXTRAS,
    settled=settled,
    unsayable=unsayable,
    markers=markers,
    denoiser_config=denoiser_config,
    scheduler_config=scheduler_config,
    model_index=model_index,
    pads=pads,
    same_tensors=SAME_TENSORS,
    naming=NAMING,
)
