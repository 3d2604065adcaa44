"""LoRAs beside the models they are for, with no model in memory: what a file changes, and one taken from two models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato.adapters.lora import Report
from sfumato.adapters.svd import Kept
from sfumato.errors import InputError
from sfumato.families import checkpoint_families, open_model
from sfumato.families.published import loras


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int,
    *,
    dtype: torch.dtype | None = torch.float16,
    on_module: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """See `published.loras.extract`; of models of any family."""
    return loras.extract(base, tuned, target, rank, checkpoint_families(), dtype=dtype, on_module=on_module)


def strengths(lora: str | os.PathLike[str], model: str | Path) -> tuple[Report, dict[str, float]]:
    """(the report on the file, ‖ΔW‖/‖W‖ of each part at weight 1) on a model, of which only what changes is read.

    What has no place in the model is left and reported. Errors of `read_lora`, where nothing of the file has one.
    """
    system = open_model(model, torch.device("cpu"), torch.float32, {"offload": "auto"})
    adapters = system.adapters
    if adapters is None:
        raise InputError(f"{str(model)!r} takes no LoRAs", argument="model")
    report = adapters.attach(lora, 0.0, name="it", partial=True)
    return report, adapters.opened["it"].relative(adapters.base)
