"""How an adapter is written: where it may go, and kohya's names, which every tool reads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import InputError


def check_target(path: str | os.PathLike[str]) -> Path:
    """Where an adapter is to be written. `InputError` for another ending, and for a file that exists."""
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"the target {str(target)!r} must end in .safetensors", argument="output")
    if os.path.lexists(target):
        raise InputError(f"the target {str(target)!r} exists; give another name", argument="output")
    return target


def kohya(module: str, up: Tensor, down: Tensor, alpha: float) -> dict[str, Tensor]:
    """The tensors of a product alpha / rank · up·down as kohya names them (sd-scripts, networks/lora.py)."""
    return {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": torch.tensor(float(alpha)),
    }
