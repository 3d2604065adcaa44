"""Scaled dot-product attention, by the route that is fastest on the device at hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v. q, k, v: (B, K, N, D); mask: (B, N) bool, True for the keys that may be attended to.

    On a CPU with native bfloat16 two plain matrix products use the matrix unit, which PyTorch's fused CPU kernel does
    not; they cost N² scores of memory, so long sequences and every other device keep the fused kernel.
    """
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
