"""Eight-bit layers: what a code loses and what it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import InputError
from sfumato.nn import dit
from sfumato.nn.dit import DiT, DiTConfig
from sfumato.nn.packed import PackedConv2d, PackedLinear
from sfumato.nn.quantized import (
    LEVELS,
    MIDDLE,
    QuantizedAttention,
    QuantizedConv2d,
    QuantizedGEGLU,
    QuantizedLinear,
    QuantizedPointwise,
    can_quantize,
    channel_codes,
    picture_codes,
    quantize,
    quantized,
    stand_in,
    token_codes,
)
from sfumato.nn.spatial import GEGLU, CrossAttention
from sfumato.nn.temporal import FrameAttention
from sfumato.nn.unet import KEPT, UNet, UNetConfig

TYPES = [dtype for dtype in (torch.bfloat16, torch.float32) if can_quantize(torch.empty(0, dtype=dtype))]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def coded(weight: Tensor) -> Tensor:
    codes, scale = channel_codes(weight)
    return codes.double() * scale.double().view(-1, *[1] * (weight.ndim - 1))


def test_codes_are_the_nearest_of_their_scale():
    torch.manual_seed(0)
    x = torch.randn(7, 50) * torch.logspace(-6, 6, 7)[:, None]
    codes, scale = token_codes(x)
    assert codes.dtype == torch.uint8
    assert (codes.int() - MIDDLE).abs().amax(1).tolist() == [LEVELS] * 7
    back = (codes.double() - MIDDLE) * scale.double()
    assert ((back - x).abs() <= 0.5001 * scale.double()).all()
    weights, each = channel_codes(x)
    assert ((weights.double() * each.double()[:, None] - x).abs() <= 0.5001 * each.double()[:, None]).all()


def test_a_code_of_a_picture_has_its_zero_and_both_ends():
    x = functional.silu(torch.linspace(-6, 9, 3 * 8 * 10)).view(1, 3, 8, 10)
    codes, scale, zero = picture_codes(x, (1, 2))
    assert codes.shape == (1, 3, 10, 14) and codes.is_contiguous(memory_format=torch.channels_last)
    inner = codes[:, :, 1:-1, 2:-2]
    assert (((inner.double() - zero) * scale - x).abs() <= 0.5001 * scale).all()
    assert int(inner.max()) - int(inner.min()) == 2 * LEVELS
    border = torch.ones_like(codes, dtype=torch.bool)
    border[:, :, 1:-1, 2:-2] = False
    assert (codes[border] == zero).all()


@every_type
@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 77, 48), (3, 48), (5000, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_exact_on_codes(dtype, shape, bias):
    """Rounded to codes beforehand, x and the weights lose nothing more, but for the rounding of the answer's type."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 40, bias=bias).to(dtype)
    x = torch.randint(-LEVELS, LEVELS + 1, shape).to(dtype)
    x[..., 0] = LEVELS  # the scale is 1
    exact = x.double() @ coded(layer.weight).T + (layer.bias.double() if bias else 0)
    answer = QuantizedLinear(layer.weight, layer.bias)(x)
    assert answer.dtype == dtype and distance(answer, exact) < {torch.bfloat16: 4e-3}.get(dtype, 1e-6)


@every_type
@torch.no_grad()
@pytest.mark.parametrize("form", [(3, 1, 1), (3, 2, 1), (3, 2, 0), ((3, 5), 1, (1, 2)), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("low", [-20, 0, -235, 30])
def test_a_convolution_is_exact_on_codes(dtype, form, low):
    torch.manual_seed(0)
    kernel, stride, padding = form
    layer = nn.Conv2d(32, 48, kernel, stride, padding).to(dtype)
    high = min(low, 0) + 2 * LEVELS  # the scale is 1
    x = torch.randint(low, high + 1, (2, 32, 9, 12)).to(torch.float32)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = low, high
    exact = functional.conv2d(x.double(), coded(layer.weight), layer.bias.double(), stride, padding)
    answer = QuantizedConv2d(layer)(x.to(dtype))
    assert answer.shape == exact.shape and answer.is_contiguous(memory_format=torch.channels_last)
    assert distance(answer, exact) < {torch.bfloat16: 4e-3}.get(dtype, 2e-6)


@every_type
@torch.no_grad()
@pytest.mark.parametrize(
    "layer, twin, shape",
    [
        (nn.Conv2d(48, 64, 1), QuantizedPointwise, (2, 48, 7, 5)),
        (GEGLU(48, 96), QuantizedGEGLU, (2, 50, 48)),
    ],
    ids=["pointwise", "geglu"],
)
def test_twins_answer_as_their_layers_within_a_code(dtype, layer, twin, shape):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer).to(dtype), torch.randn(shape).to(dtype)
    made = quantized(layer)
    assert type(made) is twin
    assert distance(made(x), copy.deepcopy(layer).double()(x.double())) < 2e-2


@every_type
@torch.no_grad()
def test_attention_answers_as_its_layer_within_a_code(dtype):
    torch.manual_seed(0)
    layer, x = CrossAttention(64, 2, 64).to(dtype), torch.randn(2, 50, 64).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    assert distance(QuantizedAttention(layer)(x), exact) < 2e-2


@every_type
@torch.no_grad()
def test_layers_without_an_eight_bit_kernel_have_no_twin(dtype):
    for layer in (
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(32, 32, 3, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.GroupNorm(2, 32),
    ):
        assert quantized(layer.to(dtype)) is None


@every_type
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(dtype):
    """A scale is a token's or a picture's own: one that is 1000 times as large beside it changes nothing."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(32, 32).to(dtype), nn.Conv2d(32, 32, 3, padding=1).to(dtype)
    tokens, maps = torch.randn(2, 8, 32).to(dtype), torch.randn(2, 32, 6, 6).to(dtype)
    tokens[1] *= 1000
    maps[1] *= 1000
    for twin, x in ((QuantizedLinear(linear.weight, linear.bias), tokens), (QuantizedConv2d(conv), maps)):
        assert torch.equal(twin(x)[:1], twin(x[:1]))


@every_type
@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(dtype, value):
    linear, conv = nn.Linear(32, 32).to(dtype), nn.Conv2d(32, 32, 3).to(dtype)
    tokens, maps = torch.zeros(2, 32).to(dtype), torch.zeros(1, 32, 6, 6).to(dtype)
    tokens[0, 3] = maps[0, 3, 3, 3] = value
    answer = QuantizedLinear(linear.weight, linear.bias)(tokens)
    assert not answer[0].isfinite().all() and torch.equal(answer[1], linear.bias)
    assert not QuantizedConv2d(conv)(maps).isfinite().all()
    zeros = QuantizedConv2d(conv)(torch.zeros_like(maps))
    assert torch.equal(zeros, conv.bias[:, None, None].expand_as(zeros))


@every_type
@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (11, 6)], ids=str)
def test_a_u_net_in_eight_bits(dtype, linear, size):
    torch.manual_seed(0)
    config = UNetConfig(channels=(32, 64), depths=(1, 1), heads=(2, 2), context=24, linear=linear, vector=20)
    network = UNet(config).to(dtype)
    inputs = torch.randn(2, 4, *size), torch.tensor([3.0, 700.0]), torch.randn(2, 9, 24), torch.randn(2, 20)
    exact = copy.deepcopy(network).double()(*(t.double() for t in inputs))
    assert quantize(network, KEPT) > 80
    assert isinstance(network.conv_in, PackedConv2d) and isinstance(network.conv_out, PackedConv2d)
    assert isinstance(network.time_embedding.linear_1, PackedLinear)
    block = network.mid_block.attentions[0].transformer_blocks[0]
    assert isinstance(block.attn1, QuantizedAttention) and isinstance(block.attn2.to_q, QuantizedLinear)
    assert isinstance(block.attn2.to_k, PackedLinear)
    assert isinstance(network.mid_block.resnets[0].conv1, QuantizedConv2d)
    answer = network(*inputs)
    assert answer.dtype == torch.float32 and distance(answer, exact) < 5e-2
    alone = network(*(t[1:] for t in inputs))
    assert distance(alone, answer[1:]) < 2e-2


@pytest.mark.parametrize(
    ("network", "kept"),
    [
        (UNet(UNetConfig(channels=(32,), depths=(1,), heads=(2,), context=24, vector=20)), KEPT),
        (DiT(DiTConfig(4, width=32, heads=1, depth=1, text_width=8, label_classes=(2,))), dit.KEPT),
    ],
    ids=["U-Net", "DiT"],
)
def test_names_of_what_is_kept_are_the_network_s(network, kept):
    paths = [f".{path}." for path, _ in network.named_modules()]
    assert [name for name in kept if not any(f".{name}." in path for path in paths)] == []


def test_attention_over_frames_has_no_eight_bit_twin_of_attention_over_cells():
    assert stand_in("attn1", FrameAttention(64, 2), ()) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_types_are_refused(dtype):
    with pytest.raises(InputError, match=r"float32 or bfloat16; these are float\d+ on cpu"):
        quantize(nn.Linear(8, 8).to(dtype), kept=())
