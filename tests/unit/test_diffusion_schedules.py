"""Schedules and noise tables: their shapes for every model, and the numbers that are known from elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.diffusion import schedules
from sfumato.diffusion.path import FLOW, VE, VP
from sfumato.diffusion.schedules import (
    SCHEDULES,
    NoiseLevels,
    beta_levels,
    beta_table,
    flow_levels,
    sigmas_for,
    zero_terminal_snr,
)
from sfumato.errors import InputError
from sfumato.families.sd.levels import ALIGNED

SD = replace(beta_levels(beta_table()), aligned=ALIGNED)
FLOWS = flow_levels()


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 28, 100])
@pytest.mark.parametrize("levels", [SD, FLOWS, flow_levels(3.0)], ids=["sd", "flow", "flow3"])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_descends_to_zero(name, levels, steps):
    if (name == "ays" and not levels.aligned) or (name.startswith("flow_") and levels.path is VE):
        with pytest.raises(InputError, match=name):
            sigmas_for(name, steps, levels, tokens=1024)
        return
    if name == "lcm" and steps > 50:
        with pytest.raises(InputError, match="50 levels"):
            sigmas_for(name, steps, levels)
        return
    sigmas = sigmas_for(name, steps, levels, tokens=1024)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    if name == "leading":
        assert sigmas[0] < levels.sigma_max
    else:
        assert float(sigmas[0]) == pytest.approx(levels.sigma_max, abs=5e-4)
    if name in ("normal", "karras", "exponential", "log_snr") and steps > 2:
        assert float(sigmas[-2]) == pytest.approx(levels.sigma_min, rel=1e-9)


def test_known_numbers_of_stable_diffusion():
    """The SD table's ends, and ten-step grids as diffusers prints them (linspace, trailing, leading)."""
    assert SD.sigma_max == pytest.approx(14.614642, abs=1e-5)
    assert SD.sigma_min == pytest.approx(0.0291672, abs=1e-6)
    assert float(SCHEDULES["normal"](10, SD)[-2]) == pytest.approx(0.02917, abs=1e-5)
    assert float(schedules.leading(10, SD)[0]) == pytest.approx(8.39069, abs=1e-5)
    assert SD.time(schedules.leading(10, SD)[:-1]).tolist() == pytest.approx(
        [901 - 100 * k for k in range(10)]
    )
    assert SD.time(schedules.trailing(10, SD)[:-1]).tolist() == pytest.approx(
        [999 - 100 * k for k in range(10)]
    )
    assert SD.time(schedules.normal(10, SD)[:-1]).tolist() == pytest.approx(
        [999 - 111 * k for k in range(10)]
    )
    assert SD.time(schedules.sgm_uniform(10, SD)[:-1]).tolist() == pytest.approx(
        [999 - 99.9 * k for k in range(10)]
    )
    assert SD.time(schedules.simple(10, SD)[:-1]).tolist() == pytest.approx(
        [999 - 100 * k for k in range(10)]
    )


def test_karras_and_exponential_by_their_formulas():
    s = schedules.karras(5, SD, sigma_min=0.1, sigma_max=10.0)
    ramp = [(10 ** (1 / 7) + k / 4 * (0.1 ** (1 / 7) - 10 ** (1 / 7))) ** 7 for k in range(5)]
    assert s.tolist() == pytest.approx([*ramp, 0])
    e = schedules.exponential(5, SD, sigma_min=0.1, sigma_max=10.0)
    assert e.tolist() == pytest.approx([10, 10**0.5, 1, 10**-0.5, 0.1, 0])
    torch.testing.assert_close(schedules.log_snr_uniform(7, SD), schedules.exponential(7, SD))


def test_flow_grids():
    assert schedules.linear(4, FLOWS).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert schedules.flow_shift(4, FLOWS).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert torch.equal(schedules.flow_shift(4, FLOWS, shift=1.0), schedules.linear(4, FLOWS))
    sigmas = schedules.flow_shift(28, FLOWS, shift=3.0)
    assert float(sigmas[1]) == pytest.approx(0.98780, abs=1e-5)
    lam = FLOW.half_log_snr(schedules.log_snr_uniform(6, FLOWS))
    assert lam[0] == -math.inf and lam[-1] == math.inf
    torch.testing.assert_close(lam[1:-1].diff(), lam[1:-1].diff()[:1].expand(4))


def test_ays_gives_its_ten_steps_and_interpolates_in_log():
    assert schedules.ays(10, SD)[:-1].tolist() == pytest.approx(list(ALIGNED[:10]))
    twenty = schedules.ays(20, SD)
    assert twenty[:-1:2].tolist() == pytest.approx(list(ALIGNED[:10]))
    assert float(twenty[1]) == pytest.approx(math.sqrt(ALIGNED[0] * ALIGNED[1]))
    for levels, other in ((beta_levels(beta_table()), "karras"), (FLOWS, "flow_shift")):
        with pytest.raises(InputError, match=f"none for this one; use {other}"):
            schedules.ays(10, levels)


@given(st.floats(0, 999), st.booleans())
def test_time_and_sigma_are_inverse(time, log):
    levels = NoiseLevels(SD.sigmas, log=log)
    t = torch.tensor([time], dtype=torch.float64)
    torch.testing.assert_close(levels.time(levels.sigma(t)), t, rtol=1e-9, atol=1e-7)


def test_time_at_the_ends_and_between():
    assert SD.time(torch.tensor([1e-9, 1e9], dtype=torch.float64)).tolist() == [0, 999]
    a, b = float(SD.sigmas[500]), float(SD.sigmas[501])
    assert float(SD.time(torch.tensor(math.sqrt(a * b), dtype=torch.float64))) == pytest.approx(500.5)
    flat = NoiseLevels(SD.sigmas, log=False)
    assert float(flat.time(torch.tensor((a + b) / 2, dtype=torch.float64))) == pytest.approx(500.5)
    assert FLOWS.time(torch.tensor([1.0, 0.5, 0.001])).tolist() == pytest.approx([1000, 500, 1])
    assert SD.time(torch.tensor([1.0, 2.0])).dtype == torch.float32


def test_beta_tables():
    assert beta_table("linear", 1e-4, 0.02)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert beta_table()[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
    cosine = beta_table("cosine")
    bar = torch.cumprod(1 - cosine, 0)
    t = (torch.arange(1, 1000, dtype=torch.float64) / 1000 + 0.008) / 1.008
    expected = (torch.cos(t * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    torch.testing.assert_close(bar[:-1], expected)
    assert float(cosine.max()) == pytest.approx(0.999)
    with pytest.raises(InputError, match="scaled_linear"):
        beta_table("sigmoid")


def test_zero_terminal_snr():
    betas = zero_terminal_snr(beta_table())
    bar, before = torch.cumprod(1 - betas, 0), torch.cumprod(1 - beta_table(), 0)
    assert float(bar[-1]) == 0 and float(bar[0]) == pytest.approx(float(before[0]))
    assert (bar.diff() < 0).all()
    assert beta_levels(betas).sigma_max == pytest.approx(4096, rel=1e-6)


def test_vp_levels_are_the_ve_levels_rescaled():
    vp = VP.from_ratio(SD.sigmas)
    torch.testing.assert_close(vp**2, 1 - torch.cumprod(1 - beta_table(), 0))


def test_unusable_requests_are_named():
    with pytest.raises(InputError, match="karras"):
        sigmas_for("karas", 10, SD)
    with pytest.raises(InputError, match="at least 1"):
        sigmas_for("karras", 0, SD)
    with pytest.raises(InputError, match="fewer steps"):
        sigmas_for("simple", 1001, SD)


def test_a_schedule_that_asks_for_the_picture_s_size_says_so():
    with pytest.raises(InputError, match="flow_dynamic must know how many tokens"):
        sigmas_for("flow_dynamic", 10, FLOWS)
    small, large = (sigmas_for("flow_dynamic", 10, FLOWS, tokens) for tokens in (256, 4096))
    assert (large[1:-1] > small[1:-1]).all()  # a larger picture stays longer where there is more noise


@pytest.mark.parametrize(
    "share, steps",
    [
        ((0.01, 0.2), [1]),
        ((0.0, 0.5), [1, 2, 3, 4]),
        ((0.25, 1.0), [3, 4, 5, 6, 7, 8, 9]),
        ((0.51, 0.55), []),
    ],
)
def test_shares_of_the_steps_as_levels(share, steps):
    sigmas = sigmas_for("flow_shift", 10, FLOWS)
    low, high = schedules.share_interval(sigmas, *share)
    assert [i for i, sigma in enumerate(sigmas[:-1].tolist()) if low < sigma <= high] == steps
