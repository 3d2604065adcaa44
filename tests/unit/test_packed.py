"""Packed layers compute what the layers they were made of compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, interpolate

from sfumato.nn.packed import PackedLinear, layers, pack, shared_kernel
from sfumato.nn.spatial import GEGLU
from sfumato.nn.unet import UNet, UNetConfig, Upsample

GRAIN = {
    torch.bfloat16: 6e-3,
    torch.float16: 1e-3,
    torch.float32: 2e-6,
}  # what rounding costs one layer, relative

every_type = pytest.mark.parametrize("dtype", GRAIN, ids=str)
pytestmark = pytest.mark.usefixtures("either")


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@every_type
@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 77, 48), (3, 48), (5000, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, shape, bias):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 40, bias=bias)).to(dtype)
    x = torch.randn(shape).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    assert pack(layer) == 1
    assert layer(x).dtype == dtype and distance(layer(x), exact) < GRAIN[dtype]
    other_way = torch.randn(*shape[:-2], 48, shape[-2]).to(dtype).mT
    assert distance(layer(other_way), layer(other_way.contiguous())) == 0


@every_type
@torch.no_grad()
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [(32, 32), (12, 20), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [(4, 32), (48, 64), (32, 4)], ids=str)
def test_convolution(dtype, kernel, stride, size, channels):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(*channels, kernel, stride, kernel // 2)).to(dtype)
    x = torch.randn(3, channels[0], *size).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    assert pack(layer) == 1
    assert layer(x).shape == exact.shape and distance(layer(x), exact) < GRAIN[dtype]


@every_type
@torch.no_grad()
def test_geglu(dtype):
    torch.manual_seed(0)
    layer = nn.Sequential(GEGLU(32, 128)).to(dtype)
    x = torch.randn(2, 50, 32).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    assert pack(layer) == 1
    assert distance(layer(x), exact) < GRAIN[dtype]


@every_type
@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 24), (15, 24), (16, 23), (15, 23)], ids=str)
def test_upsample_to_even_and_odd_sizes(dtype, size):
    torch.manual_seed(0)
    layer = nn.ModuleList([Upsample(32).to(dtype)])
    x = torch.randn(2, 32, 8, 12).to(dtype)
    exact = copy.deepcopy(layer[0]).double()(x.double(), torch.Size(size))
    assert pack(layer) == 1
    out = layer[0](x, torch.Size(size))
    assert out.shape == exact.shape and distance(out, exact) < GRAIN[dtype]


def test_doubling_and_a_convolution_are_one_transposed_convolution():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 7, dtype=torch.double), torch.randn(4, 3, 3, 3, dtype=torch.double)
    two_steps = conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    one_step = conv_transpose2d(x, shared_kernel(weight.float()).double(), stride=2, padding=1)
    torch.testing.assert_close(one_step, two_steps, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_types_and_layers_that_are_not_here_stay_as_they_are():
    network = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(3, 3, 3)).double()
    names = network.state_dict().keys()
    assert pack(network) == 0 and network.state_dict().keys() == names
    assert pack(network.to(torch.float32).to("meta")) == 0 and network[0].weight.is_meta


@every_type
@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (11, 6)], ids=str)
def test_a_packed_u_net_answers_as_before(dtype, linear, size):
    torch.manual_seed(0)
    config = UNetConfig(
        channels=(32, 64), depths=(1, 1), heads=(2, 2), context=24, linear=linear, vector=20, time_cond=8
    )
    network = UNet(config).to(dtype)
    inputs = torch.randn(2, 4, *size), torch.tensor([3.0, 700.0]), torch.randn(2, 9, 24), torch.randn(2, 20)
    exact = copy.deepcopy(network).double()(*(t.double() for t in inputs), time_cond=torch.ones(2, 8))
    plain = network(*inputs, time_cond=torch.ones(2, 8))
    assert pack(network) > 100
    packed = network(*inputs, time_cond=torch.ones(2, 8))
    assert packed.dtype == torch.float32
    assert distance(packed, exact) < 1.3 * distance(plain, exact)
    for row in range(2):
        one = [t[row : row + 1] for t in inputs]
        alone = network(*one, time_cond=torch.ones(1, 8))
        assert distance(alone, packed[row : row + 1]) < 2 * GRAIN[dtype]


@torch.no_grad()
def test_what_is_added_to_a_widened_weight_is_rounded_once(widened):
    torch.manual_seed(0)
    weight, up, down = torch.randn(40, 24).bfloat16(), torch.randn(40, 3), torch.randn(3, 24)
    twin = PackedLinear(weight, None)
    assert twin.add(up, down)
    exact = (weight.float() + up @ down).bfloat16()
    assert torch.equal(twin(torch.eye(24).bfloat16()).T, exact)


class Gained(nn.Module):
    """Layers with a parameter beside them, as a block's gain, or with a table."""

    def __init__(self, *, table: bool):
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        gain = torch.ones(4)
        if table:
            self.register_buffer("gain", gain)
        else:
            self.gain = nn.Parameter(gain)


def test_a_table_beside_layers_makes_one_of_them_and_a_parameter_does_not():
    network = nn.ModuleDict({"block": Gained(table=False), "place": Gained(table=True)})
    assert [path for path, _, _ in layers(network)] == ["block.proj", "block.out", "place"]
