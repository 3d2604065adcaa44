"""Models that were distilled to few steps: what says that one is, and how it is drawn then.

Their tensors look like their parents', save that a U-Net which is told the guidance is a latent consistency model's.
What else may say it: the scheduler's JSON of a folder, and the title that somebody noted in a single file. A file that
says nothing is drawn as its parent until the user says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfumato.errors import InputError
from sfumato.families.published.checkpoint import Checkpoint

# what a request gets that leaves it open. Guidance 1 is none: it went into the weights.
DRAWN: dict[str, dict[str, Any]] = {
    "plain": {},
    # Luo et al. 2023 (2310.04378; 2311.05556 for the LoRA): 2 to 8 steps
    "lcm": {"steps": 4, "guidance": 1.0, "sampler": "lcm", "schedule": "lcm"},
    # Sauer et al. 2023 (2311.17042), SD-Turbo and SDXL-Turbo: 1 to 4 steps, at 512
    "turbo": {"steps": 1, "guidance": 1.0, "sampler": "euler_a", "schedule": "trailing", "size": (512, 512)},
    # Lin et al. 2024 (2402.13929), SDXL-Lightning: 2, 4 or 8 steps, as many as the weights are for
    "lightning": {"steps": 4, "guidance": 1.0, "sampler": "euler", "schedule": "trailing"},
}
PRESETS = tuple(DRAWN)
NOTES = ("modelspec.title", "modelspec.tags", "ss_output_name")  # what people and trainers write into a file
_WORD = re.compile(r"(?<![a-z])(lcm|turbo|lightning)(?![a-z])", re.IGNORECASE)


def check_preset(name: str | None) -> None:
    """`InputError` for a preset that is none."""
    if name is not None and name not in DRAWN:
        raise InputError(f"preset {name!r} is unknown; known are {', '.join(PRESETS)}", argument="preset")


def preset_named(found: Checkpoint) -> tuple[str, str]:
    """(one of `PRESETS`; the words that it was guessed from, "" where names, shapes or the scheduler say it).

    Steps are `trailing` in the folders of SD-Turbo, of SDXL-Turbo, whose Euler is ancestral, and of SDXL-Lightning,
    which no other word tells from a parent that somebody set so. With v prediction they are the parents' own custom.
    """
    said = found.configs.get("scheduler", {})
    if found.kind.endswith("-lcm") or said.get("_class_name") == "LCMScheduler":
        return "lcm", ""
    if found.zero_snr:
        return "plain", ""
    if said.get("timestep_spacing") == "trailing" and found.prediction == "epsilon":
        if "Ancestral" in said.get("_class_name", "") or found.kind == "sd2":
            return "turbo", ""
        if found.kind == "sdxl":
            return "lightning", "timestep_spacing: trailing"
    return ("plain", "") if said else _noted(found.metadata)


def _noted(metadata: Mapping[str, str]) -> tuple[str, str]:
    """What a file's notes call it; two different words are none."""
    notes = [str(metadata[name]) for name in NOTES if name in metadata]
    words = {word.lower(): note for note in notes for word in _WORD.findall(note)}
    return next(iter(words.items())) if len(words) == 1 else ("plain", "")


def drawn(name: str, found: Checkpoint) -> dict[str, Any]:
    """Fields of the preset of a checkpoint that is drawn so; what its JSON says comes first."""
    fields = dict(DRAWN[name])
    said = found.configs.get("scheduler", {})
    assert found.system is not None
    if name == "lcm" and found.system.unet.time_cond:
        fields["guidance"] = 8.0  # what its makers draw with, told and not guided
    if name == "turbo" and said.get("timestep_spacing") == "trailing":
        fields["sampler"] = "euler_a" if "Ancestral" in said.get("_class_name", "") else "euler"
    if "sample_size" in found.configs.get("unet", {}):
        fields.pop("size", None)
    return fields
