"""The U-Net: what it computes from, what it must not depend on, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.flops import count_flops
from sfumato.nn import spatial
from sfumato.nn.spatial import FeedForward, SpatialTransformer, to_map, to_tokens
from sfumato.nn.unet import UNet, UNetConfig

SMALL = UNetConfig(
    channels=(16, 32, 32), depths=(1, 2, 0), heads=(2, 2, 2), context=12, groups=8, vector=10, time_cond=6
)
SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), context=1024, linear=True)
SDXL = UNetConfig(
    channels=(320, 640, 1280), depths=(0, 2, 10), mid_depth=10, heads=(5, 10, 20), context=2048, linear=True,
    vector=2816,
)  # fmt: skip
REFINER = UNetConfig(
    channels=(384, 768, 1536, 1536), depths=(0, 4, 4, 0), mid_depth=4, heads=(6, 12, 24, 24), context=1280,
    linear=True, vector=2560,
)  # fmt: skip


def network(config: UNetConfig = SMALL) -> UNet:
    torch.manual_seed(0)
    return UNet(config).eval()


def inputs(
    config: UNetConfig = SMALL, B: int = 2, H: int = 8, W: int = 8, seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(B, config.in_channels, H, W),
        "time": 1000 * torch.rand(B, generator=generator),
        "context": draw(B, 5, config.context),
        "vector": draw(B, config.vector),
        "time_cond": draw(B, config.time_cond),
    }


# --- shape -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [
        (SD1, 859_520_964, 686),
        (replace(SD1, in_channels=9), 859_535_364, 686),
        (SD2, 865_910_724, 686),
        (SDXL, 2_567_463_684, 1680),
        (REFINER, 2_259_526_660, 1220),
    ],
    ids=["sd1", "sd1 inpainting", "sd2", "sdxl", "sdxl refiner"],
)
def test_published_sizes_and_a_free_construction(config, parameters, tensors):
    before = torch.get_rng_state()
    with torch.device("meta"):
        net = UNet(config)
    assert all(p.is_meta for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (7, 9), (5, 2), (1, 1)], ids=str)
def test_the_answer_has_the_shape_of_the_question(size):
    given = inputs(H=size[0], W=size[1])
    assert network()(**given).shape == given["x"].shape
    nine = replace(SMALL, in_channels=9, out_channels=3)
    assert network(nine)(**inputs(nine, 1, *size)).shape == (1, 3, *size)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 5)], ids=str)
def test_residuals_of_a_control_network_fit_the_skips(size):
    net, given = network(), inputs(H=size[0], W=size[1])
    before = net(**given)
    down = [torch.zeros(2, C, *(-(-side // 2**l) for side in size)) for C, l in SMALL.skips]
    mid = torch.zeros_like(down[-1])
    assert torch.equal(net(**given, down_residuals=down, mid_residual=mid), before)
    for changed in range(len(down)):
        some = [t + (i == changed) * torch.randn_like(t) for i, t in enumerate(down)]
        assert (net(**given, down_residuals=some) - before).abs().max() > 1e-4, SMALL.skips[changed]
    assert (net(**given, mid_residual=torch.randn_like(mid)) - before).abs().max() > 1e-4


def test_tokens_and_maps_are_inverse_views():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.shape == (2, 20, 3) and tokens.data_ptr() == x.data_ptr()
    assert torch.equal(tokens[1, 7], x[1, :, 1, 2])
    back = to_map(tokens, 4, 5)
    assert torch.equal(back, x) and back.data_ptr() == x.data_ptr()
    assert back.is_contiguous(memory_format=torch.channels_last)


# --- what matters and what does not -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "time", "context", "vector", "time_cond"])
def test_everything_given_is_read(name):
    net, given = network(), inputs()
    other = inputs(seed=2)[name]
    assert (net(**{**given, name: other}) - net(**given)).abs().max() > 1e-4


@torch.no_grad()
def test_each_row_of_a_batch_stands_alone():
    net, given = network(), inputs(B=3)
    both = net(**given)
    for row in range(3):
        alone = net(**{name: value[row : row + 1] for name, value in given.items()})
        torch.testing.assert_close(alone, both[row : row + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_halves_that_only_the_text_tells_apart_begin_as_one():
    """Guidance asks of each picture twice: the same answers, and the first block is computed once for both."""
    unet, given = network(), inputs(B=4)
    twice = {n: rows if n == "context" else torch.cat([rows[:2], rows[:2]]) for n, rows in given.items()}
    answer = unet(**twice)
    alone = [unet(**{name: rows[i : i + 1] for name, rows in twice.items()}) for i in range(4)]
    once, both = count_flops(unet, **twice), count_flops(unet, **given)
    torch.testing.assert_close(answer, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert once < both
    assert count_flops(unet, **{**twice, "time": given["time"]}) == both  # another time is another beginning


def test_the_order_of_text_tokens_is_the_encoders_affair():
    net, given = network(), inputs()
    mixed = given["context"][:, [3, 0, 4, 1, 2]]
    torch.testing.assert_close(net(**{**given, "context": mixed}), net(**given), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_scalar_time_is_everyones_and_whole_steps_may_be_integers():
    net, given = network(), inputs()
    each = net(**{**given, "time": torch.tensor([500.0, 500.0])})
    assert torch.equal(net(**{**given, "time": torch.tensor(500.0)}), each)
    assert torch.equal(net(**{**given, "time": torch.tensor(500)}), each)


@torch.no_grad()
def test_no_guidance_embedding_is_a_zero_one():
    net, given = network(), inputs()
    zero = torch.zeros(2, SMALL.time_cond)
    assert torch.equal(net(**{**given, "time_cond": None}), net(**{**given, "time_cond": zero}))


@torch.no_grad()
def test_memory_layout_does_not_matter():
    net, given = network(), inputs()
    before = net(**given)
    last = given["x"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(net(**{**given, "x": last}), before)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(**given), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_inputs_are_left_as_they_were():
    net, given = network(), inputs()
    copies = {name: value.clone() for name, value in given.items()}
    net(**given)
    assert all(torch.equal(given[name], copies[name]) for name in given)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_near_float32_and_the_type_is_that_of_the_question(dtype):
    net, given = network(), inputs()
    exact = net(**given)
    rough = net.to(dtype)(**given)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.03
    assert net(**{**given, "x": given["x"].to(dtype)}).dtype == dtype


@torch.no_grad()
def test_autocast_is_near_float32():
    net, given = network(), inputs()
    exact = net(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(**given)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.03


def test_every_weight_learns():
    net, given = network(), inputs()
    net(**given).square().sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle


def test_gradients_are_those_of_the_function():
    """In-place sums must not spoil what the backward pass reads: a step along the gradient changes the loss by it."""
    net, given = network().double(), {name: value.double() for name, value in inputs().items()}
    x = given["x"].requires_grad_()
    loss = net(**given).square().sum()
    (slope,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        step = 1e-6 * slope
        moved = (
            net(**{**given, "x": x + step}).square().sum() - net(**{**given, "x": x - step}).square().sum()
        )
    torch.testing.assert_close(moved, 2 * (slope * step).sum(), rtol=1e-3, atol=0.0)


def test_a_long_feed_forward_in_parts_is_the_whole():
    torch.manual_seed(0)
    layer = FeedForward(64)
    for x in (torch.randn(2, 13_001, 64), torch.randn(13_001, 2, 64).transpose(0, 1)):
        assert x.shape[:-1].numel() * layer.widest > spatial.HELD
        whole = layer(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_projections_of_a_transformer_mean_the_same_in_either_form():
    torch.manual_seed(0)
    linear = SpatialTransformer(16, 2, 1, 12, 8, linear=True)
    convolved = SpatialTransformer(16, 2, 1, 12, 8, linear=False)
    weights = linear.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        weights[name] = weights[name][:, :, None, None]
    convolved.load_state_dict(weights)
    x, context = torch.randn(2, 16, 5, 6), torch.randn(2, 3, 12)
    torch.testing.assert_close(linear(x, context), convolved(x, context), atol=1e-5, rtol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, argument, words",
    [
        ({"x": torch.zeros(2, 9, 8, 8)}, "x", "(B, 4, H, W)"),
        ({"x": torch.zeros(2, 4, 1, 8, 8)}, "x", "(2, 4, 1, 8, 8)"),
        ({"context": torch.zeros(2, 5, 13)}, "context", "(2, N, 12)"),
        ({"context": torch.zeros(2, 12)}, "context", "(2, N, 12)"),
        ({"context": torch.zeros(1, 5, 12)}, "context", "(1, 5, 12)"),
        ({"vector": None}, "vector", "(2, 10)"),
        ({"vector": torch.zeros(2, 11)}, "vector", "(2, 11)"),
        ({"time_cond": torch.zeros(2, 7)}, "time_cond", "(2, 6)"),
        ({"time": torch.zeros(3)}, "time", "(2,)"),
        ({"down_residuals": [torch.zeros(1)] * 3}, "down_residuals", "9 tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_shape_is_named(changes, argument, words):
    with pytest.raises(InputError) as caught:
        network()(**{**inputs(), **changes})
    assert caught.value.argument == argument
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vector", "time_cond"])
def test_what_the_network_has_no_weights_for_is_refused(name):
    plain = replace(SMALL, vector=0, time_cond=0)
    given = {**inputs(), "vector": None, "time_cond": None, name: torch.zeros(2, 10)}
    with pytest.raises(InputError, match=f"takes no {name}") as caught:
        network(plain)(**given)
    assert caught.value.argument == name


@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"in_channels": 0}, "in_channels"),
        ({"context": 7.5}, "context"),
        ({"vector": -1}, "vector"),
        ({"linear": 1}, "linear"),
        ({"channels": ()}, "channels"),
        ({"channels": (16, 20, 32)}, "channels"),
        ({"depths": (1, 1)}, "depths"),
        ({"depths": (1, -1, 0)}, "depths"),
        ({"heads": (2, 3, 2)}, "heads"),
        ({"heads": (2, 2, 3)}, "heads"),
        ({"mid_depth": 0}, "mid_depth"),
        ({"resnets": True}, "resnets"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(changes, argument):
    with pytest.raises(InputError) as caught:
        replace(SMALL, **changes)
    assert caught.value.argument == argument and "\n" not in str(caught.value)


def test_heads_of_a_level_without_attention_may_be_anything():
    assert replace(SMALL, depths=(0, 2, 0), heads=(3, 2, 2)).heads == (3, 2, 2)


def test_configs_survive_a_file():
    for config in (SD1, SDXL, SMALL):
        assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match="sample_size"):
        UNetConfig.from_dict({"sample_size": 64})
