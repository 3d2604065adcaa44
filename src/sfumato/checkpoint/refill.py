"""Tensors that have changed, into a network that is filled: layers made anew, or added to in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sfumato.checkpoint.cast import Room
from sfumato.checkpoint.fill import Streamed
from sfumato.checkpoint.layer import fitting, given, own, packed_layer, read_layer, refuse, told
from sfumato.nn.packed import PackedGEGLU, PackedLinear, layers
from sfumato.runtime import workers


def refill(module: nn.Module, tensors: Mapping[str, Tensor], names: Iterable[str], where: str) -> None:
    """Put `tensors` of these names anew into a module that `fill` has filled, in the type and place of those there.

    The old ones are let go, not written over: who holds them keeps what they were. Errors as `fill`.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        tensor, problem = fitting(given(tensors, name, old.dtype), old, old.dtype, old.device)
        refuse([told(tensors, name, problem)] if problem else [], where)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))


def refill_layers(
    network: nn.Module,
    blank: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Iterable[str],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    pack: bool = False,
    units: Callable[[nn.Module], Iterable[tuple[str, nn.Module, str]]] = layers,
    twin: Callable[[str, nn.Module], nn.Module | None] = lambda path, layer: None,
) -> None:
    """Make those layers of `network` anew, as `fill_layers` did, that hold one of the tensors `names`.

    blank: the network on the meta device, before anything was filled or packed; it stays so. pack: as there. Or units:
    what is made as one, as `nn.packed.layers` tells it, and twin: what stands in a layer's place, or None for the layer
    itself. Streamed layers stay: they read anew in any case. Errors as `fill_layers`; the layers before that of the
    error are then made.
    """
    touched = set(names)
    room = Room() if torch.device(device or "cpu").type == "cpu" else None
    for path, _, name in list(units(blank)):
        layer = blank.get_submodule(path)
        inner = [f"{path}.{tensor}" for tensor in layer.state_dict()]
        parent = network.get_submodule(path.rpartition(".")[0])
        if touched.isdisjoint(inner) or isinstance(getattr(parent, name), Streamed):
            continue
        if pack:
            setattr(parent, name, packed_layer(layer, tensors, path, where, dtype, device, room))
        else:
            fresh = read_layer(layer, tensors, path, where, dtype, device, room)
            setattr(parent, name, twin(path, fresh) or fresh)
            del fresh
        if room is not None:
            own(getattr(parent, name))
            room.clear()


def add_products(network: nn.Module, tensors: Mapping[str, Tensor], names: Iterable[str]) -> frozenset[str]:
    """Add to packed matrices in place what `tensors` adds to the base, where they are the base's now; which were those.

    tensors: with `apart` and `bare` of `adapters.fold.Folded`; of another mapping nothing is done. Nobody may be using
    the network. What `fill_layers` and `refill_layers` make of the same tensors is the same, to the bit. Each layer is
    one thread's: its factors take as long to lay out as a part of its product, and there one thread alone works.
    """
    names = frozenset(names)
    bare: Callable[[str], bool] = getattr(tensors, "bare", lambda name: False)
    apart: Callable[[str], tuple[Tensor, Tensor] | None] = getattr(tensors, "apart", lambda name: None)
    found = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        if kind != "weight" or f"{path}.bias" in names or not bare(name):
            continue
        layer = _packed_at(network, path)
        if layer is not None:
            found[name] = layer

    @torch.inference_mode()
    def added(name: str) -> bool:
        return (factors := apart(name)) is not None and found[name].add(*factors)

    with workers("products", torch.get_num_threads(), threads=1) as pool:
        return frozenset(name for name, done in zip(found, pool.map(added, found), strict=True) if done)


def _packed_at(network: nn.Module, path: str) -> PackedLinear | PackedGEGLU | None:
    """The packed twin of the linear layer at `path`, or of the one around it whose `proj` that is."""
    module: nn.Module | None = network
    for step in path.split("."):
        inner = getattr(module, step, None)
        if inner is None and step == "proj" and isinstance(module, PackedLinear | PackedGEGLU):
            break
        module = inner
    return module if isinstance(module, PackedLinear | PackedGEGLU) else None
