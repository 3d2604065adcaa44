"""Beginning with a picture, as diffusers does: which steps are left, where they begin, and what a mask keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

from sfumato.diffusion.path import VE
from sfumato.diffusion.schedules import NoiseLevels, beta_levels, beta_table, sigmas_for
from sfumato.sampling import sampler_named
from sfumato.tasks.latent import Origin, begin, keeping, steps_to_run


def scheduler(steps: int) -> EulerDiscreteScheduler:
    made = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    made.set_timesteps(steps)
    return made


def levels() -> NoiseLevels:
    return beta_levels(beta_table(), log=False)


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 100])
def test_as_many_steps_are_left(steps):
    pipeline = SimpleNamespace(scheduler=scheduler(steps))
    for hundredths in range(101):
        strength = hundredths / 100  # 0.29 of 100 is 28 in both, for 100 · 0.29 is a little less than 29
        _, left = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
        if left == 0 and strength > 0:
            continue  # diffusers stops here with an error as we do
        assert steps_to_run(steps, strength) == left


@pytest.mark.parametrize("strength", [0.3, 0.75, 0.95])
def test_sampling_begins_at_the_same_level_with_the_same_sample(agrees, strength):
    theirs = scheduler(20)
    pipeline = SimpleNamespace(scheduler=theirs)
    timesteps, left = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, 20, strength, "cpu")
    latent, noise = torch.randn(1, 4, 1, 6, 6), torch.randn(2, 4, 1, 6, 6)
    sigmas, x = begin(sigmas_for("normal", 20, levels()), Origin(latent, strength), noise, VE)
    assert len(sigmas) == left + 1
    torch.testing.assert_close(sigmas.float(), theirs.sigmas[-left - 1 :], atol=1e-5, rtol=1e-5)
    expected = theirs.add_noise(latent.expand_as(noise), noise, timesteps[:1].repeat(2))
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-5)
    agrees("where image to image begins", f"strength {strength}", x, expected, 1e-5,
           "diffusers EulerDiscreteScheduler")  # fmt: skip


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_mask_keeps_what_it_keeps_there(agrees, strength):
    """The loop of its inpainting pipeline for a network of four channels: after each step the kept part is put back
    at the level reached, under the noise the sample began with."""
    steps = 12
    theirs = scheduler(steps)
    pipeline = SimpleNamespace(scheduler=theirs)
    timesteps, left = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    torch.manual_seed(0)
    latent, noise = torch.randn(1, 4, 1, 8, 8), torch.randn(2, 4, 1, 8, 8)
    cells = torch.zeros(1, 1, 1, 8, 8, dtype=torch.bool)
    cells[..., 2:6, 1:5] = True
    kernel = torch.randn(4, 4, 3, 3) / 6

    def clean(x: torch.Tensor, sigma: float) -> torch.Tensor:
        """A denoiser in which every cell looks at its neighbours, so that what is kept matters."""
        seen = torch.nn.functional.conv2d(x[:, :, 0] / (1 + sigma**2) ** 0.5, kernel, padding=1)[:, :, None]
        return torch.tanh(seen)

    x = theirs.add_noise(latent.expand_as(noise), noise, timesteps[:1].repeat(2))
    if strength == 1.0:
        x = noise * theirs.init_noise_sigma
        x = torch.where(cells, x, theirs.add_noise(latent.expand_as(noise), noise, timesteps[:1].repeat(2)))
    for i, t in enumerate(timesteps):
        theirs.scale_model_input(x, t)  # sets the step
        sigma = float(theirs.sigmas[theirs.step_index])
        eps = (x - clean(x, sigma)) / sigma
        x = theirs.step(eps, t, x).prev_sample
        kept = latent.expand_as(noise)
        if i + 1 < len(timesteps):
            kept = theirs.add_noise(kept, noise, timesteps[i + 1 : i + 2].repeat(2))
        x = torch.where(cells, x, kept)

    sigmas, start = begin(sigmas_for("normal", steps, levels()), Origin(latent, strength), noise, VE)
    denoise = keeping(lambda z, s: clean(z, float(s)), latent, cells, noise, VE)
    ours = sampler_named("euler")(denoise, start, sigmas, path=VE)
    assert len(sigmas) == left + 1
    agrees("a mask, 12 steps", f"strength {strength}", ours, x, 1e-5, "diffusers EulerDiscreteScheduler")
