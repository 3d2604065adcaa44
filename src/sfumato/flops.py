"""FLOPs and sizes, counted and not estimated: what PyTorch was asked to do, operation by operation.

A multiply and an add count as two; only products (matrix products, convolutions, attention) are counted, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """What a module is made of: `parameters` as a count, `bytes` as stored in memory (buffers included)."""

    parameters: int
    bytes: int


def count_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of `call(*args, **kwargs)`, backward passes inside it included. Works on any device, without a GPU."""
    return with_flops(call, *args, **kwargs)[1]


def with_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """What `call(*args, **kwargs)` answers, and its FLOPs."""
    with FlopCounterMode(display=False, custom_mapping=_fused_on_cpu()) as counter:
        answer = call(*args, **kwargs)
    return answer, counter.get_total_flops()


def formulas() -> dict[Any, Callable[..., Any]]:
    """What counts the FLOPs of each operation that is a product: count(*args, out_val=answer, **kwargs), of tensors.

    Those too that are made of others, which without gradients are seen whole.
    """
    aten = torch.ops.aten
    whole = {aten.linear: _linear, aten.conv2d: _convolution, aten.matmul: _matmul}
    ours: dict[Any, Any] = {
        packet: shape_wrapper(count) for packet, count in (_fused_on_cpu() | whole).items()
    }
    known: dict[Any, Any] = {packet: count for packet, count in flop_registry.items()}
    return known | ours


def attention_flops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> int:
    """Of attention over (B, K, N, D), (B, K, M, D) and (B, K, M, D')."""
    return _attention(q.shape, k.shape, v.shape)


def _fused_on_cpu() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    fused_on_cpu: dict[Any, Any] = {  # PyTorch's counter knows the fused attention of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten.baddbmm: _products_added,
    }
    if torch.backends.mkldnn.is_available():  # nor products with what follows them in one call
        onednn = torch.ops.mkldnn
        fused_on_cpu |= {
            onednn._linear_pointwise: _linear,
            onednn._convolution_pointwise: _convolution,
            onednn._convolution_transpose_pointwise: _transposed,
            torch.ops.onednn.qlinear_pointwise: _linear_codes,
            torch.ops.onednn.qconv_pointwise: _convolution_codes,
        }
    return fused_on_cpu


def module_size(*modules: nn.Module) -> Size:
    """Parameters and bytes of the modules; a tensor that several share counts once."""
    tensors = {id(p): p for module in modules for p in module.parameters()}
    held = tensors | {id(b): b for module in modules for b in module.buffers()}
    return Size(
        parameters=sum(p.numel() for p in tensors.values()),
        bytes=sum(t.numel() * t.element_size() for t in held.values()),
    )


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Shapes (B, K, N, D), (B, K, M, D), (B, K, M, D'): the products q kᵀ and scores v."""
    B, K, N, D = q
    return 2 * B * K * N * k[-2] * (D + v[-1])


def _matmul(a: Shape, b: Shape, *, out_shape: Shape, **__: Any) -> int:
    """Products of (…, N, D) by (…, D, M), or of vectors."""
    return 2 * math.prod(out_shape) * a[-1]


def _products_added(
    given: Shape, a: Shape, b: Shape, *_: Any, out_shape: Shape, beta: float = 1, **__: Any
) -> int:
    """Products of (B, N, D) by (B, D, M), added to what is given.

    Not those for which nothing is given: so `nn.attention` looks at scores that it makes once more. The FLOPs of
    attention are the same by every route.
    """
    return _matmul(a, b, out_shape=out_shape) if beta else 0


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """(…, I) by (O, I)."""
    return 2 * math.prod(x) * weight[0]


def _convolution(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Weights (O, I, h, w) at every cell of the result."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _linear_codes(x: Shape, scale: Any, zero: Any, weight: Shape, *_: Any, **__: Any) -> int:
    """(…, I) by (I, O), eight-bit numbers, a FLOP for each of their operations."""
    return 2 * math.prod(x) * weight[1]


def _convolution_codes(
    x: Shape, scale: Any, zero: Any, weight: Shape, *_: Any, out_shape: Shape, **__: Any
) -> int:
    """As `_convolution`, of eight-bit numbers."""
    return _convolution(x, weight, out_shape=out_shape)


def _transposed(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Weights (I, O, h, w) at every cell of what is given."""
    return 2 * math.prod(x) * math.prod(weight[1:])


def _attention_backward(gradient: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """The scores once more, then the gradients of scores and v (width D') and of q and k (width D)."""
    B, K, N, D = q
    return 2 * B * K * N * k[-2] * (3 * D + 2 * v[-1])
