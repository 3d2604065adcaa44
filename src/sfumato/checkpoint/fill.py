"""Tensors into a module, strictly: every one there, of its shape, made of numbers, and no other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoint.cast import Room, cast
from sfumato.checkpoint.header import shown
from sfumato.checkpoint.report import SHOWN, Report, compare
from sfumato.errors import CheckpointError
from sfumato.nn.mmdit import PatchEmbed
from sfumato.nn.packed import layers, packed
from sfumato.nn.temporal import Mixer

ALWAYS_KEPT = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    PatchEmbed,
    Mixer,
)  # never streamed: small, or a table to look up


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Report:
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
) -> Report:
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
    room = Room() if (pack or stream) and torch.device(device or "cpu").type == "cpu" else None
    for path, parent, name in list(layers(network)):
        layer = getattr(parent, name)
        ready: dict[str, Tensor] = {}
        if room is not None:
            room.clear()
        for inner, expected in layer.state_dict().items():
            tensor = _given(tensors, f"{path}.{inner}", dtype)
            ready[inner], problem = _fitting(tensor, expected, dtype, device, own=True, room=room)
            if problem is not None:
                problems.append(f"{shown(f'{path}.{inner}')} {problem}")
        if problems or not ready:
            continue
        if stream and not isinstance(layer, ALWAYS_KEPT):
            setattr(parent, name, Streamed(layer, tensors, path, where, dtype, device, pack))
            continue
        layer.load_state_dict(ready, assign=True)
        if replaced is not None and (other := replaced(layer)) is not None:
            setattr(parent, name, other)
        if room is not None:
            ready.clear()
            _own(getattr(parent, name))
    _refuse(problems, where)
    _require_all(network, where)
    return report


def _own(layer: nn.Module) -> None:
    """Give a layer copies of the tensors in its state; a packed one may have kept some as they were."""
    state = layer.state_dict()
    layer.load_state_dict(
        {name: cast(tensor, order=_order(tensor)) for name, tensor in state.items()}, assign=True
    )


def refill(module: nn.Module, tensors: Mapping[str, Tensor], names: Iterable[str], where: str) -> None:
    """Put `tensors` of these names anew into a module that `fill` has filled, in the type and place of those there.

    The old ones are let go, not written over: who holds them keeps what they were. Errors as `fill`.
    """
    for name in names:
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, own)
        tensor, problem = _fitting(_given(tensors, name, old.dtype), old, old.dtype, old.device)
        _refuse([f"{shown(name)} {problem}"] if problem else [], where)
        setattr(owner, own, nn.Parameter(tensor, requires_grad=False))


def refill_layers(
    network: nn.Module,
    blank: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Iterable[str],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    units: Callable[[nn.Module], Iterable[tuple[str, nn.Module, str]]] = layers,
    twin: Callable[[str, nn.Module], nn.Module | None] = lambda path, layer: None,
) -> None:
    """Make those layers of `network` anew, as `fill_layers` did, that hold one of the tensors `names`.

    blank: the network on the meta device, before anything was filled or packed. units: what is made as one, as
    `nn.packed.layers` tells it. twin: what stands in a layer's place, or None for the layer itself. Streamed layers
    stay: they read anew in any case. Errors as `fill_layers`; the layers before that of the error are then made.
    """
    touched = set(names)
    room = Room() if torch.device(device or "cpu").type == "cpu" else None
    for path, _, name in list(units(blank)):
        layer = blank.get_submodule(path)
        inner = [f"{path}.{tensor}" for tensor in layer.state_dict()]
        parent = network.get_submodule(path.rpartition(".")[0])
        if touched.isdisjoint(inner) or isinstance(getattr(parent, name), Streamed):
            continue
        fresh = _read_layer(layer, tensors, path, where, dtype, device, room)
        other = twin(path, fresh)
        setattr(parent, name, other or fresh.requires_grad_(False))
        del fresh
        if room is not None:
            _own(getattr(parent, name))
            room.clear()


def _read_layer(
    blank: nn.Module,
    tensors: Mapping[str, Tensor],
    path: str,
    where: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    room: Room | None = None,
) -> nn.Module:
    """A layer with its weights, in memory of their own or in `room`, from one on the meta device that stays so."""
    layer = _twin_of(blank)
    ready: dict[str, Tensor] = {}
    for name, expected in layer.state_dict().items():
        tensor = _given(tensors, f"{path}.{name}", dtype)
        ready[name], problem = _fitting(tensor, expected, dtype, device, own=True, room=room)
        _refuse([f"{shown(f'{path}.{name}')} {problem}"] if problem else [], where)
    layer.load_state_dict(ready, assign=True)
    return layer.eval().requires_grad_(False)


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
        layer = _read_layer(self._empty[0], self._tensors, self._path, self._where, *self._form)
        return (packed(layer) if self._pack else None) or layer

    def forward(self, *inputs: Any) -> Tensor:
        return self.read()(*inputs)


def _twin_of(layer: nn.Module) -> nn.Module:
    """The same layer, whose parameters can be replaced without touching the first one's."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    twin._modules = {name: module and _twin_of(module) for name, module in layer._modules.items()}
    return twin


def _given(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor for who wants it in `dtype`: made so by the mapping's `cast`, if it has one."""
    made = getattr(tensors, "cast", None)
    return tensors[name] if made is None else made(name, dtype)


def _fitting(
    tensor: Tensor,
    expected: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    own: bool = False,
    room: Room | None = None,
) -> tuple[Tensor, str | None]:
    """The tensor as the module takes it, and what is wrong with it.

    own: in memory of its own, a kernel channels-last; else the very tensor where it is of the type and on the device
    asked for. room: instead in what the layers share, or the very tensor, and always contiguous.
    """
    problem = _misfit(tensor, expected)
    if problem is not None:
        return tensor, problem
    wanted = (dtype if tensor.is_floating_point() else None) or tensor.dtype
    if room is not None:
        made = tensor.contiguous() if tensor.dtype == wanted else room.cast(tensor, wanted)
    elif own:
        made = cast(tensor, wanted, device, _order(tensor))
    else:
        made = tensor.to(device, wanted).contiguous()
    if tensor.is_floating_point() and not finite(made):
        problem = _not_numbers(tensor, made)
    return made, problem


def _order(tensor: Tensor) -> torch.memory_format:
    """How a network that works on channels-last maps keeps it."""
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


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
