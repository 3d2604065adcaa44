"""Scaled dot-product attention, by the route that is fastest on the device at hand."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from sfumato.nn.products import products_are_fast, products_are_widened
from sfumato.runtime import workers

SCORES = 2**21  # scores held at a time: 4 MiB of bfloat16, which stay in the last cache before memory
SHORT = 2**17  # scores of a head up to which `_plain` is faster than `_blocked`
ROUNDED = 1 + 2**-8  # times a number in bfloat16 is at least what was rounded to it
LANE = 3 * 2**19  # scores of a head from which it is worth a thread of its own
BUSY = 0.9  # of the threads' time that their heads must fill
REACH = 60.0  # nats that a row's largest score may lie below the shift: exp(−REACH − HEADROOM) is still 3e-30
HEADROOM = 8.0  # nats below 0 from which sigmoid(x) is exp(x) but for 3e-4 of it, a sixth of bfloat16's grain


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D) v. q: (B, K, N, D); k, v: (B, K, M, D); mask: (B, M), how many equal keys each one stands for,
    or bool, True for the keys that may be attended to. Returns (B, K, N, D).

    A key that stands for n of them has ln n added to its scores, and the answer is that of all n. Where ln n is rounded
    to 16 bits n is another number; see `as_two`.

    PyTorch's fused CPU kernel does not use the matrix unit of a CPU with fast bfloat16. There attention without
    gradients takes plain products of some heads at a time where sequences are short, and goes block by block where they
    are long. 16 bits on other CPUs go through the fused kernel in float32. bfloat16 that does none of these, for its
    gradients, takes plain products of all heads together up to 512² scores of each, which are all held in memory.
    Longer sequences, and every other device and precision, keep the fused kernel.
    """
    if has_torch_function((q, k, v)):  # a mode that counts operations sees this one whole
        return handle_torch_function(attention, (q, k, v), q, k, v, mask)
    if products_are_fast(q) and not _needs_gradient(q, k, v):
        return _plain(q, k, v, mask) if _is_short(q, k, mask) else _blocked(q, k, v, mask)
    bias = None if mask is None else _bias(mask).to(torch.float32 if products_are_widened(q) else q.dtype)
    if products_are_widened(q) and not _needs_gradient(q, k, v):
        wide = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
        return wide.to(q.dtype)
    if _fits_whole(q, k):
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def as_two(n: int) -> tuple[float, float]:
    """How many two keys may stand for so that they are n together, in 16 bits as well.

    The logarithm of the first is a bfloat16, the last below ln n. The second is the rest, a thirtieth of n or less, and
    what rounding does to it is a few in ten thousand of n; ln 256 itself rounded would be 252.
    """
    exact = math.log(n)
    grain = 2.0 ** (math.frexp(exact)[1] - 8)  # of numbers of eight bits as large
    first = math.exp(math.floor(exact / grain) * grain)
    return first, n - first


def attention_bytes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> int:
    """Bytes that `attention` allocates at its worst moment without gradients, its result among them; not what a fused
    kernel keeps for itself.
    """
    B, K, N, D = q.shape
    M, result = k.shape[-2], q.numel() * q.element_size()
    if _is_short(q, k, mask):
        laid = _copied(q) + _copied(k) + _copied(v) + result
        return laid + max(4 * min(B * K, _heads(N * M)) * N * M, result)  # scores and their softmax
    if products_are_fast(q):
        width, lanes = _width(D), _lanes(B * K, N * M)
        rows = _rows(N, M, lanes)
        laid = _copied(q) + 2 * k.numel() + (_copied(v) if width == D else 2 * B * K * M * width)
        several = rows < N
        # of each head at work: keys in tiles, answers, and a block of weights, made beside the last one
        head = 2 * (N + several * M) * width + 2 * (1 + several) * rows * M
        return laid + max(_copied(k), result + lanes * head)
    if products_are_widened(q):
        return 4 * (q.numel() + k.numel() + v.numel() + q.numel())  # in float32, the answer too
    return result


def _copied(x: Tensor) -> int:
    """Bytes for a head's vectors to stand one after the other, of bfloat16."""
    return 0 if x.is_contiguous() else 2 * x.numel()


def _is_short(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether `_plain` is the route without gradients. It rounds what it adds to scores, so it takes bool masks."""
    exact = mask is None or mask.dtype == torch.bool
    return products_are_fast(q) and exact and _scores(q, k) <= SHORT


def _scores(q: Tensor, k: Tensor) -> int:
    """Numbers in the scores of one head."""
    return q.shape[-2] * k.shape[-2]


def _fits_whole(q: Tensor, k: Tensor) -> bool:
    """Whether the scores of all heads may be held together: the way of bfloat16 with gradients."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and _scores(q, k) <= 512 * 512


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _bias(mask: Tensor) -> Tensor:
    """(B, M) → (B, 1, 1, M) of float32: what is added to the scores of keys that stand for so many."""
    return mask.float().log()[:, None, None, :]


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of bfloat16 heads by plain products and a softmax, as many heads at a time as hold SCORES scores.
    mask: (B, M) bool.

    Rounded scores far from 0 would spoil the weights. So they are made twice (and counted once: see `flops`): the first
    ones tell each row's largest, and the second ones are rounded after it was taken off, when those that count are near
    0.
    """
    B, K, N, D = q.shape
    heads, scale = _heads(_scores(q, k)), 1 / math.sqrt(D)
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    added = None if mask is None else _bias(mask).to(q.dtype).expand(-1, K, -1, -1).flatten(0, 1)
    nothing = q.new_empty(1)
    out = q.new_empty(B * K, N, D)
    for place in range(0, B * K, heads):
        some = slice(place, place + heads)
        product = functools.partial(
            torch.baddbmm, batch1=queries[some], batch2=keys[some].transpose(1, 2), alpha=scale
        )
        scores = product(nothing, beta=0)
        if added is not None:
            scores += added[some]
        shift = scores.amax(-1, keepdim=True).neg_()
        del scores
        if added is not None:
            shift = shift + added[some]
        torch.bmm(product(shift).softmax(-1), values[some], out=out[some])
    return q.new_empty(B, N, K, D).transpose(1, 2).copy_(out.view(B, K, N, D))


def _heads(scores: int) -> int:
    """Heads of so many scores each that `_plain` takes at a time."""
    return max(1, SCORES // scores)


def _blocked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Exact attention of bfloat16 heads, a block of queries at a time: SCORES numbers of memory, whatever N and M are.

    The softmax is no pass of its own. oneDNN can apply a sigmoid to a product's float32 sums before it rounds them, and
    far below zero a sigmoid is the exponential. So one call makes the unnormalised weights exp(q·k/√D − shift), nearer
    to the exact ones than a softmax of rounded scores is. A row's sum is taken of the rounded weights.

    The shift is one number per head. Keys less their mean give the same softmax, and scores whose mean over the keys is
    0; so a row's largest score lies between 0 and max‖q‖·max‖k‖ (Cauchy–Schwarz), the reach. Up to REACH no row can
    vanish or overflow. A head that reaches further goes to the fused kernel. A key that stands for n counts n times in
    the mean, and ln n is added to its scores: that of one seen is at least about 0, and adds to the reach.

    A large head is one thread's from beginning to end: many threads that share its short products wait for one another
    at the end of every one.
    """
    B, K, N, D = q.shape
    M, width, scale = k.shape[-2], _width(D), 1 / math.sqrt(D)
    queries, keys = q.contiguous(), k.contiguous()
    bias = q.new_zeros(B, 1, 1, M, dtype=torch.float32) if mask is None else _bias(mask)
    middle = _mean(keys, mask).mul_(-scale).to(k.dtype)
    keys = torch.addcmul(middle, keys, q.new_ones(1), value=scale)  # rounded once
    values = v.contiguous() if width == D else v.new_ones(B, K, M, width)
    if width > D:  # products work on whole vectors anyway: in the spare room ones, which give the row's sum
        values[..., :D] = v
    out = q.new_empty(B, N, K, D).transpose(1, 2)
    reaches = (_longest(queries) * _longest(keys, mask) + bias.amax(-1)[..., 0]).tolist()
    lanes = _lanes(B * K, N * M)
    rows = _rows(N, M, lanes)

    def head(place: tuple[int, int]) -> None:
        added, reach = bias[place[0]], reaches[place[0]][place[1]]
        with torch.inference_mode():  # what the caller has set does not hold in other threads
            if reach <= REACH:  # not if it is NaN
                shifts = added[0, 0] - (reach + HEADROOM)
                _head(queries[place], keys[place], values[place], shifts, rows, out[place])
            else:
                whole = (t[place][None, None] for t in (q, k, v))
                answer = functional.scaled_dot_product_attention(
                    *whole, attn_mask=None if mask is None else added[None]
                )
                out[place] = answer[0, 0]

    heads = itertools.product(range(B), range(K))
    deque(_pool(lanes, os.getpid()).map(head, heads) if lanes > 1 else map(head, heads), maxlen=0)
    return out


def _mean(keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, K, M, D) → (B, K, 1, D), rounded shares and all: keys less any vector at all give the same softmax."""
    if mask is None:
        return keys.mean(-2, keepdim=True, dtype=torch.float32)
    share = mask / mask.sum(-1, keepdim=True)
    return torch.matmul(share[:, None, None, :].to(keys.dtype), keys)


def _head(q: Tensor, k: Tensor, v: Tensor, shifts: Tensor, rows: int, out: Tensor) -> None:
    """Attention of one head to `out`: (N, D), `rows` queries at a time, with weights exp(q·k + shifts).

    v: (M, width), of which what is beyond D is ones. shifts: (M,) of float32.
    """
    (N, D), width = q.shape, v.shape[-1]
    if rows < N:  # blocks share the keys, which are then worth laying out in tiles once
        k = torch.ops.mkldnn._reorder_linear_weight(k, rows)
    mixed = q.new_empty(N, width)
    totals = mixed[:, D : D + 1] if width > D else q.new_empty(N, 1)
    for first in range(0, N, rows):
        block = slice(first, first + rows)
        weights = torch.ops.mkldnn._linear_pointwise(q[block], k, shifts, "sigmoid", [], "")
        torch.mm(weights, v, out=mixed[block])
        if width == D:
            torch.sum(weights, -1, keepdim=True, out=totals[block])
    torch.div(mixed[:, :D], totals, out=out)


def _width(D: int) -> int:
    """Columns of a head's values in whole vectors."""
    return -(-D // 16) * 16


def _lanes(heads: int, scores: int) -> int:
    """Heads of so many scores each worked on at a time, each by one thread; 1 for one after the other by all threads,
    as where some would have none. A mode that watches operations sees those of its own thread.
    """
    threads = torch.get_num_threads()
    rounds = -(-heads // threads)
    watched = torch._C._len_torch_dispatch_stack() > 0
    return threads if scores >= LANE and heads >= BUSY * rounds * threads and not watched else 1


def _rows(N: int, M: int, lanes: int) -> int:
    """Queries in a block, so that those of all lanes hold SCORES scores together."""
    blocks = -(-N // max(1, SCORES // lanes // M))
    return -(-N // blocks)


@functools.cache
def _pool(lanes: int, process: int) -> ThreadPoolExecutor:
    """Threads for the heads; those of another process do not live on in one that was forked from it."""
    return workers("head", lanes, threads=1)


def _longest(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, K, N, D) → (B, K): at least the length of the longest vector of each head, float32, of those in the mask."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1)  # (B, K, N)
    if mask is not None:
        lengths = lengths.masked_fill(mask[:, None, :] == 0, 0)
    return lengths.amax(-1).float() * ROUNDED
