"""The MMDiT: what its configuration allows, and that it answers the same however its weights are laid out."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import relative_error, spread
from sfumato.checkpoint.fill import Streamed, fill_layers
from sfumato.errors import InputError
from sfumato.nn.mmdit import KEPT, MMDiT, MMDiTConfig
from sfumato.nn.mmdit_control import MMDiTControl
from sfumato.nn.openvino import OpenVINONetwork
from sfumato.nn.packed import PackedLinear, pack
from sfumato.nn.quantized import QuantizedLinear, can_quantize, quantize
from sfumato.runtime import fast_dtype

CONFIG = MMDiTConfig(
    layers=3, heads=2, head_width=32, context=24, pooled=20, positions=10, qk_norm=True, dual=(0,)
)
FAST = fast_dtype(torch.device("cpu"))


@pytest.fixture(scope="module")
def network() -> MMDiT:
    torch.manual_seed(0)
    made = MMDiT(CONFIG)
    made.pos_embed.pos_embed.normal_()
    return made.eval().requires_grad_(False)


def inputs(height: int = 12, width: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(2, CONFIG.channels, height, width)
    return x, torch.tensor([800.0, 20.0]), torch.randn(2, 7, CONFIG.context), torch.randn(2, CONFIG.pooled)


@torch.inference_mode()
def answer(network, *size: int, **named) -> torch.Tensor:
    return network(*inputs(*size), **named)


def test_a_configuration_comes_back_from_plain_values():
    assert MMDiTConfig.from_dict({**CONFIG.to_dict(), "dual": [0]}) == CONFIG
    assert CONFIG.width == 64
    for bad, said in (
        ({"depth": 2}, "unknown MMDiT field 'depth'; known are channels, patch"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"heads": 1.5}, "heads must be a whole number"),
        ({"qk_norm": "rms_norm"}, "qk_norm must be true or false"),
        ({"dual": [24]}, "dual must list blocks from 0 to 23"),
        ({"dual": [0, 0]}, "each once"),
        ({"dual": 3}, "dual must list"),
    ):
        with pytest.raises(InputError, match=said):
            MMDiTConfig.from_dict(bad)


def test_inputs_that_do_not_fit_are_named(network):
    x, time, context, vector = inputs()
    for bad, said in (
        ((x[:, :4], time, context, vector), r"x must have shape \(B, 16, H, W\)"),
        ((x[..., :7], time, context, vector), "sides are multiples of 2 up to 20"),
        ((torch.zeros(2, 16, 22, 4), time, context, vector), "a latent of 4×22 cells does not fit"),
        ((x, time, context[..., :3], vector), r"context must have shape \(2, M, 24\)"),
        ((x, time, context, None), r"vector must have shape \(2, 20\), not None"),
        ((x, time, context, vector[:1]), r"vector must have shape \(2, 20\), not \(1, 20\)"),
        ((x, time, context, vector, torch.ones(7)), r"mask must have shape \(2, 7\), not \(7,\)"),
    ):
        with pytest.raises(InputError, match=said):
            network(*bad)


def test_a_row_does_not_depend_on_its_neighbours(network):
    whole = answer(network)
    x, time, context, vector = inputs()
    with torch.inference_mode():
        alone = network(x[1:], time[1:], context[1:], vector[1:])
    assert relative_error(alone, whole[1:]) < 1e-6


def test_a_picture_takes_the_middle_of_the_table(network):
    """What lies outside of it plays no part; the odd row is left out above."""
    other = copy.deepcopy(network)
    table = other.pos_embed.pos_embed.view(10, 10, -1)
    inside = torch.zeros(10, 10, dtype=torch.bool)
    inside[2:8, 3:7] = True
    table[~inside] = torch.nan
    assert torch.equal(answer(other), answer(network))
    table[2, 3] += 1
    assert not torch.equal(answer(other), answer(network))


def test_layers_left_out_are_not_run(network):
    other = copy.deepcopy(network)
    for weight in other.transformer_blocks[1].parameters():
        weight.fill_(torch.nan)
    assert torch.equal(answer(other, skip_layers=(1,)), answer(network, skip_layers=(1,)))
    assert not answer(other).isfinite().any()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_a_token_may_stand_for_many(network, dtype, bound, either):
    """As if it came so often: of a plain network, of a packed one, and of a ControlNet."""
    x, time, context, vector = inputs()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 200]]).float().expand(2, -1)
    control = MMDiTControl.of(network, 2).eval().requires_grad_(False)
    for layer in (control.pos_embed_input.proj, *control.controlnet_blocks):
        nn.init.normal_(layer.weight, std=0.1)
    for made in (network, control):
        more = {} if made is network else {"hint": x}
        with torch.inference_mode():
            exact = made(x, time, spread(context, mask[0]), vector, **more)
            packed = copy.deepcopy(made).to(dtype)
            pack(packed)
            answers = packed(x, time, context, vector, mask, **more)
        for one, same in zip(answers, exact, strict=True):
            assert relative_error(one, same) < bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_packed_layers_answer_as_plain_ones(network, dtype, bound, either):
    packed = copy.deepcopy(network).to(dtype)
    assert pack(packed) > 30
    block = packed.transformer_blocks[0]
    assert isinstance(block.attn.to_q, PackedLinear) and isinstance(block.ff.net[0], PackedLinear)
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    assert packed.dtype == dtype
    assert relative_error(answer(packed), answer(copy.deepcopy(network).double())) < bound


@pytest.mark.skipif(not can_quantize(torch.empty(0, dtype=FAST)), reason="this CPU has no eight-bit products")
def test_eight_bits(network):
    eight = copy.deepcopy(network).to(FAST)
    streams = 2 * 3 - 1  # that are answered: both, and in the last block the picture's
    assert (
        quantize(eight, KEPT) == 3 * 2 * 3 + 3 * streams + 4
    )  # queries, keys, values; outputs; the second attention
    block = eight.transformer_blocks[0]
    for layer in (
        block.attn.to_q,
        block.attn.add_k_proj,
        block.attn2.to_v,
        block.ff.net[0],
        block.ff_context.net[2],
    ):
        assert isinstance(layer, QuantizedLinear)
    for layer in (block.norm1.linear, eight.context_embedder, eight.proj_out, eight.norm_out.linear):
        assert not isinstance(layer, QuantizedLinear)
    error = relative_error(answer(eight), answer(copy.deepcopy(network).double()))
    assert 1e-4 < error < 6e-2


@pytest.mark.parametrize("pack_it", [False, True])
def test_layers_read_when_they_are_called_answer_the_same(network, pack_it):
    tensors = network.state_dict()
    made = []
    for keep in (None, 0, 10_000):
        with torch.device("meta"):
            blank = MMDiT(CONFIG)
        fill_layers(blank, tensors, "w", torch.float32, "cpu", pack=pack_it, keep=keep)
        made.append(blank.eval())
    assert torch.equal(answer(made[0]), answer(made[1]))
    assert torch.equal(answer(made[0]), answer(made[2]))
    streamed = [sum(isinstance(module, Streamed) for module in network.modules()) for network in made]
    assert streamed[0] == 0 and 30 < streamed[2] < streamed[1]
    held = sum(weight.numel() for weight in made[1].parameters())
    assert held < 0.03 * sum(map(torch.numel, tensors.values()))


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra openvino is not installed"
)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_openvino_answers_as_the_network(network, tmp_path, dtype, bound):
    engine = OpenVINONetwork(CONFIG, lambda: copy.deepcopy(network), "w", dtype, cache=tmp_path)
    for named in ({}, {"skip_layers": (1,)}):
        assert relative_error(answer(engine, **named), answer(network, **named)) < bound
    assert relative_error(answer(engine, 8, 16), answer(network, 8, 16)) < bound
    mask = torch.tensor([[1.0, 1, 1, 1, 1, 1, 50]]).expand(2, -1)
    x, time, context, vector = inputs()
    with torch.inference_mode():
        one_by_one = network(x, time, spread(context, mask[0]), vector)
    assert relative_error(answer(engine, mask=mask), one_by_one) < bound
    assert len(list(tmp_path.iterdir())) == 4


def test_without_norms_and_second_attentions(network):
    plain = MMDiT(replace(CONFIG, qk_norm=False, dual=()))
    names = set(plain.state_dict())
    assert not any("norm_q" in name or "attn2" in name for name in names)
    assert (
        "transformer_blocks.2.attn.to_add_out.weight" not in names
    )  # the last block does not answer the text
    assert names < set(network.state_dict())
