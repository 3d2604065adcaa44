"""Scaled dot-product attention, by the route that is fastest on the device at hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

SCORES = 2**20  # scores held at a time by `_blocked`: 2 MiB of bfloat16, about what a core's cache keeps
REACH = 60.0  # nats: with scores in ±REACH the weights exp(score − REACH − HEADROOM) stay above 1e-38
HEADROOM = 8.0  # nats below 0 at which sigmoid(x) is exp(x) but for 3e-4 of it, a sixth of bfloat16's grain


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v. q: (B, K, N, D); k, v: (B, K, M, D); mask: (B, M) bool, True for the keys that may be
    attended to. Returns (B, K, N, D).

    PyTorch's fused CPU kernel does not use the matrix unit of a CPU with native bfloat16: 74 GFLOP/s where products
    reach 450 (one core of Zen 5). There short sequences take two plain products, and where no gradient is asked for
    sequences of any length go block by block. Every other device and precision keeps the fused kernel.
    """
    if mask is None and _products_are_fast(q) and not _needs_gradient(q, k, v):
        return _blocked(q, k, v)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)[
            :, None, None, :
        ]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= 512 * 512:
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _products_are_fast(q: Tensor) -> bool:
    """Whether bfloat16 products run on a matrix unit that the fused kernel leaves idle."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.cpu._is_avx512_bf16_supported()
    )


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention of bfloat16 heads, a block of queries at a time: SCORES numbers of memory, whatever N and M are.

    The softmax is not a pass of its own. oneDNN applies a sigmoid to a product's float32 sums before it rounds them,
    and far below zero a sigmoid is the exponential: one call makes the unnormalised weights exp(q·k − shift), more
    exactly than a softmax over rounded scores. A row's sum comes out of the second product or a short pass.

    The shift is one number per head. Keys less their mean give the same softmax, and scores whose mean over the keys
    is 0, so a row's largest score lies between 0 and max‖q‖·max‖k‖ (Cauchy–Schwarz). While that reach is no more than
    REACH, no row can vanish or overflow; a head beyond it, which is rare, goes to the fused kernel.
    """
    B, K, N, D = q.shape
    M = k.shape[-2]
    centred = k.float()
    centred = (centred - centred.mean(-2, keepdim=True)) * (1 / math.sqrt(D))
    keys = centred.to(k.dtype, memory_format=torch.contiguous_format)
    width = -(-D // 16) * 16  # a product of full vectors costs what one of 40 columns does; the spare ones count
    values = v.contiguous()
    if width > D:
        values = v.new_ones(B, K, M, width)
        values[..., :D] = v
    rows = min(N, max(1, SCORES // M))
    held = q.new_empty(rows, width)
    out = q.new_empty(B, N, K, D).transpose(1, 2)
    each = (tensor.flatten(0, 1).unbind() for tensor in (q, keys, values))
    answers = (head for picture in out.unbind() for head in picture.unbind())
    reaches = (_longest(q) * _longest(keys)).flatten().tolist()
    for index, (queries, key, value, answer, reach) in enumerate(zip(*each, answers, reaches, strict=True)):
        if not reach <= REACH:
            b, h = divmod(index, K)
            head = (slice(b, b + 1), slice(h, h + 1))
            answer.copy_(functional.scaled_dot_product_attention(q[head], k[head], v[head])[0, 0])
            continue
        shift = q.new_full((M,), -reach - HEADROOM)
        for block, target in zip(queries.split(rows), answer.split(rows), strict=True):
            weights = torch.ops.mkldnn._linear_pointwise(block, key, shift, "sigmoid", [], "")
            mixed = torch.mm(weights, value, out=held[: len(block)])
            total = mixed[:, D : D + 1] if width > D else weights.sum(-1, keepdim=True)
            torch.div(mixed[:, :D], total, out=target)
    return out


def _longest(vectors: Tensor) -> Tensor:
    """(B, K, N, D) → (B, K): the length of the longest vector of each head, float32."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).amax(-1)
