"""What every recipe says of optimisation, and how its numbers are checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sfumato.errors import InputError


@dataclass(frozen=True)
class TrainRecipe:
    """How weights are fitted. One step sees `batch` pictures in parts of `microbatch`, whose gradients add up."""

    steps: int = 10_000
    batch: int = 128
    microbatch: int = (
        0  # pictures per pass; 0 for the whole batch. Chance is drawn per part, so it is part of the recipe
    )
    optimizer: str = "adamw"  # adamw, or for a denoiser muon: its hidden matrices (and adamw for the rest)
    lr: float = 3e-4  # AdamW's peak rate
    muon_lr: float = 2e-3  # Muon's peak rate, in AdamW's scale (rms-matched)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 200  # steps of linear rise
    decay: float = 0.3  # last share of the steps, over which the rate falls linearly to zero
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights per step; the average is what is kept
    precision: str = "auto"  # auto, float32 or bfloat16 (autocast; the weights themselves stay float32)
    compile: bool = False  # torch.compile the network
    save_every: int = 500  # steps between checkpoints
    sheet_every: int = 1_000  # steps between sample sheets and exports of the averaged model
    crop: int = 0  # side in pixels of random crops; 0 for whole pictures (autoencoder only)

    @property
    def parts(self) -> int:
        """Microbatches in a step."""
        return self.batch // (self.microbatch or self.batch)


RANGES = {  # of the numbers in a TrainRecipe
    "steps": (0, math.inf),
    "batch": (1, math.inf),
    "microbatch": (0, math.inf),
    "lr": (0, math.inf),
    "muon_lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup": (0, math.inf),
    "decay": (0, 1),
    "ema": (0, 1),
    "save_every": (1, math.inf),
    "sheet_every": (1, math.inf),
    "crop": (0, math.inf),
}


def check_train(where: str, train: TrainRecipe) -> None:
    """`InputError` for numbers out of their range, and for parts that do not add up."""
    within(where, train, RANGES)
    above_zero(f"{where}.clip", train.clip)
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise InputError(
            f"{where}.betas must be two numbers from 0 to below 1, not {list(train.betas)}",
            argument=f"{where}.betas",
        )
    if train.microbatch and train.batch % train.microbatch:
        raise InputError(
            f"{where}.batch ({train.batch}) must be a multiple of microbatch ({train.microbatch})",
            argument=f"{where}.microbatch",
        )
    one_of(f"{where}.optimizer", train.optimizer, ("adamw", "muon"))
    one_of(f"{where}.precision", train.precision, ("auto", "float32", "bfloat16"))


def within(where: str, table: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """`InputError` for the first of `ranges` that a number of the table is outside of."""
    for name, (low, high) in ranges.items():
        value = getattr(table, name)
        if not low <= value <= high:
            raise InputError(
                f"{where}.{name} must be {shown(low, high)}, not {value}", argument=f"{where}.{name}"
            )


def above_zero(name: str, value: float) -> None:
    if value <= 0:
        raise InputError(f"{name} must be above 0, not {value}", argument=name)


def shown(low: float, high: float) -> str:
    return f"at least {low}" if math.isinf(high) else f"from {low} to {high}"


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} must be {' or '.join(known)}, not {value!r}", argument=name)
