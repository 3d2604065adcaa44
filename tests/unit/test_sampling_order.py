"""Every sampler against exact solutions, on every path, and its order of convergence measured.

Deterministic samplers solve the ODE of `TwoPeaks`, whose denoiser is nonlinear and whose solution keeps quantiles.
Stochastic samplers run on `Gaussian`: there a sampler is affine in its input and in each noise it draws, so a batch
whose rows are the unit vectors of all these gives its output's mean and deviation without any sampling error.
"""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.diffusion.exact import Gaussian, TwoPeaks
from sfumato.diffusion.path import FLOW, VE, VP
from sfumato.sampling import SAMPLERS, ddim, dpmpp_2m, euler, heun

ENDS = {"ve": (8.0, 0.15), "vp": (0.99, 0.15), "flow": (0.95, 0.15)}
ODE = [
    ("euler", {}, 1),
    ("ddim", {}, 1),
    ("euler_a", {"eta": 0.0}, 1),
    ("heun", {}, 2),
    ("dpm2", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "variant": "heun"}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_2s_a", {"eta": 0.0}, 2),
    ("lms", {"order": 1}, 1),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {}, 4),
    ("unipc", {"order": 1}, 2),
    ("unipc", {}, 3),
    ("unipc", {"variant": "bh1"}, 3),
    ("unipc", {"order": 3}, 4),
    ("unipc", {"order": 2, "corrector": False}, 2),
    ("unipc", {"order": 3, "corrector": False}, 3),
]
SDE = [
    ("euler_a", {}, 1),
    ("euler_a", {"eta": 0.5}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "large"}, 1),
    ("dpmpp_2s_a", {}, 2),
    ("dpmpp_2s_a", {"eta": 0.5}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.4}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, 2),
    ("dpmpp_2m_sde", {"variant": "heun"}, 2),
    ("heun", {"churn": 8.0, "churn_range": (0.2, 5.0)}, 2),
]


def grid(path, steps, high, low, power=1):
    """From high to low, even in sigma on FLOW and in lambda elsewhere; power 2 makes the first steps short, so that
    the low-order start of a multistep method does not hide its order."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** power
    if path is FLOW:
        return high + (low - high) * u
    a, b = path.half_log_snr(high), path.half_log_snr(low)
    return path.sigma_at(a + (b - a) * u)


def ode_error(name, options, path, steps):
    data = TwoPeaks()
    high, low = ENDS[path.name]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 1, 1, 9) * max(high, 1.0)
    y = SAMPLERS[name](
        data.denoiser(path), x, grid(path, steps, high, low, 2), path=path, noise=None, **options
    )
    return float((y - data.carry(path, x, high, low)).abs().mean())


def moments(name, options, path, sigmas, data):
    """Mean and standard deviation of the sampler's output when its input has the exact marginal of sigmas[0]."""
    steps = len(sigmas) - 1
    x = torch.zeros(2 + 2 * steps, 1, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step, draw=0):
        row = torch.zeros_like(x)
        row[2 + 2 * step + draw] = 1
        return row

    y = SAMPLERS[name](data.denoiser(path), x, sigmas, path=path, noise=noise, **options).flatten()
    gains = y[1:] - y[0]
    mean, std = data.marginal(path, float(sigmas[0]))
    return float(y[0] + gains[0] * mean), math.hypot(float(gains[0]) * std, float(gains[1:].norm()))


def named(case):
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize(("name", "options", "order"), ODE, ids=[named(c) for c in ODE])
def test_ode_order(name, options, order, path):
    coarse, fine = ode_error(name, options, path, 64), ode_error(name, options, path, 128)
    measured = math.log2(coarse / fine)
    assert order - 0.3 < measured < order + 0.45
    assert fine < 0.015


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize(("name", "options", "order"), SDE, ids=[named(c) for c in SDE])
def test_sde_reaches_the_distribution(name, options, order, path):
    data = Gaussian(0.7, 0.5)
    high, low = {"ve": (10.0, 0.05), "vp": (0.995, 0.05), "flow": (0.97, 0.05)}[path.name]
    mean, std = data.marginal(path, low)
    errors = []
    for steps in (64, 128):
        m, s = moments(name, options, path, grid(path, steps, high, low), data)
        assert m == pytest.approx(mean, abs=1e-12)  # the mean is exact at any step count
        errors.append(abs(s - std))
    assert order - 0.3 < math.log2(errors[0] / errors[1]) < order + 0.3
    assert errors[1] < (0.012 if order == 1 else 0.001)


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))
def test_from_the_noisiest_level_to_zero(name, path):
    """The whole way, with the ends where lambda is infinite: sigma 1 without signal on VP and FLOW, sigma 0 on all."""
    data = Gaussian(0.7, 0.5)
    if path is FLOW:
        sigmas = torch.linspace(1, 0, 101, dtype=torch.float64)
    else:
        inner = path.sigma_at(torch.linspace(-4.4, 3.9, 100, dtype=torch.float64))
        sigmas = torch.cat([torch.tensor([1.0] if path is VP else []), inner, torch.zeros(1)])
    m, s = moments(name, {}, path, sigmas, data)
    assert m == pytest.approx(data.mean, abs=1e-11)
    assert s == pytest.approx(data.std, abs=0.03)


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)
def test_lcm_is_exact_with_a_consistency_function(path):
    """Given the ODE's own end point, consistency sampling yields the data's distribution at any number of steps."""
    data = Gaussian(0.7, 0.5)
    high = ENDS[path.name][0]

    def jump_to_the_end(x, sigma):
        return data.carry(path, x, float(sigma), 0.0)

    sigmas = torch.tensor([high, 0.6 * high, 0.2 * high, 0.0], dtype=torch.float64)
    x = torch.zeros(2 + 6, 1, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step, draw=0):
        row = torch.zeros_like(x)
        row[2 + 2 * step + draw] = 1
        return row

    y = SAMPLERS["lcm"](jump_to_the_end, x, sigmas, path=path, noise=noise).flatten()
    gains = y[1:] - y[0]
    mean, std = data.marginal(path, high)
    assert float(y[0] + gains[0] * mean) == pytest.approx(data.mean, abs=1e-12)
    assert math.hypot(float(gains[0]) * std, float(gains[1:].norm())) == pytest.approx(data.std, abs=1e-12)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_ve_and_vp_are_the_same_process(name):
    """A VP sample is the VE sample divided by sqrt(1 + sigma²), for every sampler and its noise."""
    data = TwoPeaks()
    sigmas = torch.tensor([12.0, 5.0, 2.0, 0.9, 0.3, 0.0], dtype=torch.float64)
    vp_sigmas = sigmas / (1 + sigmas**2).sqrt()
    x = torch.linspace(-20, 20, 7, dtype=torch.float64).view(1, 1, 1, 1, 7)

    def noise(step, draw=0):
        return torch.sin(torch.arange(7, dtype=torch.float64) * (step + 1) + draw).view(x.shape)

    ve = SAMPLERS[name](data.denoiser(VE), x, sigmas, path=VE, noise=noise)
    vp = SAMPLERS[name](data.denoiser(VP), x / math.sqrt(1 + 144), vp_sigmas, path=VP, noise=noise)
    torch.testing.assert_close(ve, vp, rtol=1e-9, atol=1e-9)


def test_equal_names_for_equal_things():
    """DDIM is Euler on every path; DDPM is Euler's ancestral chain; the 2M SDE without noise is 2M; churn 0 is Heun."""
    data = TwoPeaks()
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).view(1, 1, 1, 1, 7)

    def noise(step, draw=0):
        return torch.cos(torch.arange(7, dtype=torch.float64) * (step + 2)).view(x.shape)

    sigmas = torch.tensor([0.98, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    for path in (VE, VP, FLOW):
        d = data.denoiser(path)
        assert torch.equal(ddim(d, x, sigmas, path=path), euler(d, x, sigmas, path=path))
        chain = SAMPLERS["euler_a"](d, x, sigmas, path=path, noise=noise)
        torch.testing.assert_close(
            SAMPLERS["ddpm"](d, x, sigmas, path=path, noise=noise), chain, rtol=1e-12, atol=1e-12
        )
        two_m = dpmpp_2m(d, x, sigmas, path=path)
        still = SAMPLERS["dpmpp_2m_sde"](d, x, sigmas, path=path, eta=0.0)
        torch.testing.assert_close(still, two_m, rtol=1e-12, atol=1e-12)
        assert torch.equal(heun(d, x, sigmas, path=path, churn=0.0), heun(d, x, sigmas, path=path))
