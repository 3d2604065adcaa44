"""LoRAs beside the models they are for, with no model in memory: what a file changes, and one taken from two models."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sfumato.errors import InputError
from sfumato.families.sd.loras import extract

__all__ = ["extract", "strengths"]


def strengths(
    lora: str | os.PathLike[str], model: str | Path, *, partial: bool = False
) -> tuple[str, dict[str, float]]:
    """(the report on the file, ‖ΔW‖/‖W‖ of each part at weight 1) on a model, of which only what changes is read."""
    from sfumato.families import open_model

    system = open_model(model, torch.device("cpu"), torch.float32, {"offload": "auto"})
    adapters = getattr(system, "adapters", None)
    if adapters is None:
        raise InputError(f"{str(model)!r} takes no LoRAs", argument="model")
    report = adapters.attach(lora, 0.0, name="it", partial=partial)
    return report.describe(), adapters.opened["it"].relative(adapters.base)
