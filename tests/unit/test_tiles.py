"""A product added to packed weights where they lie is that added to the weights, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.adapters.delta import Decomposed, LowRank, folded
from sfumato.adapters.fold import Added, Folded
from sfumato.checkpoint.fill import Streamed, fill_layers
from sfumato.checkpoint.refill import add_products, refill_layers
from sfumato.nn.packed import PackedLinear, packed
from sfumato.nn.spatial import GEGLU
from sfumato.nn.tiles import add_product_to_matrix, tiles_of
from sfumato.nn.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("native")
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
CLOSE = {torch.bfloat16: 2**-8, torch.float32: 2**-20}
CONFIG = UNetConfig(4, (64, 128), (1, 1), 1, (4, 4), context=48, linear=True)


def plain(layer: PackedLinear) -> torch.Tensor:
    """The weight (O, I) in tiles."""
    tiles = tiles_of(layer.weight)
    assert tiles is not None
    return tiles.unflatten(2, (64, -1)).transpose(1, 2).reshape(len(tiles) * 64, -1)


@TYPES
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (128, 64), (1280, 640), (2560, 96)])
def test_tiles_hold_the_weight(outputs, inputs, dtype):
    weight = torch.randn(outputs, inputs).to(dtype)
    assert torch.equal(plain(PackedLinear(weight, None)), weight)


@TYPES
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 64), (64, 40), (96, 40)])
def test_padded_tiles_are_left_alone(outputs, inputs, dtype):
    layer = PackedLinear(torch.randn(outputs, inputs).to(dtype), None)
    x = torch.randn(3, inputs).to(dtype)
    before = layer(x)
    assert not layer.add(torch.randn(outputs, 2), torch.randn(2, inputs))
    assert torch.equal(layer(x), before)


@TYPES
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_added_in_place_and_rounded_once(rank, dtype):
    torch.manual_seed(rank)
    weight, up, down = torch.randn(1472, 96).to(dtype), torch.randn(1472, rank) / rank, torch.randn(rank, 96)
    layer = PackedLinear(weight, None)
    assert layer.add(up, down)
    exact = weight.double() + up.to(dtype).double() @ down.to(dtype).double()
    if dtype == torch.bfloat16:  # float32 sums may fall to the other side of a half
        assert (plain(layer) != exact.bfloat16()).float().mean() < 1e-3
    assert torch.allclose(plain(layer).double(), exact, rtol=CLOSE[dtype], atol=1e-5)


@TYPES
def test_added_to_a_matrix_in_pieces(dtype):
    torch.manual_seed(0)
    weight, up, down = torch.randn(3000, 96).to(dtype), torch.randn(3000, 5), torch.randn(5, 96)
    exact = weight.double() + up.double() @ down.double()
    add_product_to_matrix(weight, up, down)
    if dtype == torch.bfloat16:
        assert (weight != exact.bfloat16()).float().mean() < 1e-3
    assert torch.allclose(weight.double(), exact, rtol=CLOSE[dtype], atol=1e-5)


def test_both_halves_of_a_gated_layer():
    layer = GEGLU(64, 128).bfloat16()
    up, down = torch.randn(256, 3), torch.randn(3, 64)
    twin = packed(layer)
    assert twin is not None and twin.add(up, down)
    value, gate = folded(layer.proj.weight.detach(), [(1.0, LowRank(up, down))], torch.bfloat16).chunk(2)
    assert torch.allclose(plain(twin.value).float(), value.float(), rtol=2**-7, atol=1e-3)
    assert torch.allclose(plain(twin.gate).float(), gate.float(), rtol=2**-7, atol=1e-3)


def blank() -> UNet:
    with torch.device("meta"):
        return UNet(CONFIG)


def loras(base: dict[str, torch.Tensor], seed: int) -> dict[str, LowRank]:
    """On every matrix and kernel."""
    torch.manual_seed(seed)
    return {
        name: LowRank(torch.randn(len(w), 3, *[1] * (w.ndim - 2)) * 0.1, torch.randn(3, *w.shape[1:]) * 0.1)
        for name, w in base.items()
        if w.ndim > 1
    }


@TYPES
@pytest.mark.parametrize("file", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.inference_mode()
def test_however_a_network_comes_to_its_loras_it_is_the_same(file, dtype):
    """Opened with them, added to in place, made anew for another weight, or read at every call; and back."""
    torch.manual_seed(0)
    base = {name: tensor.to(file) for name, tensor in UNet(CONFIG).state_dict().items()}
    first, second = loras(base, 1), loras(base, 2)
    x, time, context = torch.randn(1, 4, 8, 8), torch.tensor(5.0), torch.randn(1, 7, 48)
    form = dtype, torch.device("cpu")

    def opened(changes, **how) -> tuple[Folded, UNet]:
        part, network = Folded(base), blank()
        part.now = part.before = Added(changes)
        fill_layers(network, part, "a test", *form, **({"pack": True} | how))
        return part, network.eval()

    def switch(part: Folded, network: UNet, changes) -> int:
        names = frozenset({*part.now.changes, *changes})
        part.now = Added(changes)
        done = add_products(network, part, names)
        refill_layers(network, blank(), part, names - done, "a test", *form, pack=True)
        part.before = part.now
        return len(done)

    def answer(network: UNet) -> torch.Tensor:
        return network(x, time, context).float()

    one = {name: ((0.7, delta),) for name, delta in first.items()}
    both = {name: (*own, (0.3, second[name])) for name, own in one.items()}
    part, network = opened({})
    bare = answer(network)
    linears = sum(isinstance(module, nn.Linear) for module in blank().modules())
    assert linears >= switch(part, network, one) > linears // 2  # in bfloat16 what reads 48 numbers is padded
    attached = answer(network)
    assert torch.equal(attached, answer(opened(one)[1])) and not torch.equal(attached, bare)
    streamed = opened(one, keep=0)[1]
    assert any(isinstance(module, Streamed) for module in streamed.modules())
    assert torch.equal(attached, answer(streamed))
    assert switch(part, network, both) == 0  # what is not the base's is made anew
    assert torch.equal(answer(network), answer(opened(both)[1]))
    switch(part, network, {})
    assert torch.equal(answer(network), bare)


def test_what_is_no_product_or_could_overflow_is_not_apart():
    up, down = torch.ones(4, 2), torch.ones(2, 4)
    part = Folded({"w": torch.zeros(4, 4)})
    part.now = Added({"w": ((0.5, LowRank(up, down)), (2.0, LowRank(up, down, 3.0)))})
    factors = part.apart("w")
    assert factors is not None and torch.equal(factors[0] @ factors[1], torch.full((4, 4), 13.0))
    part.now = Added({"w": ((1.0, LowRank(up * 1e30, down * 1e5)),)})
    assert part.apart("w") is None
    part.now = Added({"w": ((1.0, Decomposed(LowRank(up, down), torch.ones(4), True)),)})
    assert part.apart("w") is None
    assert part.apart("v") is None
