"""Every sampler that k-diffusion has, step by step on VE, in float64, with the same noise; and its schedules.

k-diffusion reports x at the start of a step and we report it at the end, so its report i + 1 is our report i.
Its noise samplers are given our noise. For `sample_dpmpp_sde` that noise must be one Brownian motion per step, as its
own default is: the increment over a whole step contains the increment to the middle.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers import spelled

K = pytest.importorskip("k_diffusion.sampling")

from sfumato.diffusion.exact import TwoPeaks  # noqa: E402
from sfumato.diffusion.path import VE  # noqa: E402
from sfumato.diffusion.schedules import SCHEDULES, beta_levels, beta_table  # noqa: E402
from sfumato.sampling import SAMPLERS, SeededNoise  # noqa: E402

SHAPE = (2, 1, 3, 4)
LEVELS = beta_levels(beta_table())
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

CASES = [
    ("euler", {}, "sample_euler", {}),
    ("ddim", {}, "sample_euler", {}),
    ("euler_a", {}, "sample_euler_ancestral", {}),
    ("euler_a", {"eta": 0.4, "s_noise": 1.1}, "sample_euler_ancestral", {"eta": 0.4, "s_noise": 1.1}),
    ("ddpm", {}, "sample_euler_ancestral", {}),
    ("heun", {}, "sample_heun", {}),
    (
        "heun",
        {"churn": 4.0, "churn_range": (0.1, 8.0), "s_noise": 1.01},
        "sample_heun",
        {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.01},
    ),
    ("dpm2", {}, "sample_dpm_2", {}),
    ("lms", {}, "sample_lms", {}),
    ("lms", {"order": 2}, "sample_lms", {"order": 2}),
    ("dpmpp_2m", {}, "sample_dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}, "sample_dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.3, "s_noise": 0.9}, "sample_dpmpp_2m_sde", {"eta": 0.3, "s_noise": 0.9}),
    ("dpmpp_2m_sde", {"variant": "heun"}, "sample_dpmpp_2m_sde", {"solver_type": "heun"}),
    ("dpmpp_2s_a", {}, "sample_dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_a", {"eta": 0.5, "s_noise": 1.1}, "sample_dpmpp_2s_ancestral", {"eta": 0.5, "s_noise": 1.1}),
    ("dpmpp_sde", {}, "sample_dpmpp_sde", {}),
    (
        "dpmpp_sde",
        {"eta": 0.6, "r": 0.3, "s_noise": 1.1},
        "sample_dpmpp_sde",
        {"eta": 0.6, "r": 0.3, "s_noise": 1.1},
    ),
]


class Brownian:
    """Unit-variance increments over [sigma, sigma_next], made of the draws our samplers use."""

    def __init__(self, noise, sigmas):
        self.noise, self.sigmas = noise, [float(s) for s in sigmas]

    def __call__(self, sigma, sigma_next):
        i = min(range(len(self.sigmas)), key=lambda k: abs(self.sigmas[k] - float(sigma)))
        start, end, to = self.sigmas[i], self.sigmas[i + 1], float(sigma_next)
        if abs(to - end) > 1e-9 * start:
            self.middle = to
            return self.noise(i)
        if getattr(self, "middle", 0) <= end or self.middle >= start:
            return self.noise(i)
        share = (start - self.middle) / (start - end)
        return math.sqrt(share) * self.noise(i) + math.sqrt(1 - share) * self.noise(i, 1)


class TorchWithOurNoise:
    """torch, but its `randn_like` gives our noise of the steps in turn (k-diffusion's churn draws at every step)."""

    def __init__(self, noise):
        self.noise, self.step = noise, -1

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn_like(self, x):
        self.step += 1
        return self.noise(self.step)


@pytest.mark.parametrize("schedule", ["karras", "normal", "exponential"])
@pytest.mark.parametrize(
    ("name", "options", "theirs", "their_options"),
    CASES,
    ids=[f"{c[0]}-{len(c[1])}-{i}" for i, c in enumerate(CASES)],
)
def test_step_by_step(monkeypatch, agrees, name, options, theirs, their_options, schedule):
    sigmas = SCHEDULES[schedule](12, LEVELS)
    noise = SeededNoise([3, 4], SHAPE, dtype=torch.float64)
    x = noise.initial() * float(sigmas[0])
    data = TwoPeaks(1.0, 0.3)
    monkeypatch.setattr(K, "torch", TorchWithOurNoise(noise))
    reports = []
    extra = {"noise_sampler": Brownian(noise, sigmas)} if "ancestral" in theirs or "sde" in theirs else {}
    expected = getattr(K, theirs)(
        lambda x, sigma: data.denoiser(VE)(x, sigma),
        x,
        sigmas,
        callback=reports.append,
        disable=True,
        **extra,
        **their_options,
    )
    steps = []
    y = SAMPLERS[name](data.denoiser(VE), x, sigmas, path=VE, noise=noise, on_step=steps.append, **options)
    assert len(steps) == len(reports) == 12
    for i, step in enumerate(steps):
        torch.testing.assert_close(step.denoised, reports[i]["denoised"], **CLOSE)
        if "churn" not in options:  # with churn its report is already the churned x
            torch.testing.assert_close(step.x, reports[i + 1]["x"] if i + 1 < 12 else expected, **CLOSE)
    torch.testing.assert_close(y, expected, **CLOSE)
    agrees(f"sampler {name}, 12 steps", spelled(options), y, expected, 1e-8, f"k-diffusion {theirs}")
    assert float((y - x).abs().max()) > 1


def test_schedules(agrees):
    low, high = LEVELS.sigma_min, LEVELS.sigma_max
    single = {"rtol": 2e-6, "atol": 1e-6}  # k-diffusion builds these in float32
    for name in ("karras", "exponential"):
        ours, theirs = SCHEDULES[name](17, LEVELS).float(), getattr(K, f"get_sigmas_{name}")(17, low, high)
        torch.testing.assert_close(ours, theirs, **single)
        agrees(f"schedule {name}", "17 steps", ours, theirs, 1e-6, f"k-diffusion get_sigmas_{name}")


def test_discrete_schedule_and_time():
    """`normal`, and the map between levels and time steps, of k-diffusion's DiscreteSchedule."""
    external = pytest.importorskip("k_diffusion.external")
    theirs = external.DiscreteSchedule(LEVELS.sigmas, quantize=False).double()
    torch.testing.assert_close(
        SCHEDULES["normal"](13, LEVELS), theirs.get_sigmas(13).double(), rtol=1e-5, atol=1e-6
    )
    sigma = torch.tensor([0.03, 0.1, 1.0, 3.3, 14.0], dtype=torch.float64)
    torch.testing.assert_close(LEVELS.time(sigma), theirs.sigma_to_t(sigma), rtol=1e-9, atol=1e-9)
    time = torch.tensor([0.0, 0.5, 17.25, 998.9], dtype=torch.float64)
    torch.testing.assert_close(LEVELS.sigma(time), theirs.t_to_sigma(time), rtol=1e-6, atol=0)  # it rounds t
