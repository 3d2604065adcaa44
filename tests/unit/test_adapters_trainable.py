"""Factors beside frozen layers: what they add, that the base stays, and that a file holds what acted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sfumato.adapters.delta import folded
from sfumato.adapters.names import Share
from sfumato.adapters.trainable import TrainedLora, chosen, layers_of, written
from sfumato.errors import InputError


class Small(nn.Module):
    """A convolution with a stride, and products with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.to_q = nn.Linear(8, 6, bias=False)
        self.out = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        return self.out(torch.tanh(self.to_q(h)))


def made(dora: bool, seed: int = 0) -> tuple[Small, TrainedLora, torch.Tensor]:
    """A network, a LoRA with numbers in all its factors, and an input."""
    torch.manual_seed(seed)
    net = Small().requires_grad_(False)
    lora = TrainedLora(dict(layers_of(net)), rank=3, alpha=1.5, dora=dora)
    with torch.no_grad():
        for _, own in lora.named_factors():
            own.up.normal_(std=0.3)
            if own.magnitude is not None:
                own.magnitude.mul_(torch.rand(len(own.magnitude)) + 0.5)
    return net, lora, torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("dora", [False, True])
def test_factors_act_as_their_difference_folded_into_the_weights(dora: bool) -> None:
    net, lora, x = made(dora)
    hooked = lora(net, x)
    plain = copy.deepcopy(net)
    for module in plain.modules():
        module._forward_hooks.clear()
    for path, own in lora.named_factors():
        layer = plain.get_submodule(path)
        layer.weight.copy_(folded(layer.weight, [(1.0, own.delta())]))
    with lora.aside():
        base = net(x)
    assert (hooked - base).norm() > 0.1 * base.norm()
    torch.testing.assert_close(hooked, plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_one_changes_nothing_and_the_base_never_changes(dora: bool) -> None:
    torch.manual_seed(1)
    net, x = Small().requires_grad_(False), torch.randn(2, 3, 8, 8)
    before, answer = copy.deepcopy(net.state_dict()), net(x)
    lora = TrainedLora(dict(layers_of(net)), rank=2, alpha=2.0, dora=dora)
    torch.testing.assert_close(net(x), answer, rtol=0, atol=1e-6 if dora else 0)
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        lora(net, x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(net(x), answer)
    assert all(p.grad is None for p in net.parameters())
    lora.detach()
    assert torch.equal(net(x), answer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_targets_are_presets_or_patterns() -> None:
    layers = dict(layers_of(Small()))
    assert list(chosen(layers, "all")) == ["conv", "to_q", "out"]
    assert list(chosen(layers, "attention")) == ["to_q"]
    assert list(chosen(layers, ["out", "c*"])) == ["conv", "out"]
    with pytest.raises(InputError, match=r"no layer answers to the target 'to_z'.*attention.*'to_q'"):
        chosen(layers, ["to_z"])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_is_read_as_what_acted(layout: str, dora: bool) -> None:
    from sfumato.adapters.lora import delta_of
    from sfumato.adapters.roles import group

    _, lora, _ = made(dora)
    for path, own in lora.named_factors():
        tensors = written([(own, Share(path))], layout)
        modules, unknown, again = group(tensors)
        assert not unknown and not again and list(modules) == [path]
        found, bias = delta_of({role: tensors[key] for role, key in modules[path].tensors.items()})
        assert found is not None and bias is None
        shape = (len(own.up), *own.down.shape[1:])
        base = torch.randn(shape)
        torch.testing.assert_close(folded(base, [(1.0, found)]), folded(base, [(1.0, own.delta())]))
