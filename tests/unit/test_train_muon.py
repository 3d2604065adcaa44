"""Muon on stacks of matrices, against torch's, which steps from one to the next."""

from __future__ import annotations

import pytest
import torch

from sfumato.train.muon import Muon, orthogonalised

SHAPES = [(24, 16), (24, 16), (16, 24), (16, 16), (24, 16)]


def weights() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_steps_are_torchs_up_to_the_rounding_of_bfloat16():
    ours, theirs = weights(), weights()
    mine = Muon(ours, lr=0.1, weight_decay=0.2)
    peer = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        peer.step()
        for a, b, start in zip(ours, theirs, weights(), strict=True):
            moved = (b - start).norm()
            assert (
                a - b
            ).norm() < 0.05 * moved  # adding a to the middle factor rounds elsewhere than adding a·X does
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state[a]["momentum_buffer"], peer.state[b]["momentum_buffer"])


def test_what_has_no_gradient_stays():
    params = weights()
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    Muon(params, lr=0.1, weight_decay=0.2).step()
    assert torch.equal(params[1], before)


def test_state_goes_through_torchs_own_form():
    params = weights()
    optimizer = Muon(params, lr=0.1, weight_decay=0.0)
    set_gradients(params, 0)
    optimizer.step()
    other = Muon(params, lr=0.1, weight_decay=0.0)
    other.load_state_dict(optimizer.state_dict())
    for p in params:
        assert torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    out = orthogonalised(matrices, (3.4445, -4.7750, 2.0315), 5).float()
    assert out.shape == matrices.shape
    if shape[1] != shape[2]:  # square ones have singular values near 0, which take more steps
        values = torch.linalg.svdvals(out)
        assert values.min() > 0.6
        assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    exact = u @ v
    assert torch.nn.functional.cosine_similarity(out.flatten(1), exact.flatten(1)).min() > 0.9


def test_a_matrix_of_zeros_gives_zeros():
    assert not orthogonalised(torch.zeros(2, 4, 8), (3.4445, -4.7750, 2.0315), 5).any()
