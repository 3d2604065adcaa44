"""Weights laid out once for a CPU's matrix unit, instead of anew at every call.

oneDNN multiplies weights in tiles of its own. PyTorch's eager layers keep them as plain matrices, so each call copies
them into tiles first, which costs a third of a convolution's time where maps are small and channels many; and what
follows a product is a pass of its own over memory. `pack` replaces a network's layers by twins that hold the tiles and
do both at once. Each twin computes what its layer does, from the same weights, up to the rounding of their type.

A CPU that is slow in the 16 bits of the weights has nothing to lay out: there the twin keeps them as they are, and
makes a layer's numbers float32 when it is called: the memory of 16 bits, in little more than the time of float32.
The bands of an autoencoder (`autoencoder/banded.py`) stay in their own type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.nn.products import NARROW, onednn_is_available, products_are_widened
from sfumato.nn.spatial import GEGLU, TanhGELU
from sfumato.nn.temporal import TemporalConv
from sfumato.nn.tiles import add_product, add_product_to_matrix, tiles_of
from sfumato.nn.unet import Upsample

ROWS = 2048  # tokens, and
CELLS = 32  # cells per side, for which oneDNN picks its tiles; any other number gives the same answers
WHOLE = (GEGLU, TanhGELU, Upsample)  # modules that are one layer although they have children
SLICE = 128  # input channels of a kernel that are worked on at a time


def pack(network: nn.Module) -> int:
    """Replace the layers of `network` that are on the CPU by packed twins, in place; returns how many.

    Layers in float32 and in 16 bits that are on the CPU are packed; others stay as they are. Packed weights are no
    parameters: the network can be run, without gradients, and no longer be trained, moved, saved or adapted.
    """
    count = 0
    for _, parent, name in list(layers(network)):
        twin = packed(getattr(parent, name))
        if twin is not None:
            setattr(parent, name, twin)
            count += 1
    return count


def layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(name in the network, parent, name in the parent) of what is packed as one, and of all other modules without
    children, in the network's order.
    """
    for name, child in network.named_children():
        if is_layer(child):
            yield f"{prefix}{name}", network, name
        else:
            yield from layers(child, f"{prefix}{name}.")


def is_layer(module: nn.Module) -> bool:
    """Whether it is packed as one: a module without children, one whose few layers go together, or one that has a
    table of its own beside its layers."""
    table = any(True for _ in module.buffers(recurse=False))
    return isinstance(module, WHOLE) or table or not any(True for _ in module.children())


def packed(layer: nn.Module) -> nn.Module | None:
    """The packed twin of a layer, or None where it has none or would not gain."""
    weight = next(layer.parameters(), None)
    if weight is None or not can_pack(weight):
        return None
    if isinstance(layer, GEGLU):
        return PackedGEGLU(layer)
    if isinstance(layer, TanhGELU):
        return PackedLinear(layer.proj.weight, layer.proj.bias, "gelu", "tanh")
    if isinstance(layer, Upsample):
        return PackedUpsample(layer)
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.weight, layer.bias)
    if isinstance(layer, TemporalConv):
        return PackedConv2d(layer.flat, layer.bias, padding=(1, 0))
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        form = layer.stride, layer.padding, layer.dilation, layer.groups
        return PackedConv2d(layer.weight, layer.bias, *form)
    return None


def can_pack(weight: Tensor) -> bool:
    """Whether a layer with that weight gains from packing: of float32 or 16 bits, on the CPU, with oneDNN."""
    here = weight.device.type == "cpu" and weight.dtype in (torch.float32, *NARROW)
    return here and onednn_is_available()


def is_laid_out(weight: Tensor) -> bool:
    """Whether packing puts the weight in tiles, and does not widen it at every call."""
    return can_pack(weight) and not products_are_widened(weight)


def matrix_of(layer: nn.Module) -> str | None:
    """The name of the one matrix that a layer's packed twin holds, to which its `add` adds; None where it has none."""
    if isinstance(layer, GEGLU | TanhGELU):
        return "proj.weight"
    return "weight" if isinstance(layer, nn.Linear) else None


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of numbers, weight and bias


def _kept(weight: Tensor, tiles: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight as `tiles` lays it out, or a copy that `_multiplied` widens."""
    weight = weight.detach()
    if is_laid_out(weight):
        return tiles(weight)
    return weight.clone(memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format)


def _multiplied(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a weight that `_kept` has made."""
    if weight.is_mkldnn:
        return product(x, weight, bias)
    return product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class PackedLinear(nn.Module):
    """A linear layer and, if asked for, GELU on its float32 sums. form: of GELU, "none" is exact, or "tanh"."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = "none"):
        super().__init__()
        reorder = partial(torch.ops.mkldnn._reorder_linear_weight, batch_size=ROWS)
        self.weight = _kept(weight.contiguous(), reorder)
        self.bias = None if bias is None else bias.detach().clone()
        self.activation = activation, form

    def forward(self, x: Tensor) -> Tensor:
        return _multiplied(self._product, x.contiguous(), self.weight, self.bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        activation, form = self.activation
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)

    def add(self, up: Tensor, down: Tensor) -> bool:
        """W += up·down in place, rounded once (`nn/tiles.py`); False, with nothing changed, for tiles of another form,
        and for float16, in which a sum may become infinite.

        up: (O, r), down: (r, I). Nobody may be calling the layer meanwhile.
        """
        weight = self.weight
        if weight.dtype == torch.float16:
            return False
        if not weight.is_mkldnn:
            add_product_to_matrix(weight, up, down)
            return True
        tiles = tiles_of(weight)
        if tiles is not None:
            add_product(tiles, up, down)
        return tiles is not None


class PackedGEGLU(nn.Module):
    """value ⊙ gelu(gate) from two matrices, so that the gate's activation is part of its product."""

    def __init__(self, layer: GEGLU):
        super().__init__()
        (value, gate), (value_bias, gate_bias) = layer.proj.weight.chunk(2), layer.proj.bias.chunk(2)
        self.value = PackedLinear(value, value_bias)
        self.gate = PackedLinear(gate, gate_bias, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).mul_(self.value(x))

    def add(self, up: Tensor, down: Tensor) -> bool:
        """As `PackedLinear.add`, of the matrix of both."""
        value, gate = up.chunk(2)  # halves of one shape, so that both are known or neither
        return self.value.add(value, down) and self.gate.add(gate, down)


class PackedConv2d(nn.Module):
    """A convolution of maps in channels-last memory. cells: height and width for which the tiles are picked."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        cells: tuple[int, int] = (CELLS, CELLS),
    ):
        super().__init__()
        form = self.form = (list(padding), list(stride), list(dilation), groups)
        shape = [1, weight.shape[1] * groups, *cells]
        self.weight = _kept(weight, lambda w: torch.ops.mkldnn._reorder_convolution_weight(w, *form, shape))
        self.bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return _multiplied(
            self._product, x.contiguous(memory_format=torch.channels_last), self.weight, self.bias
        )

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self.form, "none", [], "")


class PackedUpsample(nn.Module):
    """Nearest neighbour and a 3×3 convolution as one transposed 4×4 convolution of stride 2, of 4/9 the work.

    Doubling repeats each cell, so of the nine products of an output cell some share their input and add up to four.
    An odd size cuts the last repetition off, which the shared products cannot do: it takes the two steps.
    """

    def __init__(self, layer: Upsample):
        super().__init__()
        self.plain = layer
        form = self.form = (
            [1, 1],
            [0, 0],
            [2, 2],
            [1, 1],
            1,
        )  # padding, of the output, stride, dilation, groups
        kernel = layer.conv.weight.detach()
        shape = [1, kernel.shape[1], CELLS, CELLS]
        self.weight = _kept(
            shared_kernel(kernel),
            lambda w: torch.ops.mkldnn._reorder_convolution_transpose_weight(w, *form, shape),
        )

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        if tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):
            return self.plain(x, size)
        x = x.contiguous(memory_format=torch.channels_last)
        return _multiplied(self._product, x, self.weight, self.plain.conv.bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._convolution_transpose_pointwise(x, weight, bias, *self.form, "none", [], "")


def shared_kernel(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) of a convolution → (C, O, 4, 4) of the transposed one that also doubles the sides, channels last.

    Along each side (a, b, c) becomes (c, b + c, a + b, a): what neighbouring outputs take from one input cell. Both
    sides at once are a product with a matrix of zeros and ones, in float32.
    """
    O, C = weight.shape[:2]
    side = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
    both = torch.kron(side, side)  # (16, 9)
    shared = weight.new_empty(C, 4, 4, O)
    for c in range(0, C, SLICE):  # a large layer would take hundreds of megabytes at once
        kernels = weight[:, c : c + SLICE].flatten(2).permute(1, 2, 0).float()
        shared[c : c + SLICE] = (both @ kernels).unflatten(1, (4, 4))
    return shared.permute(0, 3, 1, 2)
