"""Tensors into a module, strictly: every one there, of its shape, made of numbers, and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoint.cast import Room
from sfumato.checkpoint.layer import (
    fitting,
    given,
    own,
    packed_layer,
    product_apart,
    read_layer,
    refuse,
    told,
)
from sfumato.checkpoint.report import SHOWN, Report, compare
from sfumato.nn.packed import layers, packed


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
    state = module.state_dict(keep_vars=True)  # for its shapes: what is detached costs an operation each
    report = compare(state, tensors)
    report.require(where)
    ready: dict[str, Tensor] = {}
    problems: list[str] = []
    for name in tensors:
        tensor, problem = fitting(tensors[name], state[name], dtype, device)
        ready[name] = tensor
        del tensor  # before the next: a mapped one holds a window of its file
        if problem is not None:
            problems.append(told(tensors, name, problem))
        if problems:
            ready.clear()
    refuse(problems, where)
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
    keep: int | None = None,
    twin: Callable[[nn.Module], nn.Module | None] | None = None,
) -> Report:
    """`fill`, one layer after the other, so that beside the network no more than a layer and a window are in memory.

    Weights are copied to memory of their own, those of convolutions channels-last. pack: replace each layer by its
    packed twin (`nn/packed.py`) where it has one. keep: bytes of products and convolutions to keep in memory, the
    first that fit in; the others are checked, and read from the file again whenever they are called. The network then
    computes the same, to the bit. None keeps all. twin: makes what to keep of a layer in its place, or None to keep the
    layer; not together with the other two.
    """
    if twin is not None and (pack or keep is not None):
        raise ValueError("a layer has one twin: leave out pack and keep")
    replaced = packed if pack else twin
    state = network.state_dict(keep_vars=True)
    report = compare(state, tensors)
    report.require(where)
    problems: list[str] = []
    on_cpu = torch.device(device or "cpu").type == "cpu"
    room = Room() if (pack or keep is not None) and on_cpu else None
    left = keep or 0
    for path, parent, name in list(layers(network)):
        layer = getattr(parent, name)
        if room is not None:
            room.clear()
        streams = keep is not None and not _stays(layer)
        if streams and (size := _size(layer, dtype)) <= left:
            streams, left = False, left - size
        product = product_apart(layer, tensors, path, dtype) if pack and not streams else None
        if product is not None:
            setattr(parent, name, packed_layer(layer, tensors, path, where, dtype, device, room, product))
            own(getattr(parent, name))
            continue
        ready: dict[str, Tensor] = {}
        for inner, expected in layer.state_dict(keep_vars=True).items():
            tensor = given(tensors, f"{path}.{inner}", dtype)
            ready[inner], problem = fitting(tensor, expected, dtype, device, own=True, room=room)
            if problem is not None:
                problems.append(told(tensors, f"{path}.{inner}", problem))
        if problems or not ready:
            continue
        if streams:
            setattr(parent, name, Streamed(layer, tensors, path, where, dtype, device, pack))
            continue
        layer.load_state_dict(ready, assign=True)
        if replaced is not None and (other := replaced(layer)) is not None:
            setattr(parent, name, other)
        if room is not None:
            ready.clear()
            own(getattr(parent, name))
    refuse(problems, where)
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
        made = packed_layer if self._pack else read_layer
        return made(self._empty[0], self._tensors, self._path, self._where, *self._form)

    def forward(self, *inputs: Any) -> Tensor:
        return self.read()(*inputs)


def _stays(layer: nn.Module) -> bool:
    """Whether it is never streamed: small, since it has nothing but vectors; or with a table to look up."""
    return any(True for _ in layer.buffers()) or all(weight.ndim < 2 for weight in layer.parameters())


def _size(layer: nn.Module, dtype: torch.dtype | None) -> int:
    """Bytes of a layer's tensors in `dtype`, or in their own."""
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in layer.state_dict().values())


def _require_all(module: nn.Module, where: str) -> None:
    empty = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(
            f"{where}: {', '.join(empty[:SHOWN])} stand in no file; make them outside the meta device"
        )
