"""The contract of a sampler: pure, cancellable, one call per stage, one picture at a time or many together."""

from __future__ import annotations

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sfumato.diffusion.exact import TwoPeaks
from sfumato.diffusion.path import FLOW, VE, VP
from sfumato.errors import Cancelled, InputError
from sfumato.sampling import SAMPLERS, SeededNoise, Step, sampler_named

NAMES = sorted(SAMPLERS)
SIGMAS = {
    "ve": torch.tensor([14.6, 6.0, 2.2, 0.7, 0.2, 0.0], dtype=torch.float64),
    "vp": torch.tensor([0.99, 0.9, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64),
    "flow": torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64),
}
CALLS = {"heun": 9, "dpm2": 9, "dpmpp_sde": 9, "dpmpp_2s_a": 9}  # of 5 steps; the others make 5
PATHS = pytest.mark.parametrize("path", [VE, VP, FLOW], ids=lambda p: p.name)


def run(name, path, seeds, dtype=torch.float64, on_step=None, sigmas=None, **options):
    sigmas = SIGMAS[path.name] if sigmas is None else sigmas
    noise = SeededNoise(seeds, (2, 1, 3, 5), dtype=dtype)
    x = noise.initial() * path.prior_scale(float(sigmas[0]))
    denoise = TwoPeaks().denoiser(path)
    return SAMPLERS[name](denoise, x, sigmas, path=path, noise=noise, on_step=on_step, **options)


def test_the_names():
    expected = "euler euler_a heun dpm2 dpmpp_2m dpmpp_2m_sde dpmpp_sde dpmpp_2s_a unipc ddim ddpm lms lcm"
    assert set(SAMPLERS) == set(expected.split())
    for name, sampler in SAMPLERS.items():
        assert sampler_named(name) is sampler
        parameters = list(inspect.signature(sampler).parameters)
        assert parameters[:6] == ["denoise", "x", "sigmas", "path", "noise", "on_step"]
    with pytest.raises(InputError, match="euler_a, heun"):
        sampler_named("eular")


@PATHS
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_of_a_batch_equals_the_picture_alone(name, path):
    together = run(name, path, [5, 6, 7])
    assert torch.isfinite(together).all()
    for k, seed in enumerate([5, 6, 7]):
        assert torch.equal(together[k : k + 1], run(name, path, [seed]))
    assert torch.equal(run(name, path, [7, 5]), together[[2, 0]])


@PATHS
@pytest.mark.parametrize("name", NAMES)
def test_pure(name, path):
    """The same call gives the same result, from other threads too, and leaves its arguments as they were."""
    expected = run(name, path, [1, 2])
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(name, path, [1, 2]), range(8)):
            assert torch.equal(result, expected)
    sigmas = SIGMAS[path.name].clone()
    x = torch.ones(1, 2, 1, 3, 5, dtype=torch.float64)
    SAMPLERS[name](
        TwoPeaks().denoiser(path), x, sigmas, path=path, noise=SeededNoise([1], (2, 1, 3, 5), dtype=x.dtype)
    )
    assert torch.equal(sigmas, SIGMAS[path.name]) and torch.equal(x, torch.ones_like(x))


@PATHS
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_reported_and_denoise_is_called_once_a_stage(name, path):
    steps: list[Step] = []
    calls: list[float] = []
    inner = TwoPeaks().denoiser(path)

    def denoise(x, sigma):
        assert sigma.ndim == 0 and sigma.dtype == torch.float64
        calls.append(float(sigma))
        return inner(x, sigma)

    sigmas = SIGMAS[path.name]
    noise = SeededNoise([3], (2, 1, 3, 5), dtype=torch.float64)
    x = SAMPLERS[name](denoise, noise.initial(), sigmas, path=path, noise=noise, on_step=steps.append)
    assert [(s.index, s.total, s.sigma) for s in steps] == [(i, 5, float(sigmas[i])) for i in range(5)]
    assert torch.equal(steps[-1].x, x)
    first_order_start = name in ("dpmpp_sde", "dpmpp_2s_a") and path is FLOW  # no signal to build a middle on
    # at eta 1 a step of dpmpp_2s_a to 0, and every sampler's, needs one call
    assert len(calls) == CALLS.get(name, 5) - first_order_start
    assert all(s >= 0 for s in calls) and calls[0] == float(sigmas[0])


def test_a_step_without_signal_costs_one_call():
    """At sigma 1 of FLOW there is no level between in lambda; the second call would repeat the first."""
    levels = []

    def denoise(x, sigma):
        levels.append(float(sigma))
        return TwoPeaks().denoiser(FLOW)(x, sigma)

    x = torch.ones(1, 2, 1, 3, 5, dtype=torch.float64)
    for name in ("dpmpp_2s_a", "dpmpp_sde"):
        levels.clear()
        SAMPLERS[name](denoise, x, SIGMAS["flow"], path=FLOW, eta=0.0)
        assert len(levels) == 8 and levels.count(1.0) == 1


@pytest.mark.parametrize("name", NAMES)
def test_on_step_cancels(name):
    seen = []

    def stop_at_the_second(step: Step) -> None:
        seen.append(step.index)
        if step.index == 1:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        run(name, FLOW, [1], on_step=stop_at_the_second)
    assert seen == [0, 1]


@PATHS
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_samples_follow_float64(name, path):
    """Coefficients are worked out in float64 whatever the sample's dtype: only the sample's own rounding remains."""
    exact = run(name, path, [1])
    single = run(name, path, [1], dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-4, atol=2e-4)
    again = run(name, path, [1], sigmas=SIGMAS[path.name].float())
    torch.testing.assert_close(again, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_from_noise_is_the_denoiser_s_answer(name):
    sigmas = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = SeededNoise([1], (2, 1, 3, 5), dtype=torch.float64).initial()
    denoise = TwoPeaks().denoiser(FLOW)
    y = SAMPLERS[name](denoise, x, sigmas, path=FLOW, noise=None)
    torch.testing.assert_close(y, denoise(x, sigmas[0]))


@pytest.mark.parametrize("sigmas", [[1.0], [], [0.5, 0.5, 0.0], [0.1, 0.4], [0.5, -0.1], [float("nan"), 0.0]])
@pytest.mark.parametrize("name", NAMES)
def test_levels_must_decrease(name, sigmas):
    with pytest.raises(InputError, match="decrease"):
        run(name, VE, [1], sigmas=torch.tensor(sigmas, dtype=torch.float64)) if sigmas else SAMPLERS[name](
            TwoPeaks().denoiser(VE), torch.zeros(1), torch.tensor([]), path=VE, noise=None
        )


def test_missing_noise_and_wrong_options_are_named():
    x = torch.zeros(1, 2, 1, 3, 5, dtype=torch.float64)
    d = TwoPeaks().denoiser(FLOW)
    for name in ("euler_a", "ddpm", "lcm", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2s_a"):
        with pytest.raises(InputError, match="noise"):
            SAMPLERS[name](d, x, SIGMAS["flow"], path=FLOW, noise=None)
    for name, option in [
        ("lms", {"order": 5}),
        ("unipc", {"order": 0}),
        ("unipc", {"variant": "bh3"}),
        ("ddpm", {"variance": "learned"}),
        ("dpmpp_2m_sde", {"variant": "euler"}),
    ]:
        with pytest.raises(InputError, match=name):
            SAMPLERS[name](d, x, SIGMAS["flow"], path=FLOW, noise=None, **option)
