"""Scaled dot-product attention, by the route that is fastest on the device at hand."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

SCORES = (
    2**21
)  # scores held at a time by `_blocked`: 4 MiB of bfloat16, which stay in the last cache before memory
REACH = 60.0  # nats that a row's largest score may lie below the shift: exp(−REACH − HEADROOM) is still 3e-30
HEADROOM = 8.0  # nats below 0 from which sigmoid(x) is exp(x) but for 3e-4 of it, a sixth of bfloat16's grain


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v. q: (B, K, N, D); k, v: (B, K, M, D); mask: (B, M) bool, True for the keys that may be
    attended to. Returns (B, K, N, D).

    PyTorch's fused CPU kernel does not use the matrix unit of a CPU with native bfloat16. There attention without a
    mask or gradients goes block by block, and other short sequences take two plain products, which cost N·M scores of
    memory. Long ones with a mask or gradients, and every other device and precision, keep the fused kernel.
    """
    if has_torch_function((q, k, v)):  # a mode that counts operations sees this one whole
        return handle_torch_function(attention, (q, k, v), q, k, v, mask)
    if mask is None and products_are_fast(q) and not _needs_gradient(q, k, v):
        return _blocked(q, k, v)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)[
            :, None, None, :
        ]
    if _is_plain(q, k):
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_bytes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> int:
    """Bytes that `attention` allocates at its worst moment without gradients, its result among them; not what a fused
    kernel keeps for itself.
    """
    B, K, N, D = q.shape
    M, result = k.shape[-2], q.numel() * q.element_size()
    if mask is None and products_are_fast(q):
        width = -(-D // 16) * 16
        rows = max(1, min(N, SCORES // M))
        keys, values = k.numel(), B * K * M * width * 2
        head = 2 * (N + (M if rows < N else 0)) * width  # one head's queries, and its keys in tiles
        widened = (
            2 * keys if width > D else 0
        )  # values as they are, until they stand beside the column of ones
        blocks = 2 * (2 * rows * M) + rows * width * 2  # the next block of weights is made beside the last
        return max(12 * keys, 6 * keys + values + max(widened, result + head + blocks))
    if _is_plain(q, k):
        return 10 * B * K * N * M + result  # scores; scores and their softmax in float32
    return result


def _is_plain(q: Tensor, k: Tensor) -> bool:
    """Whether two plain products are the route for short sequences."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= 512 * 512


def products_are_fast(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that multiplies it natively, with oneDNN to do it."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.cpu._is_avx512_bf16_supported()
    )


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention of bfloat16 heads, a block of queries at a time: SCORES numbers of memory, whatever N and M are.

    The softmax is no pass of its own. oneDNN can apply a sigmoid to a product's float32 sums before it rounds them, and
    far below zero a sigmoid is the exponential. So one call makes the unnormalised weights exp(q·k/√D − shift), nearer
    to the exact ones than a softmax of rounded scores is. A row's sum is taken of the rounded weights.

    The shift is one number per head. Keys less their mean give the same softmax, and scores whose mean over the keys is
    0; so a row's largest score lies between 0 and max‖q‖·max‖k‖ (Cauchy–Schwarz), the reach. Up to REACH no row can
    vanish or overflow. A head that reaches further goes to the fused kernel.
    """
    B, K, N, D = q.shape
    M = k.shape[-2]
    centred = k.float()
    centred = (centred - centred.mean(-2, keepdim=True)) * (1 / math.sqrt(D))
    keys = centred.to(k.dtype, memory_format=torch.contiguous_format)
    width = -(-D // 16) * 16
    values = v.contiguous()
    if (
        width > D
    ):  # the product works on whole vectors anyway; a column of ones in the spare room gives the row's sum
        values = v.new_ones(B, K, M, width)
        values[..., :D] = v
    rows = max(1, min(N, SCORES // M))
    held = q.new_empty(rows, width)
    several = rows < N  # blocks share the keys, which are then worth laying out in tiles once
    out = q.new_empty(B, N, K, D).transpose(1, 2)
    reaches = (_longest(q) * _longest(keys)).tolist()
    for b, h in itertools.product(range(B), range(K)):
        reach = reaches[b][h]
        if not reach <= REACH:  # nor if it is NaN
            head = (slice(b, b + 1), slice(h, h + 1))
            out[head] = functional.scaled_dot_product_attention(q[head], k[head], v[head])
            continue
        shift = q.new_full((M,), -reach - HEADROOM)
        tiles = torch.ops.mkldnn._reorder_linear_weight(keys[b, h], rows) if several else keys[b, h]
        for block, target in zip(q[b, h].contiguous().split(rows), out[b, h].split(rows), strict=True):
            weights = torch.ops.mkldnn._linear_pointwise(block, tiles, shift, "sigmoid", [], "")
            mixed = torch.mm(weights, values[b, h], out=held[: len(block)])
            total = mixed[:, D : D + 1] if width > D else weights.sum(-1, keepdim=True)
            torch.div(mixed[:, :D], total, out=target)
    return out


def _longest(vectors: Tensor) -> Tensor:
    """(B, K, N, D) → (B, K): the length of the longest vector of each head, float32."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).amax(-1)
