"""What a training step of the denoiser draws, and what it must not depend on."""

from __future__ import annotations

import torch

from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import FLOW
from sfumato.train.denoiser import Batch, denoiser_loss
from sfumato.train.loop import seeded
from sfumato.train.recipe import DenoiserLoss


def test_noise_levels_cover_a_batch_and_no_place_in_it_has_its_own():
    """A step's pictures are sorted by the length of their prompts: place and noise must be strangers."""
    size, seen = 8, []

    def net(x, time, ids, mask):
        seen.append(time)
        return torch.zeros_like(x), None

    batch = Batch(torch.zeros(size, 1, 1, 2, 2), torch.zeros(size, 1), torch.ones(size, 1).bool(), None)
    recipe = DenoiserLoss(density="uniform")
    for step in range(400):
        denoiser_loss(net, batch, Parameterization("flow", FLOW), recipe, seeded("cpu", step))
    levels = torch.stack(seen)  # (steps, places)
    assert (levels.mean(0) - 0.5).abs().max() < 0.06  # four standard deviations
    counts = torch.stack([torch.histc(row, size, 0, 1) for row in levels])
    assert (counts == 1).all()  # one in each eighth
