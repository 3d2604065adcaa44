"""An adapter's file, read strictly: every tensor has its place in the model, or an error names those that have none."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.config import PeftConfig, adapter_file, peft_config
from sfumato.adapters.delta import (
    Decomposed,
    Delta,
    Difference,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    change_of,
    rows_of,
)
from sfumato.adapters.names import BIAS, WEIGHT, Names, Target
from sfumato.adapters.roles import BUNDLED, Spelled, group, refused
from sfumato.checkpoint.header import UNUSABLE, shown
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.source import Weights, open_weights
from sfumato.errors import CheckpointError
from sfumato.storage import data_hash

SHOWN = 5  # names that an error lists
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # part → tensor → shape


@dataclass(frozen=True)
class Report:
    """How a file met a model. matched: its tensors that are used. left: those, and patterns, that are not, and why.

    modules: of each part, how many of its tensors change. ranks: the least and the greatest, where there are any.
    formats: in whose form the file is, such as "kohya" or "LoHa".
    """

    matched: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[int, int] | None = None
    formats: tuple[str, ...] = ()

    def describe(self) -> str:
        """In one line."""
        rank = ""
        if self.ranks is not None:
            low, high = self.ranks
            rank = f", rank {low}" if low == high else f", ranks {low} to {high}"
        parts = ", ".join(f"{count} of {part}" for part, count in self.modules.items())
        left = f"; {len(self.left)} left out: {listed(self.left)}" if self.left else ""
        return f"{' and '.join(self.formats) or 'adapter'}{rank}: {parts}{left}"


@dataclass(frozen=True, eq=False)
class Lora:
    """An opened adapter. name: what requests call it. digest: SHA-256 of its numbers, without notes in the header.

    deltas: part → name of a tensor of ours → what is added to it at weight 1.
    """

    name: str
    path: Path
    digest: str
    deltas: Mapping[str, Mapping[str, Delta]]
    report: Report
    metadata: Mapping[str, str] = field(default_factory=dict)
    size: int = 0  # bytes of the file

    def relative(self, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """‖ΔW‖ / ‖W‖ over the tensors that change, for each part, at weight 1. Reads these tensors of the base."""
        found = {}
        for part, deltas in self.deltas.items():
            change = base = 0.0
            for name, delta in deltas.items():
                tensor = parts[part][name].to(torch.float32)
                size = delta.norm() if isinstance(delta, LowRank) else float(change_of(delta, tensor).norm())
                change += size**2
                base += float(tensor.norm()) ** 2
            found[part] = math.sqrt(change / base) if base else math.inf
        return found


def listed(reasons: Mapping[str, str]) -> str:
    """The first few names with their reasons, one for those in a row that share it, and how many more there are."""
    names = list(reasons)
    told = []
    for reason, those in groupby(names[:SHOWN], key=reasons.__getitem__):
        told.append(f"{', '.join(map(shown, those))} ({reason})")
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(told) + more


def read_lora(
    path: str | os.PathLike[str],
    names: Names,
    shapes: Shapes,
    *,
    name: str | None = None,
    partial: bool = False,
) -> Lora:
    """The adapter in a .safetensors file, or in a folder as PEFT and diffusers write one, for a model.

    names: the family's. shapes: of the model's tensors. name: what it is called; None is the file's own name.
    partial: leave what has no place in the model, instead of refusing the file; the report says what.

    `CheckpointError` when the file is damaged; when a tensor has no place, another shape, or no numbers; when something
    is given twice; when nothing of it has a place.
    """
    file = adapter_file(path)
    weights = open_weights(file)
    config = peft_config(file, weights.metadata)
    modules, unknown, again = group(weights)
    if again:
        raise CheckpointError(
            f"{file} gives the same part of a module twice: {', '.join(map(shown, again[:SHOWN]))}"
        )
    unused = config.unused(modules)
    if unused and not partial:
        raise CheckpointError(f"{file}: {listed(unused)}; take the rest with `partial`")
    left = {key: _foreign(key) for key in unknown}
    deltas: dict[str, dict[str, Delta]] = {}
    sources: dict[tuple[str, str], str] = {}
    matched: list[str] = []
    formats: dict[str, None] = {}
    for spelled in modules.values():
        targets = names.spelled.get(spelled.module)
        if targets is None:
            left |= dict.fromkeys(spelled.tensors.values(), f"no module of {names.family}")
            continue
        check_numbers(file, spelled, weights)
        try:
            changes = list(_changes(spelled, targets, weights, config, shapes))
        except ValueError as error:
            left |= dict.fromkeys(spelled.tensors.values(), str(error))
            continue
        for part, tensor, delta in changes:
            if (part, tensor) in sources:
                raise CheckpointError(
                    f"{file} changes {part} {tensor} twice, as {shown(sources[part, tensor])} and as "
                    f"{shown(spelled.module)}: two formats in one file; keep one of them"
                )
            sources[part, tensor] = spelled.module
            deltas.setdefault(part, {})[tensor] = delta
        matched += spelled.tensors.values()
        formats |= dict.fromkeys(sorted(spelled.formats))
    if not matched:
        raise CheckpointError(
            f"{file} has nothing for this {names.family} model; of its {len(weights)} tensors the first are "
            f"{listed(left) or 'none'}"
        )
    if left and not partial:
        raise CheckpointError(
            f"{file}: {len(left)} of {len(weights)} tensors have no place in this {names.family} model: "
            f"{listed(left)}; take the rest with `partial`"
        )
    ranks = [delta.rank for own in deltas.values() for delta in own.values() if delta.rank]
    report = Report(
        tuple(matched),
        left | unused,
        {part: len(own) for part, own in deltas.items()},
        (min(ranks), max(ranks)) if ranks else None,
        tuple(formats),
    )
    size = file.stat().st_size
    return Lora(name or name_of(path), file, data_hash(file), deltas, report, weights.metadata, size)


def _foreign(key: str) -> str:
    """Why a tensor is not used."""
    if key.startswith(BUNDLED):
        return "a textual inversion, which is given as a file of its own by `embeddings`"
    return f"{kind} is not read here" if (kind := refused(key)) else "no part of a LoRA"


def check_numbers(file: Path, spelled: Spelled, weights: Weights) -> None:
    """`CheckpointError` for a module with NaN or infinite values, or with whole numbers where weights are right."""
    for role, key in spelled.tensors.items():
        dtype = weights.info(key)[0]
        if dtype.is_floating_point and not finite(weights[key]):
            raise CheckpointError(f"{file}: {shown(key)} {UNUSABLE}")
        if not dtype.is_floating_point and role not in ("alpha", "scalar"):
            raise CheckpointError(
                f"{file}: {shown(key)} is of {str(dtype).removeprefix('torch.')}; floating-point numbers are right"
            )


def name_of(path: str | os.PathLike[str]) -> str:
    """What a file or folder is called when nobody says otherwise: its name without the ending."""
    path = Path(path)
    return path.name if path.is_dir() else path.stem


def _changes(
    spelled: Spelled,
    targets: Sequence[Target],
    weights: Weights,
    config: PeftConfig,
    shapes: Shapes,
) -> Iterator[tuple[str, str, Delta]]:
    """(part, tensor of ours, change) of one module. `ValueError` with the reason where it does not fit."""
    found = {role: weights[key] for role, key in spelled.tensors.items()}
    kernel, bias = delta_of(found, *config.scaling(spelled.module))
    if kernel is None and bias is None:
        raise ValueError("a number without what it scales")
    for delta, ending in ((kernel, WEIGHT), (bias, BIAS)):
        if delta is None:
            continue
        for part, share in ((target.part, target.share) for target in targets):
            if part not in shapes:
                raise ValueError(f"there is no {part} here")
            tensor = share.module + ending
            wanted = shapes[part].get(tensor)
            if wanted is None:
                raise ValueError(f"{share.module} has no {ending[1:]}")
            placed = rows_of(delta, share.rows, share.of)
            _check_fit(placed, wanted)
            yield part, tensor, placed


def _check_fit(delta: Delta, wanted: tuple[int, ...]) -> None:
    """`ValueError` unless ΔW is of that shape, or is it but for kernels of 1×1 and kernels written as rows."""
    shape = delta.shape
    fits = math.prod(shape) == math.prod(wanted) and (not shape or not wanted or shape[0] == wanted[0])
    if fits and len(shape) == len(wanted):
        fits = shape == wanted
    if not fits:
        raise ValueError(f"shape {shape} for a {wanted} of the model")


def delta_of(
    found: Mapping[str, Tensor], alpha: float | None = None, rank_stabilised: bool = False
) -> tuple[Delta | None, Delta | None]:
    """What the roles of one module (`roles.ENDINGS`) add to its weight and to its bias.

    alpha: where no tensor `alpha` says it; None is the rank, which makes the scale 1. rank_stabilised: the scale is
    alpha/√rank. `ValueError` where a part is missing, two kinds are mixed, or shapes disagree.
    """
    kinds = {
        "LoRA": {"up", "down", "mid", "up_bias"} & found.keys(),
        "LoHa": {role for role in found if role.startswith("hada_")},
        "LoKr": {role for role in found if role.startswith("lokr_")},
        "a whole difference": {"diff"} & found.keys(),
    }
    present = [kind for kind, roles in kinds.items() if roles]
    if len(present) > 1:
        raise ValueError(f"{' and '.join(present)} in one module")
    if "alpha" in found:
        alpha = _number(found["alpha"], "alpha")
    factor = _number(found["scalar"], "scalar") if "scalar" in found else 1.0

    def scale(rank: int | None) -> float:
        if alpha is None or rank is None:
            return factor
        return factor * alpha / (math.sqrt(rank) if rank_stabilised else rank)

    kernel: Delta | None = None
    kind = present[0] if present else ""
    if kind == "LoRA":
        kernel = _low_rank(found, scale)
    elif kind == "LoHa":
        first, second = (
            _factor(found, "", f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}", "LoHa") for n in (1, 2)
        )
        if first.shape != second.shape:
            raise ValueError(f"its two factors are {first.shape} and {second.shape}")
        kernel = Hadamard(first, second, scale(first.rank))
    elif kind == "LoKr":
        one, two = (
            _factor(found, f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}", "LoKr") for n in (1, 2)
        )
        kernel = Kronecker(one, two, scale(two.rank or one.rank))
    elif kind:
        kernel = Difference(found["diff"], factor)
    bias: Delta | None = Difference(found["diff_b"], factor) if "diff_b" in found else None
    if "up_bias" in found:
        bias = Difference(found["up_bias"], scale(found["down"].shape[0]))
    for role in {"dora_scale", "magnitude"} & found.keys():
        if kernel is None:
            raise ValueError("DoRA's magnitude without a LoRA")
        kernel = _decomposed(kernel, found[role], peft=role == "magnitude")
    return kernel, bias


def _low_rank(found: Mapping[str, Tensor], scale: object) -> LowRank:
    if "up" not in found or "down" not in found:
        raise ValueError(f"a LoRA without its {'down' if 'up' in found else 'up'}")
    up, down, mid = found["up"], found["down"], found.get("mid")
    if min(up.ndim, down.ndim) < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
        raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} do not go together")
    if mid is not None and (
        mid.ndim != 4 or mid.shape[:2] != (up.shape[1], down.shape[0]) or math.prod(down.shape[2:]) != 1
    ):
        raise ValueError(f"mid {tuple(mid.shape)} does not go between rank {down.shape[0]}")
    if not down.shape[0]:
        raise ValueError("rank 0")
    return LowRank(up, down, scale(down.shape[0]), mid)  # type: ignore[operator]


def _factor(found: Mapping[str, Tensor], whole: str, a: str, b: str, core: str, kind: str) -> Factor:
    if whole and whole in found:
        if a in found or b in found:
            raise ValueError(f"{whole} both whole and in parts")
        return Factor(found[whole])
    if a not in found or b not in found:
        raise ValueError(f"a {kind} without {a if a not in found else b}")
    one, two, middle = found[a], found[b], found.get(core)
    if one.ndim != 2 or two.ndim != 2 or not two.shape[0]:
        raise ValueError(f"{a} {tuple(one.shape)} and {b} {tuple(two.shape)} are no factors")
    inner = (one.shape[0] if middle is not None else one.shape[1], two.shape[0])
    if (middle is None and inner[0] != inner[1]) or (
        middle is not None and (middle.ndim != 4 or tuple(middle.shape[:2]) != inner)
    ):
        raise ValueError(f"{a} {tuple(one.shape)} and {b} {tuple(two.shape)} do not go together")
    return Factor(None, one, two, middle)


def _decomposed(kernel: Delta, magnitude: Tensor, peft: bool) -> Decomposed:
    """By the magnitude's shape: (O, 1, …) is of outputs, (1, I, …) of inputs; PEFT's are of outputs."""
    assert not isinstance(kernel, Decomposed)
    shape, count = tuple(magnitude.shape), magnitude.numel()
    outputs, inputs = kernel.shape[0], kernel.shape[1]
    ahead = shape[0] if shape else 0
    if not peft and len(shape) > 1 and ahead == 1 and count == shape[1] == inputs != 1:
        return Decomposed(kernel, magnitude, outputs=False)
    if count == outputs and (ahead == outputs or (len(shape) > 1 and shape[1] == outputs)):
        return Decomposed(kernel, magnitude, outputs=True)
    raise ValueError(f"DoRA's magnitude {shape} for a {kernel.shape}")


def _number(tensor: Tensor, what: str) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{what} of shape {tuple(tensor.shape)}, where one number is right")
    value = float(tensor.reshape(()))
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
    return value
