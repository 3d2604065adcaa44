"""Attention, positions, patches and the DiT: what they compute and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.nn.attention import attention
from sfumato.nn.dit import DiT, DiTConfig, from_patches, to_patches
from sfumato.nn.embed import grid_positions, grid_sinusoid, rope_angles, rotate, sinusoid, turns
from sfumato.nn.transformer import Block, hidden_width, rms_norm
from sfumato.types import Conditioning

CONFIG = DiTConfig(latent_channels=3, width=64, depth=2, heads=2, text_width=16, time_width=32)


def random_dit(config: DiTConfig = CONFIG, seed: int = 0) -> DiT:
    """A DiT of which no weight is zero, so that everything it reads can be seen in what it answers."""
    torch.manual_seed(seed)
    net = DiT(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    return net.eval()


def words(batch: int = 2, length: int = 6, real: int = 4, width: int = 16, seed: int = 1) -> Conditioning:
    tokens = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    return Conditioning(tokens, (torch.arange(length) < real).expand(batch, length))


def exact_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition, in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bknd,bkmd->bknm", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    return torch.einsum("bknm,bkmd->bknd", weights / weights.sum(-1, keepdim=True), v)


# --- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 520], ids=["by products", "fused"])
@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
@pytest.mark.parametrize("masked", ["nothing", "hidden", "counted"])
def test_every_route_of_attention_is_attention(length, dtype, error, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 16).to(dtype) for _ in range(3))
    places = torch.arange(length)
    mask = {
        "nothing": None,
        "hidden": torch.stack([places < length - 3, places % 2 == 0]),
        "counted": torch.stack([1 + 76 * (places == 2), places % 3]),
    }[masked]
    out = attention(q, k, v, mask)
    assert out.dtype == dtype and out.shape == q.shape
    assert (out.double() - exact_attention(q, k, v, mask)).abs().max() < error


def test_queries_may_be_fewer_than_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        out = attention(q.to(dtype), k.to(dtype), v.to(dtype))
        assert (out.double() - exact_attention(q, k, v)).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_mask_hides_changes_nothing_at_all(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 16).to(dtype) for _ in range(3))
    mask = torch.arange(9).lt(5).expand(2, 9)
    before = attention(q, k, v, mask)
    k[:, :, 5:], v[:, :, 5:] = 50.0, -50.0
    assert torch.equal(attention(q, k, v, mask), before)


# --- positions -------------------------------------------------------------------------------------------------


def turned(x: Tensor, position: Tensor, **options: float) -> Tensor:
    """x: (D,) turned as at `position` (axes,)."""
    angles = rope_angles(position[None], x.shape[-1], **options)
    return rotate(x[None, None, None], *turns(angles)).flatten()


@pytest.mark.parametrize("axes", [1, 3])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_rotary_products_know_only_the_difference_of_places(axes, data):
    place = st.lists(st.integers(0, 40), min_size=axes, max_size=axes).map(lambda p: torch.tensor(p).float())
    here, there, shift = data.draw(place), data.draw(place), data.draw(place)
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    near = turned(q, here) @ turned(k, there)
    far = turned(q, here + shift) @ turned(k, there + shift)
    assert abs(near - far) < 1e-3
    assert abs(turned(q, here).norm() - q.norm()) < 1e-4


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotary_products_see_each_axis(axis):
    q = torch.ones(64)
    step = torch.zeros(3)
    step[axis] = 1
    assert turned(q, torch.zeros(3)) @ turned(q, step) < q @ q - 1


def test_no_angle_no_turn():
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(rotate(x, *turns(torch.zeros(3, 4))), x)


def test_a_quarter_turn_swaps_the_halves():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    quarter = torch.full((1, 2), math.pi / 2)
    out = rotate(x, *turns(quarter)).flatten()
    torch.testing.assert_close(out, torch.tensor([-3.0, -4.0, 1.0, 2.0]))


def test_sinusoids_are_cosines_then_sines():
    out = sinusoid(torch.tensor([0.0, 2.0]), 8)
    assert torch.equal(out[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    frequencies = [10_000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(2 * f) for f in frequencies] + [math.sin(2 * f) for f in frequencies]
    torch.testing.assert_close(out[1], torch.tensor(expected))


@pytest.mark.parametrize("width", [12, 64, 100, 256])
def test_every_cell_of_a_grid_has_its_own_vector(width):
    vectors = grid_sinusoid(grid_positions(2, 5, 7), width)
    assert vectors.shape == (70, width)
    distances = torch.cdist(vectors, vectors) + torch.eye(70)
    assert distances.min() > 1e-2


def test_tokens_and_positions_come_in_one_order():
    T, H, W = 2, 3, 5
    t, y, x = torch.meshgrid(torch.arange(T), torch.arange(H), torch.arange(W), indexing="ij")
    latent = torch.stack([t, y, x]).float()[None]
    assert torch.equal(to_patches(latent, 1)[0], grid_positions(T, H, W))


# --- patches ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 4)] * 5), st.integers(1, 3))
def test_patches_hold_every_number_once(shape, patch):
    B, C, T, H, W = shape
    x = torch.arange(B * C * T * H * W * patch**2).view(B, C, T, H * patch, W * patch)
    tokens = to_patches(x, patch)
    assert tokens.shape == (B, T * H * W, C * patch**2)
    assert torch.equal(from_patches(tokens, (T, H * patch, W * patch), patch), x)
    assert torch.equal(tokens[0, 0].view(C, patch, patch), x[0, :, 0, :patch, :patch])


def test_patches_of_any_memory_layout():
    x = torch.randn(2, 6, 4, 1, 3).permute(0, 4, 3, 1, 2)  # (B, 3, 1, 6, 4)
    assert torch.equal(to_patches(x, 2), to_patches(x.contiguous(), 2))


# --- blocks and the network --------------------------------------------------------------------------------------


def test_rms_norm_is_its_formula():
    x = torch.randn(3, 5, 16) * 7
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x), expected)


def test_hidden_widths_fill_tiles():
    assert [hidden_width(width) for width in (64, 256, 384)] == [192, 704, 1024]


def test_a_block_with_closed_gates_lets_everything_pass():
    torch.manual_seed(0)
    block, x = Block(32, 2, modulated=True), torch.randn(2, 5, 32)
    cos, sin = turns(torch.zeros(5, 8))
    gates = torch.randn(2, 6, 32)
    gates[:, [2, 5]] = 0
    assert torch.equal(block(x, cos, sin, None, gates), x)
    gates[:, 2] = 1
    assert not torch.equal(block(x, cos, sin, None, gates), x)


def test_a_fresh_network_answers_nought():
    torch.manual_seed(0)
    net = DiT(CONFIG)
    x = torch.randn(2, 3, 1, 4, 6)
    assert torch.equal(net(x, torch.tensor([0.1, 0.9]), words()), torch.zeros_like(x))
    tokens = {"final": net.final_modulation, "shared": net.modulation, "out": net.latent_out}
    for name, layer in tokens.items():
        assert not layer.weight.any() and not layer.bias.any(), name


@pytest.mark.parametrize("patch, size", [(1, (4, 6)), (2, (4, 6)), (4, (8, 4))])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_answer_has_the_shape_of_the_question(patch, size, frames):
    net = random_dit(DiTConfig(3, patch, 32, 1, 1, text_width=16, time_width=16))
    x = torch.randn(2, 3, frames, *size)
    assert net(x, torch.tensor(0.5), words()).shape == x.shape


@torch.no_grad()
def test_no_mask_is_a_mask_that_hides_nothing():
    net, cond = random_dit(), words(length=6, real=6)
    x, time = torch.randn(2, 3, 1, 4, 4), torch.tensor([0.2, 0.7])
    whole = net(x, time, cond)
    torch.testing.assert_close(net(x, time, Conditioning(cond.tokens)), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_of_the_text_never_changes_the_answer():
    net, cond = random_dit(), words(length=8, real=5)
    x, time = torch.randn(2, 3, 1, 4, 4), torch.tensor([0.2, 0.7])
    before = net(x, time, cond)
    spoiled = cond.tokens.clone()
    spoiled[:, 5:] = 1e4 * torch.randn(2, 3, 16)
    assert torch.equal(net(x, time, Conditioning(spoiled, cond.mask)), before)
    short = Conditioning(cond.tokens[:, :5], cond.mask[:, :5])
    torch.testing.assert_close(net(x, time, short), before, atol=1e-5, rtol=1e-5)
    spoiled[:, 4] += 1  # a real word
    assert (net(x, time, Conditioning(spoiled, cond.mask)) - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_order_of_words_is_the_encoders_affair():
    net, cond = random_dit(), words(real=6)
    x, time = torch.randn(2, 3, 1, 4, 4), torch.tensor(0.4)
    mixed = Conditioning(cond.tokens[:, [3, 0, 5, 1, 4, 2]], cond.mask)
    torch.testing.assert_close(net(x, time, mixed), net(x, time, cond), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_row_of_a_batch_stands_alone():
    net, cond = random_dit(), words()
    x, time = torch.randn(2, 3, 1, 4, 4), torch.tensor([0.2, 0.7])
    both = net(x, time, cond)
    for row in range(2):
        one = Conditioning(cond.tokens[row : row + 1], cond.mask[row : row + 1])
        alone = net(x[row : row + 1], time[row : row + 1], one)
        torch.testing.assert_close(alone, both[row : row + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_time_text_and_place_all_matter():
    net, cond = random_dit(), words()
    x = torch.randn(2, 3, 1, 4, 4)
    before = net(x, torch.tensor(0.4), cond)
    assert torch.equal(net(x, torch.tensor([0.4, 0.4]), cond), before)
    assert (net(x, torch.tensor(0.41), cond) - before).abs().max() > 1e-3
    assert (net(x, torch.tensor(0.4), words(seed=2)) - before).abs().max() > 1e-3
    turned_over = net(x.flip(-1), torch.tensor(0.4), cond).flip(-1)
    assert (turned_over - before).abs().max() > 1e-3


@torch.no_grad()
def test_a_clip_of_one_frame_is_a_picture_and_longer_ones_have_an_order():
    net, cond = random_dit(), words()
    clip = torch.randn(2, 3, 3, 4, 4)
    time = torch.tensor(0.4)
    answer = net(clip, time, cond)
    backwards = net(clip.flip(2), time, cond).flip(2)
    assert (answer - backwards).abs().max() > 1e-3  # frames know when they are
    still = net(clip[:, :, :1], time, cond)
    assert (still - answer[:, :, :1]).abs().max() > 1e-3  # and see each other
    tokens = to_patches(clip[:, :, :1], 1)
    assert torch.equal(tokens, clip[:, :, 0].flatten(2).transpose(1, 2))  # one frame: rows of a picture


def test_labels_are_read_beside_the_answer():
    plain = random_dit()
    assert plain.forward_with_labels(torch.randn(2, 3, 1, 4, 4), torch.tensor(0.1), words())[1] is None
    net = random_dit(DiTConfig(3, 2, 32, 4, 1, text_width=16, time_width=16, label_classes=(3, 5)))
    x = torch.randn(2, 3, 1, 4, 8)
    answer, labels = net.forward_with_labels(x, torch.tensor(0.1), words())
    assert labels is not None and labels.shape == (2, 2 * 4, 8)
    assert torch.equal(net(x, torch.tensor(0.1), words()), answer)
    assert net.label_depth == 2
    gradients = torch.autograd.grad(labels.sum(), list(net.blocks[2].parameters()), allow_unused=True)
    assert all(g is None for g in gradients)  # later blocks owe the labels nothing


def test_every_weight_is_used():
    net = random_dit(DiTConfig(3, 1, 32, 2, 1, text_width=16, time_width=16, label_classes=(3,)))
    answer, labels = net.forward_with_labels(torch.randn(2, 3, 1, 4, 4), torch.tensor(0.3), words())
    assert labels is not None
    (answer.square().sum() + labels.square().sum()).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle


@torch.no_grad()
def test_bfloat16_is_near_float32_and_keeps_the_type():
    net, cond = random_dit(), words()
    x, time = torch.randn(2, 3, 1, 4, 4), torch.tensor([0.2, 0.7])
    exact = net(x, time, cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = net(x, time, cond)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05
