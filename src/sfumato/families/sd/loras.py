"""LoRAs into checkpoints of Stable Diffusion, and out of them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters.fold import Adapters, Touched
from sfumato.adapters.merge import merged
from sfumato.adapters.svd import Kept, check_rank, low_rank
from sfumato.adapters.write import check_target, kohya
from sfumato.checkpoint.fill import finite
from sfumato.checkpoint.rules import info
from sfumato.checkpoint.writer import write_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.families.lora import TITLES
from sfumato.families.sd.adapters import check, few_steps, names_of
from sfumato.families.sd.checkpoint import Checkpoint, open_checkpoint

KOHYA_PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
UNREACHED = ("token_embedding", "position_embedding")  # tables, which no LoRA changes
LEAST = 1e-6  # of ‖W‖: what rounding alone may leave of a layer that was not trained


def adapters_of(
    kind: str, system: Any, parts: Mapping[str, Mapping[str, Tensor]], renew: Callable[[Touched], None]
) -> Adapters:
    """The LoRAs for a model of one kind of `SYSTEMS` with these parts."""
    names = functools.cache(lambda: names_of(kind, system))
    return Adapters(names, parts, renew, lambda path: check(path, kind), few_steps)


def kohya_parts(system: Any) -> dict[str, str]:
    """Part to the prefix of its modules in kohya's files: a text encoder that is alone has no number."""
    alone = len(system.text) == 1 and system.text[0].name == "text_encoder"
    return KOHYA_PARTS | ({"text_encoder": "lora_te_"} if alone else {})


def with_loras(
    checkpoint: Checkpoint,
    source: str,
    loras: Sequence[tuple[str | os.PathLike[str], float, Mapping[str, float]]],
    *,
    partial: bool = False,
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with LoRAs (file, weight, blocks) in its weights, each tensor in the type it had; their reports.

    What was merged is noted in the metadata. `InputError` for a network that no LoRA changes.
    """
    if checkpoint.system is None or "unet" not in checkpoint.parts:
        raise InputError(
            f"{source} is of {checkpoint.kind}, without a U-Net; a LoRA is merged into a model with one",
            argument="merge",
        )
    adapters = adapters_of(checkpoint.kind, checkpoint.system, checkpoint.parts, lambda touched: None)
    reports, notes = [], []
    for number, (file, weight, blocks) in enumerate(loras):
        name = f"{number}"
        report = adapters.attach(file, weight, name=name, blocks=blocks, partial=partial)
        reports.append(f"{file}: {report.describe()}")
        lora = adapters.opened[name]
        notes.append(
            {"name": lora.path.stem, "sha256": lora.digest, "weight": weight}
            | ({"blocks": dict(blocks)} if blocks else {})
        )
    metadata = {**checkpoint.metadata, "sfumato.merged": json.dumps(notes)}
    return replace(checkpoint, parts=merged(adapters), metadata=metadata), reports  # type: ignore[arg-type]


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int,
    *,
    dtype: torch.dtype | None = torch.float16,
    on_module: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """Write a LoRA, under kohya's names, that makes `base` nearly `tuned`: of each change the nearest of `rank`.

    Layers that did not change are left out. `CheckpointError` when the two are of different kinds, or are equal.
    """
    check_rank(rank)
    place = check_target(target)
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    if first.system is None or first.kind != second.kind or "unet" not in first.parts:
        raise CheckpointError(
            f"{base} is of {first.kind} and {tuned} of {second.kind}; two models of one kind are right"
        )
    prefixes = kohya_parts(first.system)
    pairs = [
        (part, name)
        for part in prefixes
        if part in first.parts and part in second.parts
        for name in first.parts[part]
    ]
    tensors: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    kept = whole = 0.0
    for number, (part, name) in enumerate(pairs, 1):
        on_module(number, len(pairs))
        if info(first.parts[part], name)[1] != info(second.parts[part], name)[1]:
            raise CheckpointError(f"{part} {name} has another shape in {tuned}")
        old, new = (found.parts[part][name].to(torch.float32) for found in (first, second))
        if not (finite(old) and finite(new)):
            raise CheckpointError(f"{part} {name} holds NaN or infinite values; the file is unusable")
        change = new - old
        size = float(change.double().square().sum())
        if size <= (LEAST * float(old.norm())) ** 2:
            continue
        whole += size
        if change.ndim < 2 or any(mark in name for mark in UNREACHED):
            left[f"{part}.{name}"] = "a norm, a bias or a table"
            continue
        delta, share = low_rank(change, rank)
        kept += share
        key = prefixes[part] + name.removesuffix(".weight").replace(".", "_")
        tensors |= kohya(key, delta.up, delta.down, delta.rank)
    if not tensors:
        raise CheckpointError(f"{tuned} differs from {base} in no layer that a LoRA changes")
    notes = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.title": f"{TITLES.get(first.kind, first.kind)} LoRA extracted by rank {rank}",
    }
    written = write_tensors(place, tensors, dtype=dtype, metadata=notes)
    return Kept(len(tensors) // 3, min(kept / whole, 1.0), left, written)
