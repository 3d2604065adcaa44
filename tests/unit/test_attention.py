"""Attention of bfloat16 on the CPU, block by block: exact, bounded in memory, and for any size of scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import spread
from sfumato.nn.attention import REACH, SCORES, as_two, attention

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("either")


def heads(B: int, K: int, N: int, D: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Random (B, K, N, D) in the memory in which a linear layer leaves them: (B, N, K·D)."""
    made = scale * torch.randn(B, N, K * D, generator=torch.Generator().manual_seed(seed))
    return made.to(BF16).unflatten(-1, (K, D)).transpose(1, 2)


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative distance to the definition in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    exact = torch.softmax(scores, dim=-1) @ v.double()
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("width", [16, 40, 64, 80, 160])
@pytest.mark.parametrize(
    "queries, keys", [(1300, 1300), (1, 1), (3, 500), (2000, 77), (17, 1), (4000, 300)], ids=lambda n: str(n)
)
def test_blocks_together_are_attention(queries, keys, width):
    q, k, v = heads(2, 3, queries, width), heads(2, 3, keys, width, seed=1), heads(2, 3, keys, width, seed=2)
    out = attention(q, k, v)
    assert out.shape == q.shape and out.dtype == BF16
    assert error(out, q, k, v) < 8e-3


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 1.7, 2.5, 4.0, 30.0])
@pytest.mark.parametrize("length", [300, 1100])
def test_sharp_heads_are_as_exact_as_flat_ones(scale, length):
    """Scores from nought to thousands: within the reach, near its border, and far beyond."""
    q, k, v = (heads(1, 2, length, 40, s, seed) for seed, s in enumerate((scale, scale, 1.0)))
    assert error(attention(q, k, v), q, k, v) < 1e-2


def test_heads_within_and_beyond_the_reach_may_be_mixed():
    q, k, v = (heads(2, 2, 1100, 64, seed=s) for s in range(3))
    q[1, 0] *= 20
    longest = [t.float().norm(dim=-1).amax(-1) for t in (q, k - k.float().mean(-2, keepdim=True).to(BF16))]
    reach = longest[0] * longest[1] / 8
    assert reach[1, 0] > REACH > reach[0].max()
    out = attention(q, k, v)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        one = (slice(b, b + 1), slice(h, h + 1))
        assert error(out[one], q[one], k[one], v[one]) < 1e-2


def test_what_all_keys_share_does_not_matter():
    """A vector added to every key moves all scores of a query alike; real networks have such large common parts."""
    q, k, v = (heads(1, 2, 1100, 32, seed=s) for s in range(3))
    moved = k + torch.full((32,), 64.0, dtype=BF16)  # rounds k, so that only its own error is compared
    assert error(attention(q, moved, v), q, moved, v) < 1e-2


@pytest.mark.parametrize("length", [50, 1100])
def test_values_that_are_not_finite_are_not_hidden(length):
    q, k, v = (heads(1, 2, length, 16, seed=s) for s in range(3))
    q[0, 1, 3] = math.nan
    out = attention(q, k, v)
    assert out[0, 1, 3].isnan().all()
    assert out[0, 0].isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.usefixtures("one_thread", "native")
def test_memory_does_not_grow_with_the_square_of_the_length():
    q = heads(1, 1, 6000, 16)
    with Largest() as seen:
        attention(q, q, q)
    assert seen.numbers <= SCORES < 6000 * 6000


@pytest.mark.parametrize("shape", [(2, 3, 1300, 40), (1, 10, 1300, 64)], ids=str)
@pytest.mark.parametrize("keeps", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_heads_side_by_side_are_heads_one_after_another(one_thread, shape, keeps):
    q, k, v = (heads(*shape, seed=s) for s in range(3))
    with keeps():
        alone = attention(q, k, v)
        torch.set_num_threads(2)
        both = attention(q, k, v)
        assert both.is_inference() == alone.is_inference() == (keeps is torch.inference_mode)
        assert torch.equal(both, alone)
        assert error(both, q, k, v) < 8e-3
        both.add_(1)  # it is the caller's, as any other result


def test_an_error_in_one_head_is_the_callers(one_thread, native):
    torch.set_num_threads(2)
    q = heads(1, 2, 1300, 16)
    with pytest.raises(RuntimeError):
        attention(q, q, heads(1, 2, 1299, 16))


@pytest.mark.parametrize("length", [90, 600, 1100])
def test_each_head_stands_alone(length):
    q, k, v = (heads(2, 3, length, 40, seed=s) for s in range(3))
    both = attention(q, k, v)
    for b in range(2):
        alone = attention(q[b : b + 1, 1:2], k[b : b + 1, 1:2], v[b : b + 1, 1:2])
        assert torch.equal(alone, both[b : b + 1, 1:2])


@pytest.mark.parametrize("keys", [300, 1100])
def test_keys_that_are_masked_are_not_attended_to(keys):
    q, k, v = heads(2, 3, 1000, 32), heads(2, 3, keys, 32, seed=1), heads(2, 3, keys, 32, seed=2)
    mask = torch.arange(keys) < torch.tensor([[200], [7]])
    out = attention(q, k, v, mask)
    for row, seen in enumerate((200, 7)):
        one = slice(row, row + 1)
        assert error(out[one], q[one], k[one, :, :seen], v[one, :, :seen]) < 8e-3


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["near", "beyond the reach"])
@pytest.mark.parametrize("queries, width", [(30, 16), (1000, 40), (1500, 64)])
def test_a_key_may_stand_for_many(queries, width, scale):
    q, k, v = (
        heads(2, 3, queries, width, scale),
        heads(2, 3, 90, width, seed=1),
        heads(2, 3, 90, width, seed=2),
    )
    counts = torch.ones(2, 90)
    counts[0, 88], counts[:, 89], counts[1, :20] = 77, 300, 0
    out = attention(q, k, v, counts)
    for row, each in enumerate(counts):
        one = slice(row, row + 1)
        assert error(out[one], q[one], *(spread(t[one], each, dim=2) for t in (k, v))) < 8e-3


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("queries", [40, 1100])
def test_two_keys_stand_for_many_exactly(queries, gradients):
    """Half of all that is seen, 256 keys of 512; in bfloat16 ln 256 would be that of 252 or 260."""
    q, k, v = torch.zeros(1, 2, queries, 64), torch.zeros(1, 2, 258, 64), torch.zeros(1, 2, 258, 64)
    v[:, :, 256:] = 1
    counts = torch.tensor([[1.0] * 256 + list(as_two(256))])
    out = attention(q.to(BF16).requires_grad_(gradients), k.to(BF16), v.to(BF16), counts)
    assert (out.float() - 0.5).abs().max() < 1e-3


@pytest.mark.parametrize("n", [1, 2, 77, 154, 256, 512])
def test_counts_of_two_keys_are_exact_in_bfloat16(n):
    counts = torch.tensor(as_two(n))
    assert float(counts.sum()) == pytest.approx(n, rel=1e-6) and counts.min() >= 0
    assert float(counts.log().to(BF16).float().exp().sum()) == pytest.approx(n, rel=1e-3)


@pytest.mark.parametrize("length", [64, 700])
def test_gradients_reach_queries_keys_and_values(length):
    q, k, v = (heads(1, 2, length, 16, seed=s).detach().requires_grad_() for s in range(3))
    attention(q, k, v).float().square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    scaled_dot_product_attention(*exact).square().sum().backward()
    for rough, good in zip((q, k, v), exact, strict=True):
        assert (rough.grad.double() - good.grad).norm() < 0.03 * good.grad.norm()


def test_float32_is_the_fused_kernel_to_the_bit():
    q, k, v = (heads(2, 3, 90, 24, seed=s).float() for s in range(3))
    assert torch.equal(attention(q, k, v), scaled_dot_product_attention(q, k, v))
