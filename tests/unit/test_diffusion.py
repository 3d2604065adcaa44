"""Paths, parameterizations, guidance and training pairs: identities that hold for every path and prediction."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion.exact import Gaussian, TwoPeaks
from sfumato.diffusion.guidance import cfg, cfg_batched, rescaled
from sfumato.diffusion.parameterization import KINDS, Parameterization
from sfumato.diffusion.path import FLOW, PATHS, VE, VP, path_named
from sfumato.errors import InputError

ALL = pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
SHAPE = (4, 3, 1, 5, 6)


def draws(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(2))
    return x0, noise, 0.02 + 0.96 * torch.rand(SHAPE[0], generator=generator, dtype=dtype)


@ALL
@given(st.floats(1e-4, 0.9999))
def test_levels_and_their_inverses(path, sigma):
    """sigma → lambda → sigma, for floats and tensors alike; alpha² e^(−2 lambda) = sigma²."""
    lam = path.half_log_snr(sigma)
    assert path.sigma_at(lam) == pytest.approx(sigma, rel=1e-10)
    assert path.alpha(sigma) * math.exp(-lam) == pytest.approx(sigma, rel=1e-10)
    assert path.log_snr(sigma) == pytest.approx(2 * lam)
    tensor = torch.tensor([sigma], dtype=torch.float64)
    for method in (path.alpha, path.half_log_snr, path.log_snr, path.scale):
        assert float(method(tensor)) == pytest.approx(method(sigma), rel=1e-12, abs=1e-12)
    assert float(path.sigma_at(torch.tensor([lam], dtype=torch.float64))) == pytest.approx(sigma, rel=1e-10)


@ALL
def test_ends_of_a_path(path):
    assert path.alpha(0.0) == 1 and path.half_log_snr(0.0) == math.inf and path.sigma_at(math.inf) == 0
    assert path.from_ratio(0.0) == 0
    if path is not VE:
        assert path.alpha(1.0) == 0 and path.half_log_snr(1.0) == -math.inf and path.sigma_at(-math.inf) == 1
        assert path.from_ratio(math.inf) == 1
    edges = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert path.from_ratio(edges).tolist() == [0.0, math.inf if path is VE else 1.0]
    assert pickle.loads(pickle.dumps(path)) is path and path_named(path.name) is path


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="ve, vp, flow"):
        path_named("edm")
    with pytest.raises(InputError, match="eps, v, x, flow"):
        Parameterization("epsilon")


@ALL
def test_noisy_is_signal_plus_noise(path):
    x0, noise, sigma = draws()
    x = path.noisy(x0, noise, sigma)
    for k in range(len(x0)):
        expected = path.alpha(float(sigma[k])) * x0[k] + float(sigma[k]) * noise[k]
        torch.testing.assert_close(x[k], expected)
        torch.testing.assert_close(path.noisy(x0, noise, sigma[k])[k], expected)
    assert path.noisy(x0.float(), noise.float(), sigma).dtype == torch.float32


def test_prior_scales():
    assert VE.prior_scale(14.6) == 14.6
    assert VE.prior_scale(8.39069, data_std=1.0) == pytest.approx(math.hypot(8.39069, 1))
    assert VP.prior_scale(0.9977, data_std=1.0) == pytest.approx(1)
    assert FLOW.prior_scale(1.0) == FLOW.prior_scale(1.0, data_std=1.0) == 1


@ALL
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_gives_back_the_clean_sample(kind, path):
    """denoise with the training target as the network's answer is x0, for (B,) and scalar levels."""
    x0, noise, sigma = draws()
    p = Parameterization(kind, path)
    target = p.target(x0, noise, sigma)
    seen = []

    def network(x, time, cond):
        seen.append((x, time, cond))
        return target

    x = path.noisy(x0, noise, sigma)
    torch.testing.assert_close(p.denoiser(network, "told")(x, sigma), x0, rtol=1e-9, atol=1e-9)
    x_in, time, cond = seen[0]
    assert cond == "told" and time.shape == (SHAPE[0],) and time.dtype == torch.float32
    assert ((time >= 0) & (time <= 1)).all()
    # the input has unit variance when the data has, except on the flow network's own frame
    alpha = path.alpha(sigma)
    scale = 1 / (alpha + sigma) if kind == "flow" else (alpha**2 + sigma**2) ** -0.5
    torch.testing.assert_close(x_in, scale.view(-1, 1, 1, 1, 1) * x)

    level = sigma[0]
    target = p.target(x0, noise, level)
    x = path.noisy(x0, noise, level)
    torch.testing.assert_close(p.denoiser(network, None)(x, level), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.denoiser(network, None)(x.float(), level).double(), x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_may_be_run_on_another_path(kind):
    """One network, told its own input and time, is the same denoiser on VE, VP and FLOW once x is rescaled."""
    x0, noise, _ = draws()
    ratio = 0.8  # sigma / alpha

    def network(x, time, cond):
        return torch.sin(3 * x) + time.view(-1, 1, 1, 1, 1)

    answers = []
    for path in PATHS.values():
        sigma = path.from_ratio(ratio)
        x = path.noisy(x0, noise, sigma)
        answers.append(
            Parameterization(kind, path).denoiser(network, None)(x, torch.tensor(sigma, dtype=torch.float64))
        )
    torch.testing.assert_close(answers[1], answers[0])
    torch.testing.assert_close(answers[2], answers[0])


def test_definitions_of_the_papers():
    x0, noise, sigma = draws()
    s = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(Parameterization("flow", FLOW).target(x0, noise, sigma), noise - x0)
    torch.testing.assert_close(
        Parameterization("v", VP).target(x0, noise, sigma), (1 - s**2).sqrt() * noise - s * x0
    )
    torch.testing.assert_close(Parameterization("eps", VP).target(x0, noise, sigma), noise)
    # SD on VE: c_in = 1/sqrt(sigma² + 1); eps has c_skip 1, c_out −sigma; v has c_skip 1/(sigma² + 1)
    assert Parameterization("eps", VE).coefficients(3.0) == pytest.approx((1, -3, 10**-0.5))
    assert Parameterization("v", VE).coefficients(3.0) == pytest.approx((0.1, -3 / 10**0.5, 10**-0.5))
    assert Parameterization("flow", FLOW).coefficients(0.3) == pytest.approx((1, -0.3, 1))
    assert Parameterization("flow", FLOW).coefficients(1.0) == pytest.approx((1, -1, 1))
    assert Parameterization("v", VP).coefficients(1.0) == pytest.approx((0, -1, 1))


def test_time_can_be_replaced():
    told = []
    p = Parameterization("eps", VE, time=lambda sigma: 0.25 * sigma.log())
    p.denoiser(lambda x, time, cond: told.append(time) or x, None)(
        torch.zeros(2, 1, 1, 1, 1), torch.tensor(math.e)
    )
    torch.testing.assert_close(told[0], torch.full((2,), 0.25))


# guidance


def branches():
    return TwoPeaks(1.0, 0.4).denoiser(FLOW), Gaussian(0.0, 1.0).denoiser(FLOW)


def test_cfg_scales():
    cond, uncond = branches()
    x, sigma = draws()[0], torch.tensor(0.6, dtype=torch.float64)
    c, u = cond(x, sigma), uncond(x, sigma)
    assert torch.equal(cfg(cond, uncond, 1.0)(x, sigma), c)
    torch.testing.assert_close(cfg(cond, uncond, 0.0)(x, sigma), u)
    torch.testing.assert_close(cfg(cond, uncond, 5.0)(x, sigma), c + 4 * (c - u))
    frames = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(cfg(cond, uncond, frames)(x, sigma)[:, 2], u[:, 2] + 3 * (c - u)[:, 2])


def test_scale_one_and_the_outside_of_the_interval_cost_one_call():
    cond, _ = branches()

    def never(x, sigma):
        raise AssertionError("the unconditional branch was called")

    x = draws()[0]
    for scale, interval, level in [
        (1.0, (0.0, math.inf), 0.5),
        (4.0, (0.3, 0.7), 0.3),
        (4.0, (0.3, 0.7), 0.71),
    ]:
        sigma = torch.tensor(level, dtype=torch.float64)
        assert torch.equal(cfg(cond, never, scale, interval)(x, sigma), cond(x, sigma))
        assert torch.equal(cfg_batched(never, cond, scale, interval)(x, sigma), cond(x, sigma))
    with pytest.raises(AssertionError):
        cfg(cond, never, 4.0, (0.3, 0.7))(x, torch.tensor(0.7))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_doubled_call_equals_two(rescale):
    cond, uncond = branches()

    def both(x, sigma):
        assert len(x) == 2 * SHAPE[0]
        levels = sigma.chunk(2) if sigma.ndim else (sigma, sigma)
        halves = x.chunk(2)
        return torch.cat([cond(halves[0], levels[0]), uncond(halves[1], levels[1])])

    x, _, per_sample = draws()
    for sigma in (torch.tensor(0.4, dtype=torch.float64), per_sample):
        expected = cfg(cond, uncond, 6.0, rescale=rescale)(x, sigma)
        torch.testing.assert_close(cfg_batched(both, cond, 6.0, rescale=rescale)(x, sigma), expected)


def test_rescale_restores_each_sample_s_deviation():
    cond, uncond = branches()
    x, sigma = draws()[0], torch.tensor(0.5, dtype=torch.float64)
    c = cond(x, sigma)
    guided = cfg(cond, uncond, 7.5)(x, sigma)
    axes = (1, 2, 3, 4)
    torch.testing.assert_close(cfg(cond, uncond, 7.5, rescale=1.0)(x, sigma).std(axes), c.std(axes))
    torch.testing.assert_close(rescaled(guided, c, 0.25), 0.25 * rescaled(guided, c, 1.0) + 0.75 * guided)
    assert not torch.allclose(guided.std(axes), c.std(axes), rtol=0.05)
    assert torch.isfinite(rescaled(torch.zeros_like(c), c, 1.0)).all()
