"""FLOPs equal what one counts by hand; the probe measures a possible rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from sfumato.flops import attention_flops, count_flops, module_size
from sfumato.nn.attention import attention
from sfumato.nn.packed import pack
from sfumato.receipts.probe import matmul_peak


def test_a_linear_layer_and_a_convolution():
    assert count_flops(nn.Linear(32, 64), torch.zeros(10, 32)) == 2 * 10 * 32 * 64
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(conv, torch.zeros(2, 3, 16, 16)) == 2 * (2 * 16 * 16) * 8 * 3 * 9


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_fused_attention_counts_as_its_two_products(masked, grad):
    q = torch.randn(2, 4, 10, 16, requires_grad=grad)
    k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    mask = torch.zeros(2, 1, 1, 7) if masked else None
    flops = count_flops(functional.scaled_dot_product_attention, q, k, v, attn_mask=mask)
    assert flops == 2 * (2 * 4 * 10 * 7 * 16) * 2


def test_a_training_step_of_attention_costs_three_and_a_half_forwards():
    q, k, v = (torch.randn(2, 4, 10, 16, requires_grad=True) for _ in range(3))
    forward = count_flops(functional.scaled_dot_product_attention, q, k, v)
    both = count_flops(lambda: functional.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both == 3.5 * forward


def test_nothing_costs_nothing():
    assert count_flops(lambda: torch.ones(3) + 1) == 0


def test_sizes_count_shared_tensors_once():
    first = nn.Linear(4, 5)
    second = nn.Linear(4, 5)
    second.weight = first.weight
    second.register_buffer("table", torch.zeros(10, dtype=torch.float64))
    size = module_size(first, second)
    assert size.parameters == 20 + 5 + 5
    assert size.bytes == 4 * 30 + 80


def test_the_probe_reports_a_rate_this_machine_reaches():
    rate = matmul_peak("cpu", torch.float32, seconds=0.01)
    assert 1e6 < rate < 1e16


@torch.no_grad()
def test_packed_layers_count_as_the_layers_they_stand_for():
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1))
    x = torch.randn(2, 8, 10, 12)
    linear, rows = nn.Sequential(nn.Linear(24, 40)), torch.randn(3, 7, 24)
    plain = count_flops(layers, x), count_flops(linear, rows)
    assert plain == (2 * 2 * 120 * (16 * 8 * 9 + 8 * 16), 2 * 21 * 24 * 40)
    if pack(layers) and pack(linear):
        assert (count_flops(layers, x), count_flops(linear, rows)) == plain


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries, keys", [(64, 48), (700, 300), (1500, 1200)])
def test_attention_is_counted_once_by_every_route(dtype, queries, keys):
    q, k = torch.randn(1, 2, queries, 16, dtype=dtype), torch.randn(1, 2, keys, 16, dtype=dtype)
    assert count_flops(attention, q, k, k) == attention_flops(q, k, k) == 2 * 2 * queries * keys * 32


@torch.no_grad()
def test_heads_on_threads_of_their_own_are_counted(one_thread):
    torch.set_num_threads(2)
    q = torch.randn(1, 4, 1300, 16, dtype=torch.bfloat16)
    assert count_flops(attention, q, q, q) == 2 * 4 * 1300 * 1300 * 32
