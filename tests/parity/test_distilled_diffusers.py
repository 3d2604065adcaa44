"""Distilled models on their own grids against diffusers: latent consistency models, and the Turbos."""

from __future__ import annotations

import functools

import pytest
import torch

from scheduler_steps import CLOSE, LEVELS, SD, at_index, fresh, our_steps, scheduler_in_double, their_steps

diffusers = pytest.importorskip("diffusers")

from sfumato.diffusion.exact import TwoPeaks  # noqa: E402
from sfumato.diffusion.parameterization import Parameterization, consistency  # noqa: E402
from sfumato.diffusion.path import VE, VP  # noqa: E402
from sfumato.diffusion.schedules import SCHEDULES  # noqa: E402
from sfumato.families.sd.system import guidance_waves  # noqa: E402


@pytest.fixture
def scheduler(monkeypatch):
    """Build a diffusers scheduler in double precision that draws our noise, step k's at its k-th draw."""
    return functools.partial(scheduler_in_double, monkeypatch)


@pytest.fixture
def double_by_default():
    """LCMScheduler makes its boundary's factors from whole numbers, and so in torch's default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
def test_a_latent_consistency_model_on_its_own_grid(scheduler, double_by_default, steps):
    """The network of a VE model under its own boundary condition, by our grid, against diffusers' on VP."""
    noise = fresh()
    made = scheduler("LCMScheduler", noise, **SD)
    made.set_timesteps(steps)
    sigmas = SCHEDULES["lcm"](steps, LEVELS)
    assert LEVELS.time(sigmas[:-1]).round().tolist() == made.timesteps.tolist()
    if steps == 4:
        assert made.timesteps.tolist() == [999, 759, 499, 259]
    data = TwoPeaks(1.0, 0.3)

    def network(x, time, cond):  # told x / sqrt(1 + sigma²), answers eps
        sigma = LEVELS.step_sigma(time[:1].round())  # it comes in float32
        x = x * (1 + sigma**2).sqrt()
        return (x - data.denoiser(VE)(x, sigma[0])) / sigma

    denoise = Parameterization("eps", VE, LEVELS.time, consistency).denoiser(network, None)
    x = noise.initial()
    start = x * float((1 + sigmas[0] ** 2).sqrt())
    ours = our_steps("lcm", VE, denoise, start, sigmas, noise)
    ours = [x / float((1 + sigma**2).sqrt()) for x, sigma in zip(ours, sigmas[1:], strict=True)]
    seen = their_steps(
        made, VP, data.denoiser(VP), x, lambda made, t: float((1 - made.alphas_cumprod[t]).sqrt())
    )
    for k, (a, b) in enumerate(zip(ours, seen, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, k=k: f"step {k}: {m}")


def test_the_boundary_of_a_consistency_model():
    """At time 0 it answers with the sample; at its latest steps with the estimate."""
    made = diffusers.LCMScheduler(**SD)
    for time in (0, 1, 19, 259, 999):
        assert consistency(float(time)) == pytest.approx(
            made.get_scalings_for_boundary_condition_discrete(time), rel=1e-12
        )
    assert consistency(0.0) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo_models_on_their_grid(scheduler, steps):
    """SD-Turbo and SDXL-Turbo: ancestral Euler on trailing time steps."""
    noise = fresh()
    made = scheduler("EulerAncestralDiscreteScheduler", noise, **SD, timestep_spacing="trailing")
    made.set_timesteps(steps)
    made.set_begin_index(0)
    sigmas = SCHEDULES["trailing"](steps, LEVELS)
    assert made.timesteps.tolist() == [1000 // steps * (steps - k) - 1 for k in range(steps)]
    torch.testing.assert_close(sigmas, made.sigmas.double(), **CLOSE)
    data, x = TwoPeaks(1.0, 0.3), noise.initial() * sigmas[0]
    theirs = their_steps(made, VE, data.denoiser(VE), x, at_index)
    ours = our_steps("euler_a", VE, data.denoiser(VE), x, sigmas, noise)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, k=k: f"step {k}: {m}")


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("scale", [1.0, 1.5, 8.0, 14.0])
def test_the_guidance_as_a_network_is_told_it(agrees, width, scale):
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1]), width
    )
    ours, reference = guidance_waves(scale, width), "diffusers LatentConsistencyModelPipeline"
    agrees("guidance as an LCM is told it", f"width {width}", ours, theirs, 1e-5, reference)
