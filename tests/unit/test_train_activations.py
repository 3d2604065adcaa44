"""What a step keeps, told without numbers, and computing blocks twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import CPU
from sfumato.adapters.trainable import TrainedLora, layers_of
from sfumato.families.sd.system import open_system
from sfumato.train.activations import computed_twice, kept_bytes
from small_sd import SIDE, SMALL, write


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory):
    """(trainee, lora, a call of the network) of a small SDXL."""
    place = write("sdxl", tmp_path_factory.mktemp("sdxl") / "model")
    trainee = open_system(place, CPU, torch.float32, offload="model", systems=SMALL).trainee(False)
    lora = TrainedLora(dict(layers_of(trainee.networks["unet"])), 2, 2.0)
    with torch.no_grad():
        cond = trainee.sized(trainee.reader(["a"])(["a"]), SIDE, SIDE)
    x, time = torch.randn(1, 4, 1, SIDE // 4, SIDE // 4), torch.tensor([500.0])
    return trainee, lora, lambda: lora(trainee.predict, x, time, cond)


def kept_for_real(call, weights: list[Tensor]) -> int:
    """As `kept_bytes`, of a step that is computed."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_what_is_kept_is_told_within_a_quarter_and_not_too_low(step) -> None:
    trainee, lora, call = step
    weights = [*trainee.networks["unet"].parameters(), *lora.parameters()]
    real = kept_for_real(call, weights)
    assert real > 2**20
    assert 0.95 * real < kept_bytes(call, weights) < 1.25 * real


def test_blocks_computed_twice_keep_less_and_give_the_same(step) -> None:
    trainee, lora, call = step
    weights = list(trainee.networks["unet"].parameters())
    once = kept_bytes(call, weights)
    grads = []
    for blocks in ((), trainee.repeated):
        lora.zero_grad()
        with computed_twice(blocks):
            call().square().mean().backward()
            if blocks:
                assert kept_bytes(call, weights) < 0.5 * once
        grads.append([p.grad.clone() for p in lora.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all("forward" not in vars(block) for block in trainee.repeated)


def test_without_gradients_nothing_is_computed_twice() -> None:
    layer = nn.Linear(2, 2)
    with computed_twice([layer]), torch.no_grad():
        assert layer(torch.ones(1, 2)).shape == (1, 2)
