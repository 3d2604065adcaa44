"""A file's tensor in the type a network keeps it in, and the memory that layers on their way to a packed twin share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

CHUNK = 2**17  # numbers that pass through float32 at a time, and stay in the caches of two cores
TWO_STEPS = {(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)}


def cast(
    tensor: Tensor,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    order: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A copy of the tensor: of `dtype` and on `device` where given, laid out in memory as `order` says."""
    dtype = dtype or tensor.dtype
    if (tensor.dtype, dtype) not in TWO_STEPS or torch.device(device or tensor.device).type != "cpu":
        made = tensor.to(device, dtype, copy=True, memory_format=order)
        return made.contiguous(memory_format=order)
    made = torch.empty(tensor.shape, dtype=dtype)
    copy_into(made, tensor)
    return made.contiguous(memory_format=order)


def copy_into(out: Tensor, tensor: Tensor) -> None:
    """`out.copy_(tensor)`, both contiguous on the CPU.

    PyTorch turns one half-wide type into the other number by number. Through float32, which holds both, it takes
    a third of the time, and the result is the same to the bit.
    """
    if has_torch_function((out, tensor)):  # a mode that counts operations sees this one whole
        handle_torch_function(copy_into, (out, tensor), out, tensor)
        return
    if (tensor.dtype, out.dtype) not in TWO_STEPS:
        out.copy_(tensor)
        return
    wide = torch.empty(min(CHUNK, tensor.numel()), dtype=torch.float32)
    for part, given in zip(out.view(-1).split(CHUNK), tensor.reshape(-1).split(CHUNK), strict=True):
        between = wide[: len(given)]
        between.copy_(given)
        part.copy_(between)


def copy_bytes(out: Tensor, tensor: Tensor) -> int:
    """The most bytes that `copy_into` allocates."""
    return 4 * min(CHUNK, tensor.numel()) if (tensor.dtype, out.dtype) in TWO_STEPS else 0


class Room:
    """Memory for the tensors of one layer at a time: what is new to a process costs as much as what is done with it.

    What `cast` returns is overwritten after the next `clear`.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def cast(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous copy of a tensor on the CPU, in `dtype` where given."""
        dtype = dtype or tensor.dtype
        start, size = self._used, tensor.numel() * dtype.itemsize
        if start + size > self._bytes.numel():
            # earlier tensors of the layer keep the old memory; the next layer like this one fits in
            self._bytes, start = torch.empty(_aligned(start + size), dtype=torch.uint8), 0
        self._used = _aligned(start + size)
        strides = [math.prod(tensor.shape[place + 1 :]) for place in range(tensor.ndim)]
        out = self._bytes.view(dtype).as_strided(tensor.shape, strides, start // dtype.itemsize)
        copy_into(out, tensor)
        return out


def _aligned(size: int) -> int:
    """Bytes up to where the next tensor may begin, for vectors."""
    return -size // 64 * -64
