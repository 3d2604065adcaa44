"""The DiT's ControlNet: it begins as nothing, reads its picture cell by cell, and leaves the base's weights alone."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import InputError
from sfumato.nn.dit import DiT, DiTConfig, places
from sfumato.nn.dit_control import DiTControl, DiTControlConfig
from sfumato.types import Conditioning

CONFIG = DiTConfig(latent_channels=4, patch=2, width=32, depth=4, heads=2, text_width=16, time_width=16)


@pytest.fixture
def base() -> DiT:
    torch.manual_seed(0)
    made = DiT(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


def question(B: int = 2, H: int = 8, W: int = 6) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x, hint = (torch.randn(B, 4, 1, H, W, generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:B]
    return x, torch.full((B,), 0.4), Conditioning(torch.randn(B, 5, 16, generator=generator), mask), hint


def test_places_are_even_and_begin_with_the_first():
    assert places(8, 4) == [0, 2, 4, 6]
    assert places(8, 3) == [0, 2, 5]
    assert places(8, 0) == []


def test_it_begins_as_nothing_and_then_moves_the_answer(base):
    control = DiTControl.of(base, 2, 2)
    x, time, cond, hint = question()
    added = control(base, x, time, cond, hint)
    bare = base(x, time, cond)
    assert torch.equal(base(x, time, cond, control=added), bare)
    for layer in control.outputs:
        torch.nn.init.normal_(layer.weight, std=0.3)
    moved = base(x, time, cond, control=control(base, x, time, cond, hint))
    assert (moved - bare).abs().max() > 0.01


def test_only_its_own_weights_get_gradients_and_the_outputs_do_at_once(base):
    control = DiTControl.of(base, 1, 4)
    x, time, cond, hint = question()
    base(x, time, cond, control=control(base, x, time, cond, hint)).square().sum().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in control.outputs)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_one_picture_serves_a_batch(base):
    control = DiTControl.of(base, 1, 2)
    for layer in control.outputs:
        torch.nn.init.normal_(layer.weight)
    x, time, cond, hint = question()
    shared = control(base, x, time, cond, hint[:1])
    each = control(base, x, time, cond, hint[:1].expand(2, -1, -1, -1, -1))
    assert all(torch.equal(a, b) for a, b in zip(shared, each, strict=True))


def test_it_copies_the_first_blocks_and_no_more_than_there_are(base):
    control = DiTControl.of(base, 2, 1)
    for own, theirs in zip(control.blocks, base.blocks, strict=False):
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    for counts in ((0, 1), (5, 1), (1, 5)):
        with pytest.raises(InputError, match="must be from 1 to the base's 4 blocks"):
            DiTControl.of(base, *counts)


@pytest.mark.parametrize("values", [(0, 32, 2), (4, 33, 2), (4, 32, True), (4.0, 32, 2)])
def test_a_shape_that_is_none_is_refused(values):
    with pytest.raises(InputError):
        DiTControlConfig(*values)
