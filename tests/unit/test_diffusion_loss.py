"""Noise-level densities, training pairs and loss weights."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from sfumato.diffusion.loss import (
    log_normal,
    logit_normal,
    loss_weight,
    prediction_loss,
    shifted,
    spread,
    training_pair,
    uniform,
)
from sfumato.diffusion.parameterization import KINDS, Parameterization
from sfumato.diffusion.path import FLOW, PATHS, VE, VP
from sfumato.diffusion.schedules import resolution_shift, shift_sigma
from sfumato.errors import InputError

U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def logit(p):
    return torch.log(p / (1 - p))


@pytest.mark.parametrize(
    ("density", "law"),
    [
        (uniform(), lambda s: stats.uniform.cdf(s)),
        (uniform(0.2, 0.7), lambda s: stats.uniform.cdf(s, 0.2, 0.5)),
        (logit_normal(), lambda s: stats.norm.cdf(logit(s))),
        (logit_normal(0.5, 0.8), lambda s: stats.norm.cdf(logit(s), 0.5, 0.8)),
        (log_normal(), lambda s: stats.norm.cdf(s.log(), -1.2, 1.2)),
    ],
)
def test_a_density_maps_u_to_its_quantiles(density, law):
    """F(density(u)) = u with F from scipy: the whole law, not its moments."""
    sigma = density(U)
    torch.testing.assert_close(torch.as_tensor(law(sigma)), U, rtol=1e-9, atol=1e-9)


def test_shift_follows_the_paper():
    """Eq. 23 of SD3: t_m = sqrt(m/n) t_n / (1 + (sqrt(m/n) − 1) t_n); in the logit it is a translation by log shift."""
    sigma = logit_normal()(U)
    moved = shifted(logit_normal(), 3.0)(U)
    torch.testing.assert_close(moved, 3 * sigma / (1 + 2 * sigma))
    torch.testing.assert_close(moved, logit_normal(math.log(3.0))(U), rtol=1e-9, atol=1e-12)
    assert shift_sigma(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)
    assert resolution_shift(1024 * 1024, 256 * 256) == 4.0


@pytest.mark.parametrize("density", [uniform(0.001, 1.0), logit_normal(), log_normal()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_u_stay_finite(density, dtype):
    sigma = density(torch.tensor([0.0, 1.0], dtype=dtype))
    assert torch.isfinite(sigma).all() and (sigma > 0).all() and sigma.dtype == dtype


def test_spread_covers_every_part_once_and_stays_uniform():
    generator = torch.Generator().manual_seed(1)
    for start in (0.0, 0.37):
        u = spread(torch.rand(64, generator=generator, dtype=torch.float64), start)
        parts = ((u - start) % 1.0 * 64).floor().sort().values
        assert parts.tolist() == list(range(64))
        assert ((u >= 0) & (u < 1)).all()
    pooled = torch.cat(
        [
            spread(torch.rand(8, generator=generator), float(torch.rand((), generator=generator)))
            for _ in range(500)
        ]
    )
    assert stats.kstest(pooled.numpy(), "uniform").pvalue > 1e-3


def pair_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(6, 2, 1, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    return x0, noise, torch.linspace(0.1, 0.95, 6, dtype=dtype)


@pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_sampling_agree(kind, path):
    """The denoiser gives the network, at the same noisy sample, exactly the input and time of training."""
    x0, noise, sigma = pair_inputs()
    p = Parameterization(kind, path)
    pair = training_pair(x0, noise, sigma, p)
    torch.testing.assert_close(pair.noisy, path.noisy(x0, noise, sigma))

    def network(x, time, cond):
        torch.testing.assert_close(x, pair.x)
        torch.testing.assert_close(time, pair.time)
        return pair.target

    torch.testing.assert_close(p.denoiser(network, None)(pair.noisy, sigma), x0, rtol=1e-9, atol=1e-9)
    assert pair.weight.tolist() == [1.0] * 6
    assert prediction_loss(pair.target, pair).abs().max() == 0
    torch.testing.assert_close(prediction_loss(pair.target + 0.5, pair), torch.full((6,), 0.25))


@pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("weighting", ["min_snr", "flow"])
def test_a_weighting_means_the_same_for_every_prediction(weighting, path):
    """Weighted errors in F equal one weighted error of x0_hat, whatever F is."""
    x0, noise, sigma = pair_inputs()
    wrong = x0 + 0.1 * noise.flip(0)  # some x0_hat
    losses = []
    for kind in KINDS:
        p = Parameterization(kind, path)
        pair = training_pair(x0, noise, sigma, p, weighting)
        c_skip, c_out, _ = (torch.as_tensor(c).view(-1, 1, 1, 1, 1) for c in p.coefficients(sigma))
        losses.append(prediction_loss((wrong - c_skip * pair.noisy) / c_out, pair))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-7)
    error = (wrong - x0).square().flatten(1).mean(1)
    if weighting == "min_snr":
        expected = path.log_snr(sigma).exp().clamp(max=5.0) * error
    else:
        expected = ((path.alpha(sigma) + sigma) / sigma) ** 2 * error
    torch.testing.assert_close(losses[0], expected.float(), rtol=1e-4, atol=1e-7)


def test_weights_of_the_papers():
    sigma = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    snr = (1 - sigma**2) / sigma**2
    capped = snr.clamp(max=5)
    for kind, expected in [("eps", capped / snr), ("v", capped / (snr + 1)), ("x", capped)]:
        torch.testing.assert_close(loss_weight(sigma, Parameterization(kind, VP), "min_snr"), expected)
    gamma_one = loss_weight(sigma, Parameterization("eps", VE), "min_snr", gamma=1.0)
    torch.testing.assert_close(gamma_one, (sigma**-2).clamp(max=1) * sigma**2)
    torch.testing.assert_close(
        loss_weight(torch.tensor([0.01, 0.5]), Parameterization("x", FLOW), "flow"),
        torch.tensor([400.0, 4.0]),
    )
    torch.testing.assert_close(
        loss_weight(sigma, Parameterization("flow", FLOW), "flow"), torch.ones_like(sigma)
    )
    with pytest.raises(InputError, match="plain, min_snr, flow"):
        loss_weight(sigma, Parameterization(), "p2")


def test_a_network_fitted_with_any_prediction_is_the_best_denoiser():
    """Least squares on training pairs of Gaussian data finds E[x0 | x], which is affine, for each prediction."""
    generator = torch.Generator().manual_seed(3)
    x0 = 0.7 + 0.5 * torch.randn(200_000, 1, 1, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    level = torch.tensor(0.6, dtype=torch.float64)
    gain = 0.4 * 0.25 / (0.16 * 0.25 + 0.36)
    for kind in KINDS:
        p = Parameterization(kind, FLOW)
        pair = training_pair(x0, noise, level.expand(len(x0)), p)
        a = torch.stack([pair.x.flatten(), torch.ones(len(x0), dtype=torch.float64)], 1)
        slope, offset = torch.linalg.lstsq(a, pair.target.flatten()).solution
        denoise = p.denoiser(lambda x, time, cond, k=slope, b=offset: k * x + b, None)
        x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1, 1)
        torch.testing.assert_close(denoise(x, level), 0.7 + gain * (x - 0.4 * 0.7), rtol=0, atol=0.01)
