"""Products added to the weights of a packed linear layer where they lie: as a matrix, or in oneDNN's tiles.

Tiles are a permutation of the weight. Of float32, W (O, I) stands there as (O/64, I, 64), blocks of 64 outputs, in each
all inputs one after the other; a block of W + up·down is the product of `down` and 64 rows of `up`, added to it. Of
bfloat16 it is (O/64, I/2, 64, 2), pairs of inputs, as the processor's instruction reads them. In one block, numbers as
rows of pairs are a matrix (I/2, 128), and up·down is one there too, of twice the rank: `down`'s even columns and its
odd ones side by side, times `up` with zeros between. So W + up·down is one product that adds to what is there, in
float32, and rounds once; the weight is read and written once and nothing of its size is made.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

OUTPUTS = 64  # of one tile's block
PAIR = 2  # inputs that stand together
BLOCKS = 40  # worked on together: for one alone a call costs as much as its product
DEEP = 16  # inputs, or pairs of them, of one inner block
FORMS = {  # of a type's tiles: the sizes of the inner blocks, and the dimensions that they divide
    torch.bfloat16: ((DEEP, OUTPUTS, PAIR), (1, 0, 1)),
    torch.float32: ((DEEP, OUTPUTS), (1, 0)),
}
HELD = 2**18  # numbers of a matrix that are worked on together, 1 MiB of float32
STRIDES, COUNT, SIZES, DIVIDED, LENGTH = (
    40,
    52,
    53,
    65,
    77,
)  # where a descriptor's words of 64 bits tell the tiles


def tiles_of(packed: Tensor) -> Tensor | None:
    """The numbers of a weight (O, I) that `_reorder_linear_weight` has laid out, in its own memory: (O/64, I/2, 128) of
    bfloat16, (O/64, I, 64) of float32.

    None where they are laid out otherwise, padded, or of another type. What is returned must not outlive `packed`.
    """
    if packed.dtype not in FORMS or packed.layout != torch._mkldnn or packed.ndim != 2:  # type: ignore[attr-defined]
        return None
    outputs, inputs = packed.shape
    words = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy()
    if not _as_expected(words[: len(words) // 8 * 8].tobytes(), outputs, inputs, *FORMS[packed.dtype]):
        return None
    size = torch.ops.mkldnn._nbytes(packed)
    if size != outputs * inputs * packed.element_size():
        return None
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    width = OUTPUTS * _together(packed.dtype)
    return torch.frombuffer(memory, dtype=packed.dtype).view(outputs // OUTPUTS, -1, width)


@lru_cache(maxsize=64)
def _as_expected(
    descriptor: bytes, outputs: int, inputs: int, blocks: tuple[int, ...], dimensions: tuple[int, ...]
) -> bool:
    """Whether a descriptor says (O/64, I/32, 16, 64, 2), which is (O/64, I/2, 64, 2), or (O/64, I/16, 16, 64).

    It is oneDNN's dnnl_memory_desc (src/common/memory_desc.hpp): dimensions and type, padding, and of a blocked form 12
    strides, the number of inner blocks, their 12 sizes, and the 12 dimensions that they divide.
    """
    words = np.frombuffer(descriptor, np.int64)
    inner = math.prod(blocks)
    return (
        len(words) >= LENGTH
        and list(words[1:3]) == [outputs, inputs]
        and outputs % OUTPUTS == inputs % (inner // OUTPUTS) == 0
        and list(words[STRIDES : STRIDES + 2]) == [inputs * OUTPUTS, inner]
        and words[COUNT] == len(blocks)
        and tuple(words[SIZES : SIZES + len(blocks)]) == blocks
        and tuple(words[DIVIDED : DIVIDED + len(blocks)]) == dimensions
    )


def _together(dtype: torch.dtype) -> int:
    """Inputs that stand together in a type's tiles."""
    return PAIR if dtype == torch.bfloat16 else 1


def add_product(tiles: Tensor, up: Tensor, down: Tensor) -> None:
    """W += up·down in tiles, as `tiles_of` returns them, of W (O, I).

    up: (O, r), down: (r, I), in float32; beside tiles of bfloat16 they count as rounded to it.

    Sums are of float32 and rounded once.
    """
    count, rank, dtype = len(tiles), up.shape[1], tiles.dtype
    together = _together(dtype)
    group = min(BLOCKS, count)
    left = down.to(dtype).view(rank, -1, together).permute(1, 2, 0).reshape(-1, together * rank)
    left = left.expand(group, -1, -1)  # (blocks, I, r), or (blocks, I/2, 2r)
    right = up.to(dtype).view(count, OUTPUTS, rank).transpose(1, 2)
    right = right if together == 1 else _spread(right.contiguous())
    for start in range(0, count, group):
        own = tiles[start : start + group]
        torch.baddbmm(own, left[: len(own)], right[start : start + group], out=own)


def _spread(up: Tensor) -> Tensor:
    """(O/64, r, 64) of bfloat16 as (O/64, 2r, 128): the first r rows hold it in even columns, the rest in odd ones."""
    bits = up.view(torch.int16).to(torch.int32)
    # a pair of numbers is one of 32 bits, of which the first is the lower half
    pairs = torch.cat([bits & 0xFFFF, bits << 16], 1)  # (O/64, 2r, 64)
    return pairs.view(torch.bfloat16)


def add_product_to_matrix(weight: Tensor, up: Tensor, down: Tensor) -> None:
    """W += up·down of W (O, I) of any type: added in float32 and rounded once, some rows at a time, so that float32
    stays in the caches.

    up: (O, r), down: (r, I), in float32.
    """
    rows = max(HELD // weight.shape[1], 1)
    for part, own in zip(weight.split(rows), up.split(rows), strict=True):
        part.copy_(part.float().addmm_(own, down))
