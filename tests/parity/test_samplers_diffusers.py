"""Every sampler against the diffusers scheduler of the same method: its levels, then each of its steps.

diffusers computes in float32 throughout; here its modules see a torch and a numpy whose float32 is float64, so that
agreement to 1e-8 can be asked. Both sides get one analytic denoiser and the same noise.

Known differences, none of which is a matter of rounding:
- diffusers interpolates sigma between time steps, k-diffusion log sigma; `NoiseLevels(log=False)` is the former.
- Multistep DPM-Solver++ and UniPC put their `linspace` on N + 1 points and drop the last, so it is `sgm_uniform` with
  rounded time steps; on flow grids UniPC starts at 1 − 1e-6. They work on VP, the others on VE.
- FlowMatchEuler applies the shift to sigma_min too, so its grid ends at shift(shift(1/1000)), not at an even 1/N.
- DDIM ends at alpha_bar_0 unless set_alpha_to_one. DDPM would draw noise of variance 1e-20 for a step to sigma 0.
- LCM mixes x into x0_hat by its boundary condition; that belongs to the model, so here the denoiser does it
  (`parameterization.consistency`).
- UniPC with bh1 gives NaN on a step to sigma 0 (infinite h times 0); the step before is the last to compare.
- FlowMatchLCM and EulerAncestral draw noise at the last step too, and multiply it by 0.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from helpers import spelled

diffusers = pytest.importorskip("diffusers")

from sfumato.diffusion.exact import TwoPeaks  # noqa: E402
from sfumato.diffusion.parameterization import Parameterization, consistency  # noqa: E402
from sfumato.diffusion.path import FLOW, VE, VP  # noqa: E402
from sfumato.diffusion.schedules import (  # noqa: E402
    AYS,
    SCHEDULES,
    NoiseLevels,
    beta_levels,
    beta_table,
    flow_levels,
    leading,
    shift_sigma,
    zero_terminal_snr,
)
from sfumato.sampling import SAMPLERS, SeededNoise  # noqa: E402
from sfumato.sampling.sde import brownian_share  # noqa: E402

STEPS = 10
SHAPE = (2, 3, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW_CONFIG = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LEVELS = NoiseLevels(beta_levels(beta_table()).sigmas, log=False)
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture
def scheduler(monkeypatch):
    """Build a diffusers scheduler in double precision that draws our noise, step k's at its k-th draw."""

    def build(name, noise=None, **config):
        cls = getattr(diffusers, name)
        module = sys.modules[cls.__module__]
        monkeypatch.setattr(module, "torch", Double(torch))
        monkeypatch.setattr(module, "np", Double(np))
        if noise is not None and hasattr(module, "randn_tensor"):
            count = iter(range(1000))
            monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise(next(count)))
        made = cls(**config)
        made.set_timesteps(STEPS)
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(0)
        return made

    return build


def their_steps(made, path, denoise, x, level, **step_options):
    """x after each call of `step`; the network's answer is eps, or the velocity on FLOW, at level(scheduler)."""
    seen = []
    for t in made.timesteps:
        sigma = level(made, t)
        denoised = denoise(x, torch.tensor(sigma, dtype=torch.float64))
        alpha = 1.0 if path is FLOW else path.alpha(sigma)  # velocity (x − x0)/sigma, or eps
        x = made.step((x - alpha * denoised) / sigma, t, x, **step_options).prev_sample
        seen.append(x)
    return seen


def our_steps(name, path, denoise, x, sigmas, noise, **options):
    seen = []
    SAMPLERS[name](denoise, x, sigmas, path=path, noise=noise, on_step=lambda s: seen.append(s.x), **options)
    return seen


@pytest.fixture
def assert_same(agrees):
    """Equal step by step, and the last step noted down under the names of the test's sampler and scheduler."""

    def check(ours, theirs, sampler, scheduler, told="as it stands", broken_end=False):
        compare_steps(ours, theirs, broken_end)
        last = -2 if broken_end else -1
        name = f"diffusers {type(scheduler).__name__}"
        agrees(f"sampler {sampler}, {STEPS} steps", told, ours[last], theirs[last], 1e-8, name)

    return check


def compare_steps(ours, theirs, broken_end=False):
    assert len(ours) == len(theirs)
    assert torch.isfinite(ours[-1]).all()
    if broken_end:
        assert torch.isnan(theirs[-1]).all()
        ours, theirs = ours[:-1], theirs[:-1]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, i=i: f"step {i}: {m}")
    assert float((ours[-1] - ours[0]).abs().max()) > 0.1


def fresh():
    return SeededNoise([3, 4], SHAPE, dtype=torch.float64)


def at_index(made, _):
    return float(made.sigmas[made.step_index or 0])


def at_index_vp(made, _):
    return VP.from_ratio(float(made.sigmas[made.step_index or 0]))


VE_ONE_CALL = [
    ("euler", "EulerDiscreteScheduler", "normal", {}),
    ("euler", "EulerDiscreteScheduler", "trailing", {"timestep_spacing": "trailing"}),
    ("euler", "EulerDiscreteScheduler", "leading", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("euler", "EulerDiscreteScheduler", "karras", {"use_karras_sigmas": True}),
    ("euler", "EulerDiscreteScheduler", "exponential", {"use_exponential_sigmas": True}),
    ("euler_a", "EulerAncestralDiscreteScheduler", "normal", {}),
    ("lms", "LMSDiscreteScheduler", "normal", {}),
    ("lms", "LMSDiscreteScheduler", "karras", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("name", "theirs", "schedule", "config"), VE_ONE_CALL)
@pytest.mark.filterwarnings("ignore:The `scale_model_input` function")
def test_ve(scheduler, assert_same, name, theirs, schedule, config):
    noise = fresh()
    made = scheduler(theirs, noise, **SD, **config)
    sigmas = SCHEDULES[schedule](STEPS, LEVELS)
    torch.testing.assert_close(sigmas, made.sigmas, **CLOSE)
    data = TwoPeaks(1.0, 0.3)
    x = noise.initial() * float(sigmas[0])
    seen = their_steps(made, VE, data.denoiser(VE), x, at_index)
    assert_same(our_steps(name, VE, data.denoiser(VE), x, sigmas, noise), seen, name, made, f"VE, {schedule}")


def test_scale_of_the_first_noise(scheduler):
    """init_noise_sigma is our prior_scale: with data deviation 1 on the leading grid, 0 elsewhere."""
    for config, std in [({"timestep_spacing": "leading", "steps_offset": 1}, 1.0), ({}, 0.0)]:
        made = scheduler("EulerDiscreteScheduler", **SD, **config)
        assert VE.prior_scale(float(made.sigmas[0]), std) == pytest.approx(
            float(made.init_noise_sigma), rel=1e-9
        )
    assert scheduler("DDIMScheduler", **SD).init_noise_sigma == VP.prior_scale(0.99767, 1.0)


def test_time_steps_of_a_karras_grid_are_rounded_by_some(scheduler):
    """The network is told a whole step by DPMSolverMultistep, and the level's own place by Euler and by us."""
    rounded = scheduler("DPMSolverMultistepScheduler", **SD, use_karras_sigmas=True).timesteps
    exact = scheduler("EulerDiscreteScheduler", **SD, use_karras_sigmas=True).timesteps
    assert (rounded == rounded.round()).all() and (exact != exact.round()).any()
    ours = LEVELS.time(SCHEDULES["karras"](STEPS, LEVELS)[:-1])
    assert (ours != ours.round()).any()
    torch.testing.assert_close(ours, rounded.double(), rtol=0, atol=1.0)


@pytest.mark.parametrize("karras", [False, True])
def test_ve_heun(scheduler, assert_same, karras):
    made = scheduler("HeunDiscreteScheduler", **SD, use_karras_sigmas=karras)
    sigmas = SCHEDULES["karras" if karras else "normal"](STEPS, LEVELS)
    assert len(made.timesteps) == 2 * STEPS - 1
    torch.testing.assert_close(sigmas, torch.cat([made.sigmas[:1], made.sigmas[1::2]]), **CLOSE)
    data, noise = TwoPeaks(1.0, 0.3), fresh()
    x = noise.initial() * float(sigmas[0])
    theirs = their_steps(made, VE, data.denoiser(VE), x, at_index)
    assert_same(
        our_steps("heun", VE, data.denoiser(VE), x, sigmas, noise),
        [*theirs[1::2], theirs[-1]],
        "heun",
        made,
        f"VE, {'karras' if karras else 'normal'}",
    )


def test_ve_dpm2(scheduler, assert_same):
    made = scheduler("KDPM2DiscreteScheduler", **SD)
    sigmas = SCHEDULES["normal"](STEPS, LEVELS)
    data, noise = TwoPeaks(1.0, 0.3), fresh()
    x = noise.initial() * float(sigmas[0])

    def level(made, _):
        i = made.step_index or 0
        return float(made.sigmas[i] if made.state_in_first_order else made.sigmas_interpol[i])

    theirs = their_steps(made, VE, data.denoiser(VE), x, level)
    assert_same(
        our_steps("dpm2", VE, data.denoiser(VE), x, sigmas, noise),
        [*theirs[1::2], theirs[-1]],
        "dpm2",
        made,
        "VE, normal",
    )


def test_ve_dpmpp_sde(scheduler, assert_same):
    pytest.importorskip("torchsde")
    made = scheduler("DPMSolverSDEScheduler", **SD, use_karras_sigmas=True)
    sigmas = SCHEDULES["karras"](STEPS, LEVELS)
    data, noise = TwoPeaks(1.0, 0.3), fresh()
    x = noise.initial() * float(sigmas[0])

    def brownian(sigma, sigma_next):
        i = int((sigmas - sigma).abs().argmin())
        start, end = float(sigmas[i]), float(sigmas[i + 1])
        if abs(float(sigma_next) - end) > 1e-9:
            return noise(i)
        share = brownian_share(VE, start, math.sqrt(start * end), end)
        return math.sqrt(share) * noise(i) + math.sqrt(1 - share) * noise(i, 1)

    made.noise_sampler = brownian

    def level(made, _):
        return at_index(made, None) if made.state_in_first_order else float(made.mid_point_sigma)

    theirs = their_steps(made, VE, data.denoiser(VE), x, level)
    assert_same(
        our_steps("dpmpp_sde", VE, data.denoiser(VE), x, sigmas, noise),
        [*theirs[1::2], theirs[-1]],
        "dpmpp_sde",
        made,
        "VE, karras",
    )


MULTISTEP = [
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    (
        "dpmpp_2m_sde",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"variant": "heun"},
    ),
    ("euler", "DPMSolverMultistepScheduler", {"solver_order": 1}, {}),
    ("unipc", "UniPCMultistepScheduler", {}, {}),
    ("unipc", "UniPCMultistepScheduler", {"solver_type": "bh1"}, {"variant": "bh1"}),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}, {"order": 3}),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 1}, {"order": 1}),
    (
        "unipc",
        "UniPCMultistepScheduler",
        {"disable_corrector": list(range(STEPS))},
        {"corrector": False},
    ),
]


@pytest.mark.parametrize("grid", ["linspace", "trailing", "karras"])
@pytest.mark.parametrize(("name", "theirs", "config", "options"), MULTISTEP)
def test_vp_multistep(scheduler, assert_same, name, theirs, config, options, grid):
    noise = fresh()
    spacing = {"use_karras_sigmas": True} if grid == "karras" else {"timestep_spacing": grid}
    made = scheduler(theirs, noise, **SD, **config, **spacing)
    if grid == "linspace":
        places = torch.linspace(999, 0, STEPS + 1, dtype=torch.float64)[:-1].round()
        sigmas = torch.cat([LEVELS.step_sigma(places), torch.zeros(1)])
    else:
        sigmas = SCHEDULES[grid](STEPS, LEVELS)
    torch.testing.assert_close(sigmas, made.sigmas, **CLOSE)
    sigmas = VP.from_ratio(sigmas)
    data, x = TwoPeaks(1.0, 0.3), noise.initial()
    seen = their_steps(made, VP, data.denoiser(VP), x, at_index_vp)
    ours = our_steps(name, VP, data.denoiser(VP), x, sigmas, noise, **options)
    assert_same(
        ours,
        seen,
        name,
        made,
        f"VP, {spelled(options)}",
        broken_end=options == {"variant": "bh1"},
    )


@pytest.mark.parametrize(("name", "theirs", "config", "options"), MULTISTEP)
def test_flow_multistep(scheduler, assert_same, name, theirs, config, options):
    """On flow levels, from sigma 1, where lambda is −inf (UniPC puts itself at 1 − 1e-6)."""
    noise = fresh()
    made = scheduler(theirs, noise, **FLOW_CONFIG, **config, flow_shift=3.0)
    sigmas = made.sigmas.double()
    data, x = TwoPeaks(1.0, 0.3), noise.initial()
    seen = their_steps(made, FLOW, data.denoiser(FLOW), x, at_index)
    ours = our_steps(name, FLOW, data.denoiser(FLOW), x, sigmas, noise, **options)
    assert_same(
        ours,
        seen,
        name,
        made,
        f"FLOW, {spelled(options)}",
        broken_end=options == {"variant": "bh1"},
    )


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_vp_ddim(scheduler, assert_same, eta, to_one):
    noise = fresh()
    made = scheduler("DDIMScheduler", noise, **SD, clip_sample=False, steps_offset=1, set_alpha_to_one=to_one)
    sigmas = VP.from_ratio(SCHEDULES["leading"](STEPS, LEVELS))
    if not to_one:
        sigmas[-1] = VP.from_ratio(LEVELS.sigma_min)

    def level(made, t):
        return float((1 - made.alphas_cumprod[t]).sqrt())

    data, x = TwoPeaks(1.0, 0.3), noise.initial()
    seen = their_steps(made, VP, data.denoiser(VP), x, level, eta=eta)
    assert_same(
        our_steps("ddim", VP, data.denoiser(VP), x, sigmas, noise, eta=eta),
        seen,
        "ddim",
        made,
        f"VP, eta {eta}",
    )


@pytest.mark.parametrize("variance", ["small", "large"])
def test_vp_ddpm(scheduler, assert_same, variance):
    noise = fresh()
    made = scheduler("DDPMScheduler", noise, **SD, clip_sample=False, variance_type=f"fixed_{variance}")
    sigmas = VP.from_ratio(leading(STEPS, LEVELS, offset=0))

    def level(made, t):
        return float((1 - made.alphas_cumprod[t]).sqrt())

    data, x = TwoPeaks(1.0, 0.3), noise.initial()
    seen = their_steps(made, VP, data.denoiser(VP), x, level)
    assert_same(
        our_steps("ddpm", VP, data.denoiser(VP), x, sigmas, noise, variance=variance),
        seen,
        "ddpm",
        made,
        f"VP, variance {variance}",
    )


def test_vp_lcm(scheduler, assert_same):
    noise = fresh()
    made = scheduler("LCMScheduler", noise, **SD, clip_sample=False)
    alpha_bar = made.alphas_cumprod[made.timesteps]
    sigmas = torch.cat([(1 - alpha_bar).sqrt(), torch.zeros(1)])
    data, x = TwoPeaks(1.0, 0.3), noise.initial()

    def with_boundary(x, sigma):
        t = made.timesteps[(sigmas[:-1] - sigma).abs().argmin()]
        c_skip, c_out = made.get_scalings_for_boundary_condition_discrete(t)
        return c_out * data.denoiser(VP)(x, sigma) + c_skip * x

    seen = their_steps(
        made, VP, data.denoiser(VP), x, lambda made, t: float((1 - made.alphas_cumprod[t]).sqrt())
    )
    assert_same(our_steps("lcm", VP, with_boundary, x, sigmas, noise), seen, "lcm", made, "VP")


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


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "theirs"), [("euler", "FlowMatchEulerDiscreteScheduler"), ("lcm", "FlowMatchLCMScheduler")]
)
def test_flow(scheduler, assert_same, name, theirs, shift):
    noise = fresh()
    made = scheduler(theirs, noise, shift=shift)
    twice = shift_sigma(
        torch.linspace(1, float(flow_levels(shift).sigmas[0]), STEPS, dtype=torch.float64), shift
    )
    torch.testing.assert_close(made.sigmas, torch.cat([twice, torch.zeros(1)]), **CLOSE)
    data, x = TwoPeaks(1.0, 0.3), noise.initial()
    seen = their_steps(made, FLOW, data.denoiser(FLOW), x, at_index)
    assert_same(
        our_steps(name, FLOW, data.denoiser(FLOW), x, made.sigmas, noise),
        seen,
        name,
        made,
        f"FLOW, shift {shift}",
    )


def test_flow_heun(scheduler, assert_same):
    made = scheduler("FlowMatchHeunDiscreteScheduler", shift=3.0)
    sigmas = torch.cat([made.sigmas[:1], made.sigmas[1::2]]).double()
    data, noise = TwoPeaks(1.0, 0.3), fresh()
    x = noise.initial()
    theirs = their_steps(made, FLOW, data.denoiser(FLOW), x, at_index)
    assert_same(
        our_steps("heun", FLOW, data.denoiser(FLOW), x, sigmas, noise),
        [*theirs[1::2], theirs[-1]],
        "heun",
        made,
        "FLOW, shift 3",
    )


def test_tables(scheduler):
    """Beta tables, zero terminal SNR and Align Your Steps, against diffusers' own."""
    for kind, theirs in [
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
    ]:
        made = scheduler("DDIMScheduler", beta_start=0.0003, beta_end=0.015, beta_schedule=theirs)
        torch.testing.assert_close(beta_table(kind, 0.0003, 0.015), made.betas, **CLOSE)
    made = scheduler("EulerDiscreteScheduler", **SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    levels = NoiseLevels(beta_levels(zero_terminal_snr(beta_table())).sigmas, log=False)
    torch.testing.assert_close(SCHEDULES["trailing"](STEPS, levels), made.sigmas, rtol=1e-6, atol=1e-8)
    tables = diffusers.schedulers.AysSchedules
    for ours, theirs in [
        ("sd", "StableDiffusion"),
        ("sdxl", "StableDiffusionXL"),
        ("svd", "StableDiffusionVideo"),
    ]:
        assert list(AYS[ours][:10]) == tables[f"{theirs}Sigmas"][:10]
