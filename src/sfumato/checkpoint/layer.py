"""One layer's tensors, checked and in the form in which it is kept: the very tensors, copies, or packed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from sfumato.checkpoint.cast import Room, cast
from sfumato.checkpoint.header import UNUSABLE, shown
from sfumato.checkpoint.report import SHOWN
from sfumato.checkpoint.rules import origin
from sfumato.errors import CheckpointError
from sfumato.nn.packed import matrix_of, packed

Product = tuple[str, tuple[Tensor, Tensor]]  # the name of a matrix, and the factors of what is added to it


def read_layer(
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
    for name, expected in layer.state_dict(keep_vars=True).items():
        tensor = given(tensors, f"{path}.{name}", dtype)
        ready[name], problem = fitting(tensor, expected, dtype, device, own=True, room=room)
        refuse([told(tensors, f"{path}.{name}", problem)] if problem else [], where)
    layer.load_state_dict(ready, assign=True)
    return layer.eval().requires_grad_(False)


def packed_layer(
    blank: nn.Module,
    tensors: Mapping[str, Tensor],
    path: str,
    where: str,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    room: Room | None = None,
    product: Product | None = None,
) -> nn.Module:
    """The packed twin of a layer, or the layer itself where it has none, from one on the meta device that stays so.

    Of a mapping whose `apart` tells that a matrix has a product added, the base is packed and the product added to what
    is packed, so that the numbers are those of a layer in memory to which it is added (`refill.add_products`). product:
    what `product_apart` found, where it was asked before.
    """
    if product is None:
        product = product_apart(blank, tensors, path, dtype)
    if product is not None:
        name, factors = product
        bare: Any = _Without(tensors, name)
        twin = packed(read_layer(blank, bare, path, where, dtype, device, room))
        if twin is not None and twin.add(*factors):  # type: ignore[operator]
            return twin
    layer = read_layer(blank, tensors, path, where, dtype, device, room)
    return packed(layer) or layer


def product_apart(
    layer: nn.Module, tensors: Mapping[str, Tensor], path: str, dtype: torch.dtype | None
) -> Product | None:
    """What is added to a layer's matrix, where that can be added after packing."""
    apart, inner = getattr(tensors, "apart", None), matrix_of(layer)
    if apart is None or inner is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    factors = apart(name := f"{path}.{inner}")
    return None if factors is None else (name, factors)


class _Without:
    """A mapping whose tensor `name` is the base's."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str):
        self._tensors, self._name = tensors, name

    def cast(self, name: str, dtype: torch.dtype | None) -> Tensor:
        if name == self._name:
            return self._tensors.base[name]  # type: ignore[attr-defined]
        return given(self._tensors, name, dtype)


def own(layer: nn.Module) -> None:
    """Give a layer copies of the tensors in its state; a packed one may have kept some as they were."""
    state = layer.state_dict()
    layer.load_state_dict(
        {name: cast(tensor, order=_order(tensor)) for name, tensor in state.items()}, assign=True
    )


def _twin_of(layer: nn.Module) -> nn.Module:
    """The same layer, whose parameters can be replaced without touching the first one's."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    twin._modules = {name: module and _twin_of(module) for name, module in layer._modules.items()}
    return twin


def given(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor for who wants it in `dtype`: made so by the mapping's `cast`, if it has one."""
    made = getattr(tensors, "cast", None)
    return tensors[name] if made is None else made(name, dtype)


def told(tensors: Mapping[str, Tensor], name: str, problem: str) -> str:
    """What is wrong with a tensor, by its name in the file, and with what LoRAs add to it, where that is it."""
    called, added = shown(origin(tensors, name)), getattr(tensors, "added", lambda name: "")(name)
    if not added:
        return f"{called} {problem}"
    beyond = "is beyond the range of float32; a weight nearer 0 is right"
    return f"{called} with {added} {beyond if problem == UNUSABLE else problem}"


def fitting(
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


def refuse(problems: list[str], where: str) -> None:
    """`CheckpointError` with the first of what is wrong with the tensors of `where`, if anything is."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:SHOWN])}{more}")


def finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity. Nothing of its size is allocated."""
    if has_torch_function((tensor,)):  # a mode that has no numbers sees this one whole
        return handle_torch_function(finite, (tensor,), tensor)
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
    return UNUSABLE
