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

import functools
import math

import pytest
import torch

from helpers import spelled
from scheduler_steps import (
    CLOSE,
    LEVELS,
    SD,
    STEPS,
    at_index,
    at_index_vp,
    compare_steps,
    fresh,
    our_steps,
    scheduler_in_double,
    their_steps,
)

diffusers = pytest.importorskip("diffusers")

from sfumato.diffusion.exact import TwoPeaks  # noqa: E402
from sfumato.diffusion.path import FLOW, VE, VP  # noqa: E402
from sfumato.diffusion.schedules import (  # noqa: E402
    SCHEDULES,
    NoiseLevels,
    beta_levels,
    beta_table,
    flow_levels,
    leading,
    shift_sigma,
    zero_terminal_snr,
)
from sfumato.families.sd import levels as sd  # noqa: E402
from sfumato.families.svd import system as svd  # noqa: E402
from sfumato.sampling.sde import brownian_share  # noqa: E402

FLOW_CONFIG = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.fixture
def scheduler(monkeypatch):
    """Build a diffusers scheduler in double precision that draws our noise, step k's at its k-th draw."""
    return functools.partial(scheduler_in_double, monkeypatch)


@pytest.fixture
def assert_same(agrees):
    """Equal step by step, and the last step noted down under the names of the test's sampler and scheduler."""

    def check(ours, theirs, sampler, scheduler, told="as it stands", broken_end=False):
        compare_steps(ours, theirs, broken_end)
        last = -2 if broken_end else -1
        name = f"diffusers {type(scheduler).__name__}"
        agrees(f"sampler {sampler}, {STEPS} steps", told, ours[last], theirs[last], 1e-8, name)

    return check


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
        (sd.ALIGNED, "StableDiffusion"),
        (sd.ALIGNED_XL, "StableDiffusionXL"),
        (svd.ALIGNED, "StableDiffusionVideo"),
    ]:
        assert list(ours[:10]) == tables[f"{theirs}Sigmas"][:10]
