"""Products added to the weights of a packed linear layer where they lie: in oneDNN's tiles.

Tiles of bfloat16 are a permutation of the weight: W (O, I) stands there as (O/64, I/2, 64, 2), blocks of 64 outputs, in
each all pairs of inputs one after the other, as the processor's instruction reads them. In one block, numbers as rows
of pairs are a matrix (I/2, 128), and up·down is one there too, of twice the rank: `down`'s even columns and its odd
ones side by side, times `up` with zeros between. So W + up·down is one product that adds to what is there, in float32,
and rounds once; the weight is read and written once and nothing of its size is made.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

OUTPUTS = 64  # of one tile's block
PAIR = 2  # inputs that stand together
BLOCKS = 40  # worked on together: for one alone a call costs as much as its product
DEEP = 16  # pairs of one inner block
STRIDES, COUNT, SIZES, DIVIDED, LENGTH = (
    40,
    52,
    53,
    65,
    77,
)  # where a descriptor's words of 64 bits tell the tiles


def tiles_of(packed: Tensor) -> Tensor | None:
    """The numbers of a weight (O, I) that `_reorder_linear_weight` has laid out, in its own memory: (O/64, I/2, 128).

    None where they are laid out otherwise, padded, or of another type than bfloat16. What is returned must not outlive
    `packed`.
    """
    if packed.dtype != torch.bfloat16 or packed.layout != torch._mkldnn or packed.ndim != 2:  # type: ignore[attr-defined]
        return None
    outputs, inputs = packed.shape
    words = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy()
    if not _as_expected(words[: len(words) // 8 * 8].tobytes(), outputs, inputs):
        return None
    size = torch.ops.mkldnn._nbytes(packed)
    if size != outputs * inputs * 2:
        return None
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(outputs // OUTPUTS, inputs // PAIR, -1)


@lru_cache(maxsize=64)
def _as_expected(descriptor: bytes, outputs: int, inputs: int) -> bool:
    """Whether a descriptor says (O/64, I/32, 16, 64, 2), which is (O/64, I/2, 64, 2).

    It is oneDNN's dnnl_memory_desc (src/common/memory_desc.hpp): dimensions and type, padding, and of a blocked form 12
    strides, the number of inner blocks, their 12 sizes, and the 12 dimensions that they divide.
    """
    words = np.frombuffer(descriptor, np.int64)
    return (
        len(words) >= LENGTH
        and list(words[1:3]) == [outputs, inputs]
        and outputs % OUTPUTS == inputs % (DEEP * PAIR) == 0
        and list(words[STRIDES : STRIDES + 2]) == [inputs * OUTPUTS, DEEP * OUTPUTS * PAIR]
        and words[COUNT] == 3
        and list(words[SIZES : SIZES + 3]) == [DEEP, OUTPUTS, PAIR]
        and list(words[DIVIDED : DIVIDED + 3]) == [1, 0, 1]
    )


def add_product(tiles: Tensor, up: Tensor, down: Tensor) -> None:
    """W += up·down in tiles: (O/64, I/2, 128) of W; up: (O, r), down: (r, I), which count as rounded to bfloat16.

    Sums are of float32 and rounded once.
    """
    count, rank = len(tiles), up.shape[1]
    group = min(BLOCKS, count)
    pairs = (
        down.to(torch.bfloat16).view(rank, -1, PAIR).permute(1, 2, 0).reshape(-1, PAIR * rank)
    )  # (I/2, 2r)
    left = pairs.expand(group, -1, -1).contiguous()
    right = _spread(up.to(torch.bfloat16), count)
    for start in range(0, count, group):
        own = tiles[start : start + group]
        torch.baddbmm(own, left[: len(own)], right[start : start + group], out=own)


def _spread(up: Tensor, count: int) -> Tensor:
    """up (O, r) in bfloat16 as (O/64, 2r, 128): the first r rows hold it in even columns, the others in odd ones."""
    rank = up.shape[1]
    bits = up.view(count, OUTPUTS, rank).transpose(1, 2).contiguous().view(torch.int16).to(torch.int32)
    # a pair of numbers is one of 32 bits, of which the first is the lower half
    pairs = torch.cat([bits & 0xFFFF, bits << 16], 1)  # (O/64, 2r, 64)
    return pairs.view(torch.bfloat16)
