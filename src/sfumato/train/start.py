"""A recipe's training begun: its processes joined, and the job that is meant chosen by its tables."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sfumato.errors import InputError
from sfumato.runtime import pick_device
from sfumato.train.control import ControlJob
from sfumato.train.job import Job, with_data
from sfumato.train.loop import OnEvent
from sfumato.train.lora import LoraJob
from sfumato.train.recipe import Recipe, read_recipe
from sfumato.train.stages import ModelJob
from sfumato.train.video import VideoJob

BESIDE: tuple[tuple[str, type[Job]], ...] = (("lora", LoraJob), ("control", ControlJob), ("video", VideoJob))
PATIENCE = 48  # hours that processes wait for the one that renders and encodes


def run(
    recipe: str | Path | Recipe,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    device: str | None = None,
    on_event: OnEvent | None = None,
) -> Path:
    """Train what `recipe` describes, or go on from where it stopped; return the run's folder, which `load` opens, or
    the file of a LoRA or ControlNet.

    overrides: dotted keys of a recipe file, such as {"denoiser.train.steps": 100}.
    Under `torchrun` every process calls this; they share each batch, and rank 0 alone writes. Raises `InputError`
    for a bad recipe or a run folder of another recipe, `DataError` for unusable data.
    """
    if isinstance(recipe, Recipe) and overrides:
        raise InputError("overrides change a recipe file; give a Recipe as it shall be", argument="overrides")
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    read = with_data(read, data)
    folder = Path(out or read.out or Path("runs") / read.name)
    place, joined = _join_world(pick_device(device))
    kind: type[Job] = next((job for table, job in BESIDE if getattr(read, table)), ModelJob)
    try:
        return kind(read, folder, place, on_event or (lambda event: None)).whole()
    finally:
        if joined:
            dist.destroy_process_group()


def _join_world(device: torch.device) -> tuple[torch.device, bool]:
    """Join torchrun's processes, if this is one of them: the device of this one, and whether it has joined here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device, False
    cuda = device.type == "cuda"
    if cuda:  # numbered: a thread that makes batches would take the first GPU for the current one
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=PATIENCE))
    return device, True
