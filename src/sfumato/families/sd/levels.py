"""The noise levels that a Stable Diffusion was trained on, as its scheduler's JSON has them, or the usual ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato import checks
from sfumato.diffusion.schedules import NoiseLevels, beta_levels, beta_table, zero_terminal_snr
from sfumato.errors import CheckpointError
from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.sd.folder import BETAS

TABLES = {
    "scaled_linear": "scaled_linear",
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
}  # diffusers' words
# Sabour et al. 2024 (2404.14507), Align Your Steps: the levels of ten steps that the authors published
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGNED_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def noise_levels(found: Checkpoint, source: str) -> NoiseLevels:
    """Of a checkpoint's training. `CheckpointError`, in which `source` stands for it, for what makes no levels."""
    said = _said(found)
    kind, start, end, steps = (
        said[name] for name in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    )
    where = f"{source}/scheduler"
    if said.get("trained_betas") is not None:
        raise CheckpointError(f"{where} has trained_betas of its own; betas by a beta_schedule are known")
    if kind not in TABLES:
        raise CheckpointError(f"{where} asks for the beta_schedule {kind!r}; known are {', '.join(TABLES)}")
    if not (checks.is_number(start) and checks.is_number(end) and 0 < start < end < 1):
        raise CheckpointError(
            f"{where}: beta_start and beta_end must rise between 0 and 1, not {start!r} and {end!r}"
        )
    if steps != BETAS["num_train_timesteps"]:
        raise CheckpointError(
            f"{where}: num_train_timesteps must be {BETAS['num_train_timesteps']}, not {steps!r}"
        )
    betas = beta_table(TABLES[kind], start, end, steps)
    if found.zero_snr:
        return beta_levels(zero_terminal_snr(betas))
    levels = beta_levels(betas)
    if not has_usual_levels(found):
        return levels
    return replace(levels, aligned=ALIGNED_XL if found.kind.startswith("sdxl") else ALIGNED)


def has_usual_levels(found: Checkpoint) -> bool:
    """Whether they are those of Stable Diffusion, zero terminal SNR apart."""
    said = _said(found)
    return said.get("trained_betas") is None and all(said[name] == usual for name, usual in BETAS.items())


def _said(found: Checkpoint) -> Mapping[str, Any]:
    return {**BETAS, **found.configs.get("scheduler", {})}
