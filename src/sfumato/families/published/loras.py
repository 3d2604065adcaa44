"""LoRAs into published checkpoints, and out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters.lora import name_of
from sfumato.adapters.merge import merged
from sfumato.adapters.names import WEIGHT
from sfumato.adapters.svd import Kept, check_rank, low_rank
from sfumato.adapters.write import check_target, kohya
from sfumato.checkpoint.header import UNUSABLE
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.rules import info
from sfumato.checkpoint.writer import write_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.families.lora import TITLES, mark_of
from sfumato.families.published.adapters import adapters_of, kohya_map, kohya_prefix
from sfumato.families.published.checkpoint import Checkpoint, Families, open_checkpoint

UNREACHED = (  # tables, which no LoRA changes
    "token_embedding",
    "position_embedding",
    "relative_attention_bias",
    "shared.",
)
LEAST = 1e-6  # of ‖W‖: what rounding alone may leave of a layer that was not trained


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
    family = checkpoint.family
    if family is None or not checkpoint.draws:
        raise InputError(
            f"{source} is of {checkpoint.kind}, without a network that draws; a LoRA is merged into a model with one",
            argument="merge",
        )
    adapters = adapters_of(family, checkpoint.kind, checkpoint.system, checkpoint.parts, lambda touched: None)
    reports, notes = [], []
    for number, (file, weight, blocks) in enumerate(loras, 1):
        name = name_of(file)
        if name in adapters.opened:
            name += f" {number}"
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
    families: Families,
    *,
    dtype: torch.dtype | None = torch.float16,
    on_module: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """Write a LoRA, under kohya's names, that makes `base` nearly `tuned`: of each change the nearest of `rank`.

    Layers that did not change are left out. `CheckpointError` when the two are of different kinds, or are equal.
    """
    check_rank(rank)
    place = check_target(target)
    first, second = (open_checkpoint(path, families) for path in (base, tuned))
    if first.kind != second.kind or not first.draws:
        raise CheckpointError(
            f"{base} is of {first.kind} and {tuned} of {second.kind}; two models of one kind are right"
        )
    pairs = list(_pairs(first, second))
    tensors: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    kept = whole = 0.0
    for number, (part, key, name, olds, news) in enumerate(pairs, 1):
        on_module(number, len(pairs))
        if info(olds, name)[1] != info(news, name)[1]:
            raise CheckpointError(f"{part} {name} has another shape in {tuned}")
        old, new = (found[name].to(torch.float32) for found in (olds, news))
        if not (finite(old) and finite(new)):
            raise CheckpointError(f"{part} {name} {UNUSABLE}")
        change = new - old
        size = float(change.double().square().sum())
        if size <= (LEAST * float(old.norm())) ** 2:
            continue
        whole += size
        if change.ndim < 2 or not name.endswith(WEIGHT) or any(mark in name for mark in UNREACHED):
            left[f"{part}.{name}"] = "a norm, a bias or a table"
            continue
        delta, share = low_rank(change, rank)
        kept += share
        tensors |= kohya(key, delta.up, delta.down, delta.rank)
    if not tensors:
        raise CheckpointError(f"{tuned} differs from {base} in no layer that a LoRA changes")
    notes = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.title": f"{TITLES[mark_of(first.kind)]} LoRA extracted by rank {rank}",
    }
    written = write_tensors(place, tensors, dtype=dtype, metadata=notes)
    return Kept(len(tensors) // 3, min(kept / whole, 1.0), left, written)


def _pairs(
    first: Checkpoint, second: Checkpoint
) -> Iterator[tuple[str, str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Of every tensor that may differ: part, kohya's name of its module, its own, and the tensors of both models."""
    family = first.family
    assert family is not None
    for part in (family.denoiser, *(text.name for text in first.system.text)):
        if part not in first.parts or part not in second.parts:
            continue
        prefix = kohya_prefix(family, first.system, part)
        table = kohya_map(family, first.kind, first.system, part)
        both: tuple[Mapping[str, Any], ...] = (first.parts[part], second.parts[part])
        if table is not None:
            both = tuple(table.to_theirs(tensors) for tensors in both)
        for name in both[0]:
            yield part, prefix + name.removesuffix(WEIGHT).replace(".", "_"), name, *both
