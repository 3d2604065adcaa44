"""Tensors into a module, strictly: every one there, of its shape, made of numbers, and no other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoint.header import shown
from sfumato.errors import CheckpointError
from sfumato.nn.mmdit import PatchEmbed
from sfumato.nn.packed import layers, packed

ALWAYS_KEPT = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    PatchEmbed,
)  # never streamed: small, or a table to look up
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
        tensor, problem = _fitting(tensors[name], state[name], dtype, device)
        ready[name] = tensor
        del tensor  # before the next: a mapped one holds a window of its file
        if problem is not None:
            problems.append(f"{shown(name)} {problem}")
        if problems:
            ready.clear()
    _refuse(problems, where)
    module.load_state_dict(ready, assign=True)
    _require_all(module, where)
    return report


def fill_layers(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    pack: bool = False,
    stream: bool = False,
    twin: Callable[[nn.Module], nn.Module | None] | None = None,
) -> LoadReport:
    """`fill`, one layer after the other, so that beside the network no more than a layer and a window are in memory.

    Weights are copied to memory of their own, those of convolutions channels-last. pack: replace each layer by its
    packed twin (`nn/packed.py`) where it has one. stream: check products and convolutions and keep none: their weights
    are read from the file again whenever the layer is called. It then computes the same, to the bit. twin: makes what
    to keep of a layer in its place, or None to keep the layer; not together with the other two.
    """
    if twin is not None and (pack or stream):
        raise ValueError("a layer has one twin: leave out pack and stream")
    replaced = packed if pack else twin
    state = network.state_dict()
    report = compare(state, tensors)
    report.require(where)
    problems: list[str] = []
    for path, parent, name in list(layers(network)):
        layer = getattr(parent, name)
        ready: dict[str, Tensor] = {}
        for inner, expected in layer.state_dict().items():
            ready[inner], problem = _fitting(tensors[f"{path}.{inner}"], expected, dtype, device, own=True)
            if problem is not None:
                problems.append(f"{shown(f'{path}.{inner}')} {problem}")
        if problems or not ready:
            continue
        if stream and not isinstance(layer, ALWAYS_KEPT):
            setattr(parent, name, Streamed(layer, tensors, path, where, dtype, device, pack))
            continue
        layer.load_state_dict(ready, assign=True)
        del ready  # or the weights would stand beside the packed ones
        if replaced is not None and (other := replaced(layer)) is not None:
            setattr(parent, name, other)
    _refuse(problems, where)
    _require_all(network, where)
    return report


class Streamed(nn.Module):
    """A layer that reads its weights when it is called, and lets them go when it has answered. Threads may share it."""

    def __init__(
        self,
        layer: nn.Module,
        tensors: Mapping[str, Tensor],
        path: str,
        where: str,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        pack: bool,
    ):
        super().__init__()
        self._empty = (layer,)  # on the meta device; in a tuple, so that it is no part of the network
        self._tensors, self._path, self._where = tensors, path, where
        self._form, self._pack = (dtype, device), pack

    def read(self) -> nn.Module:
        """The layer in memory. `CheckpointError` if the file has changed to what is no weight."""
        layer = _twin_of(self._empty[0])
        ready: dict[str, Tensor] = {}
        for name, expected in layer.state_dict().items():
            ready[name], problem = _fitting(
                self._tensors[f"{self._path}.{name}"], expected, *self._form, own=True
            )
            _refuse([f"{shown(f'{self._path}.{name}')} {problem}"] if problem else [], self._where)
        layer.load_state_dict(ready, assign=True)
        del ready
        layer.eval().requires_grad_(False)
        return (packed(layer) if self._pack else None) or layer

    def forward(self, *inputs: Any) -> Tensor:
        return self.read()(*inputs)


def _twin_of(layer: nn.Module) -> nn.Module:
    """The same layer, whose parameters can be replaced without touching the first one's."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    twin._modules = {name: module and _twin_of(module) for name, module in layer._modules.items()}
    return twin


def _fitting(
    tensor: Tensor,
    expected: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    own: bool = False,
) -> tuple[Tensor, str | None]:
    """The tensor as the module takes it, and what is wrong with it. own: in memory of its own, a kernel channels-last;
    else the very tensor where it is of the type and on the device asked for.
    """
    problem = _misfit(tensor, expected)
    if problem is not None:
        return tensor, problem
    floating = tensor.is_floating_point()
    order = torch.channels_last if own and tensor.ndim == 4 else torch.contiguous_format
    cast = tensor.to(device, dtype if floating else None, copy=own, memory_format=order)
    cast = cast.contiguous(memory_format=order)
    if floating and not finite(cast):
        problem = _not_numbers(tensor, cast)
    return cast, problem


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:SHOWN])}{more}")


def _require_all(module: nn.Module, where: str) -> None:
    empty = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(
            f"{where}: {', '.join(empty[:SHOWN])} stand in no file; make them outside the meta device"
        )


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
