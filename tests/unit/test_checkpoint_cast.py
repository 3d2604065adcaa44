"""Weights in another type are those that PyTorch makes, to the bit; layers share memory one after the other."""

from __future__ import annotations

import itertools

import pytest
import torch

from sfumato.checkpoint import cast as casting
from sfumato.checkpoint.cast import Room, cast, copy_bytes, copy_into
from sfumato.memory import tracing

TYPES = [torch.float32, torch.float16, torch.bfloat16]
ODD = torch.tensor([0.0, -0.0, 65504.0, 1e-7, 5.96e-8, torch.inf, -torch.inf, 1 / 3])


@pytest.mark.parametrize(("given", "wanted"), [*itertools.product(TYPES, TYPES)])
def test_a_cast_is_that_of_pytorch(given, wanted, monkeypatch):
    monkeypatch.setattr(casting, "CHUNK", 50)  # several, the last one short
    numbers = torch.cat([ODD, torch.randn(113, generator=torch.Generator().manual_seed(0)) * 100]).to(given)
    made = cast(numbers, wanted)
    assert made.dtype == wanted and torch.equal(made, numbers.to(wanted))
    assert made.data_ptr() != numbers.data_ptr()


def test_a_kernel_is_laid_out_as_asked():
    kernel = torch.randn(6, 5, 3, 3).half()
    made = cast(kernel, torch.bfloat16, order=torch.channels_last)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, kernel.bfloat16())


def test_tensors_of_one_layer_stand_side_by_side_and_the_next_layer_takes_their_place():
    room, weight, bias = Room(), torch.randn(100, 7).half(), torch.randn(100).half()
    places = []
    for _ in range(3):
        room.clear()
        made = room.cast(weight, torch.bfloat16), room.cast(bias, torch.bfloat16)
        assert torch.equal(made[0], weight.bfloat16()) and torch.equal(made[1], bias.bfloat16())
        places.append(made[0].data_ptr())
    assert places[1] == places[2]


def test_a_plan_takes_the_copy_as_one_operation():
    known = {copy_into: lambda out, tensor: (copy_bytes(out, tensor), 0, None)}
    with tracing(known) as tracer:
        out, tensor = torch.empty(3000, dtype=torch.bfloat16), torch.empty(3000, dtype=torch.float16)
        _, most = tracer.worst(lambda: copy_into(out, tensor))
    assert most == 4 * 3000
