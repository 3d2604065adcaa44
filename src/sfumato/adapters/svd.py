"""LoRAs made of differences, and LoRAs of fewer ranks, by the singular values that matter most.

The best approximation of a matrix by one of rank r, in the sum of squares, keeps its r largest singular values (Eckart
and Young 1936). What they hold of the whole is told as the share of the sum of squares.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.config import adapter_file, peft_config
from sfumato.adapters.delta import Decomposed, Delta, LowRank
from sfumato.adapters.lora import check_numbers, delta_of, listed
from sfumato.adapters.roles import KOHYA, Spelled, group, refused
from sfumato.adapters.write import check_target, kohya
from sfumato.checkpoint.header import shown
from sfumato.checkpoint.source import open_weights
from sfumato.checkpoint.writer import write_tensors
from sfumato.errors import CheckpointError, InputError

EXACT = 512  # the shorter side up to which all singular values are worked out
MAX_RANK = 4096
PREFIX = re.compile(
    r"^(base_model\.model\.)?((lora|lycoris)_)?(unet|transformer)[._]|^diffusion_model\.|^lycoris_"
)


@dataclass(frozen=True)
class Kept:
    """What a smaller adapter holds. modules: how many it changes. share: of the sum of squares of all changes.

    left: changes that no LoRA can hold, and the reason. size: bytes of its tensors.
    """

    modules: int
    share: float
    left: Mapping[str, str]
    size: int


def check_rank(rank: int) -> None:
    """`InputError` unless it is a rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank must be a whole number from 1 to {MAX_RANK}, not {rank!r}", argument="rank")


def low_rank(change: Tensor, rank: int) -> tuple[LowRank, float]:
    """(the nearest of at most that rank, ‖it‖²) to ΔW (O, I, …) in float32, with equal shares in `up` and `down`.

    Of large matrices by random projections with power iterations (Halko et al. 2011, alg. 4.4), always the same ones.
    """
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    short = min(matrix.shape)
    if short <= max(EXACT, 4 * rank):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(short, 2 * rank + 8), niter=4)
    return _parts(u[:, :rank], s[:rank], v[:, :rank], tuple(change.shape))


def smaller(delta: LowRank, rank: int) -> tuple[LowRank, float]:
    """`low_rank` of a product, without the product: by QR of both factors."""
    up, down = delta.up.flatten(1).double(), delta.down.flatten(1).double() * delta.scale
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return low_rank(delta.full(delta.shape), rank)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    kept = min(rank, len(s))
    return _parts(q_up @ u[:, :kept], s[:kept], q_down @ vh[:kept].T, delta.shape)


def _parts(u: Tensor, s: Tensor, v: Tensor, shape: tuple[int, ...]) -> tuple[LowRank, float]:
    root = s.sqrt()
    up = (u * root).float().reshape(shape[0], len(s), *[1] * (len(shape) - 2))
    down = (v * root).T.float().reshape(len(s), *shape[1:])
    return LowRank(up, down), float(s.double().square().sum())


def resize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int,
    *,
    dtype: torch.dtype | None = None,
    on_module: Callable[[int, int], None] = lambda done, total: None,
) -> Kept:
    """Write the adapter `source` with at most `rank` ranks in each module, under the names it has.

    Other forms than a product become one, under kohya's endings. Alpha is multiplied in: the scale of what is written
    is 1. Whole differences and biases stay. dtype: of what is written, the source's by default.
    """
    check_rank(rank)
    written = check_target(target)
    file = adapter_file(source)
    weights = open_weights(file)
    config = peft_config(file, weights.metadata)
    modules, unknown, again = group(weights)
    if again:
        raise CheckpointError(f"{file} gives the same part of a module twice: {shown(again[0])}")
    if unknown or not modules:
        first = (unknown or ["nothing"])[0]
        kind = refused(first)
        raise CheckpointError(
            f"{file} is no LoRA that is read here: {shown(first)} {f'is of {kind}' if kind else 'is no part of one'}"
        )
    if unused := config.unused(modules):
        raise CheckpointError(f"{file}: {listed(unused)}")
    _check_apart(file, modules)
    tensors: dict[str, Tensor] = {}
    kept = whole = 0.0
    most = 0
    for number, spelled in enumerate(modules.values(), 1):
        found = {role: weights[key] for role, key in spelled.tensors.items()}
        check_numbers(file, spelled, weights)
        try:
            kernel, bias = delta_of(found, *config.scaling(spelled.module))
        except ValueError as error:
            raise CheckpointError(f"{file}: {shown(spelled.module)}: {error}") from None
        tensors |= {
            spelled.tensors[r]: found[r] for r in ("diff", "diff_b", "dora_scale", "magnitude") if r in found
        }
        if kernel is not None and "diff" not in found:
            new, size, before = _resized(kernel, rank)
            kept, whole, most = kept + size, whole + before, max(most, new.rank)
            tensors |= _named(spelled, new)
        if bias is not None and "up_bias" in found:
            tensors[spelled.tensors["up_bias"]] = bias.full(bias.shape)
        on_module(number, len(modules))
    types = [weights.info(name)[0] for name in weights if weights.info(name)[0].is_floating_point]
    kind = max(set(types), key=types.count) if dtype is None else dtype
    notes = {
        key: text
        for key, text in weights.metadata.items()
        if "hash" not in key and key != "lora_adapter_metadata"
    }
    notes |= {"ss_network_dim": str(most), "ss_network_alpha": str(most)} if "ss_network_dim" in notes else {}
    size = write_tensors(written, tensors, dtype=kind, metadata=notes)
    return Kept(len(modules), kept / whole if whole else 1.0, {}, size)


def _check_apart(file: Path, modules: Mapping[str, Spelled]) -> None:
    """`CheckpointError` for a module that is changed twice, under a name with dots and under one with underscores."""
    seen: dict[str, str] = {}
    for module in modules:
        plain = PREFIX.sub("", module).replace(".", "_")
        if (other := seen.setdefault(plain, module)) != module:
            raise CheckpointError(
                f"{file} changes one module twice, as {shown(other)} and as {shown(module)}: two formats in one file; "
                "keep one of them"
            )


def _resized(kernel: Delta, rank: int) -> tuple[LowRank, float, float]:
    """(the smaller one, its ‖ΔW‖², that of the whole)."""
    inner = kernel.inner if isinstance(kernel, Decomposed) else kernel
    if isinstance(inner, LowRank) and inner.mid is None:
        new, size = smaller(inner, rank)
        return new, size, inner.norm() ** 2
    full = inner.full(inner.shape)
    new, size = low_rank(full, rank)
    return new, size, float(full.double().square().sum())


def _named(spelled: Spelled, new: LowRank) -> dict[str, Tensor]:
    """Under the module's own names where it was a product, else under kohya's; there with an alpha."""
    names = kohya(spelled.module, new.up, new.down, new.rank)
    if "up" not in spelled.tensors:
        return names
    named = {spelled.tensors["up"]: new.up, spelled.tensors["down"]: new.down}
    if KOHYA in spelled.formats or "alpha" in spelled.tensors:
        alpha = spelled.tensors.get("alpha", f"{spelled.module}.alpha")
        named[alpha] = names[f"{spelled.module}.alpha"]
    return named
