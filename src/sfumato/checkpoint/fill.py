"""Tensors into a module, strictly: every one there, of its shape, made of numbers, and no other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from sfumato.checkpoint.header import shown
from sfumato.errors import CheckpointError

SHOWN = 10  # names that an error lists


@dataclass(frozen=True)
class LoadReport:
    """How the names of a file meet those of a module, each in alphabetical order."""

    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected)

    def require(self, where: str) -> None:
        """`CheckpointError`, with the first ten names of each kind, unless the names are the same."""
        if not self.complete:
            parts = [
                f"{len(names)} {word} ({', '.join(shown(name) for name in names[:SHOWN])})"
                for word, names in (("missing", self.missing), ("unexpected", self.unexpected))
                if names
            ]
            raise CheckpointError(f"{where}: tensors {' and '.join(parts)}")


def compare(expected: Iterable[str], found: Iterable[str]) -> LoadReport:
    """Names that are wanted against names that are there."""
    wanted, there = set(expected), set(found)
    return LoadReport(*(tuple(sorted(names)) for names in (wanted & there, wanted - there, there - wanted)))


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Make `tensors` the parameters and buffers of a module, best of one built on the meta device.

    The tensors themselves become the module's, without a copy, where they are of the type and on the device asked for:
    mapped weights stay the file's pages. dtype: of floating-point tensors; None keeps what they have. device: None
    keeps it. Tensors are asked for one by one, each once, so a lazy mapping holds one at a time.

    `CheckpointError`, which names `where` and the first ten tensors, when some are missing or unexpected, of a wrong
    shape, not floating-point where the module's are (or the reverse), or hold NaN or infinity, there or in `dtype`.
    `ValueError` when the module has tensors outside its state that still lie on the meta device.
    """
    state = module.state_dict()
    report = compare(state, tensors)
    report.require(where)
    ready: dict[str, Tensor] = {}
    problems: list[str] = []
    for name in tensors:
        tensor = tensors[name]
        problem = _misfit(tensor, state[name])
        if problem is None and tensor.is_floating_point() and len(problems) < SHOWN:
            cast = tensor.to(device=device, dtype=dtype).contiguous()
            if not finite(cast):
                problem = _not_numbers(tensor, cast)
            ready[name] = cast
        elif problem is None:
            ready[name] = tensor.to(device=device).contiguous()
        del tensor  # before the next: a mapped one holds a window of its file
        if problem is not None:
            problems.append(f"{shown(name)} {problem}")
            ready.clear()
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:SHOWN])}{more}")
    module.load_state_dict(ready, assign=True)
    empty = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(
            f"{where}: {', '.join(empty[:SHOWN])} stand in no file; make them outside the meta device"
        )
    return report


def finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity. Nothing of its size is allocated."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # eight-bit floats have no arithmetic
        return all(finite(chunk.float()) for chunk in tensor.reshape(-1).split(2**22))
    if math.isfinite(tensor.sum()):  # adding is faster than comparing, and NaN and infinity never leave a sum
        return True
    low, high = torch.aminmax(tensor)  # NaN wins over every number
    return math.isfinite(low) and math.isfinite(high)


def _misfit(tensor: Tensor, expected: Tensor) -> str | None:
    if tensor.shape != expected.shape:
        return f"has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
    if tensor.is_floating_point() != expected.is_floating_point():
        wanted = "floating-point numbers" if expected.is_floating_point() else str(expected.dtype)
        return f"holds {tensor.dtype}, expected {wanted}"
    return None


def _not_numbers(tensor: Tensor, cast: Tensor) -> str:
    if finite(tensor):
        return f"holds numbers beyond the range of {cast.dtype}; load it in bfloat16 or float32"
    return "holds NaN or infinite values; the file is unusable"
