"""The statistics against distributions whose answers are known."""

import math

import numpy as np
import pytest
import torch

from sfumato.errors import InputError
from sfumato.evaluate import statistics as stats


def gaussian(count, mean, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(mean), generator=generator, dtype=torch.float64) * torch.tensor(
        scale
    ) + torch.tensor(mean)


def test_bootstrap_matches_the_normal_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    interval = stats.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        interval = stats.bootstrap(rng.binomial(1, 0.7, size=150), draws=500, seed=trial)
        inside += interval.low <= 0.7 <= interval.high
    assert 0.89 <= inside / 200 <= 0.99


def test_bootstrap_repeats_and_depends_on_clusters():
    values = [1.0] * 40 + [0.0] * 60
    assert stats.bootstrap(values, seed=3) == stats.bootstrap(values, seed=3)
    lone = stats.bootstrap(values)
    clustered = stats.bootstrap(
        values, clusters=[i // 20 for i in range(100)]
    )  # five units, each all right or all wrong
    assert clustered.high - clustered.low > 2 * (lone.high - lone.low)
    assert clustered.mean == lone.mean == 0.4


def test_an_all_right_sample_still_has_a_width():
    interval = stats.bootstrap([1.0] * 100)
    assert interval.mean == 1.0 and interval.high == 1.0
    assert interval.low == pytest.approx(
        100 / (100 + 1.959964**2), abs=1e-6
    )  # Wilson's closed form at share 1
    zero = stats.bootstrap([0.0] * 100)
    assert zero.low == pytest.approx(0.0, abs=1e-12) and zero.high == pytest.approx(1 - interval.low)


def test_wilson_known_value():
    low, high = stats.wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_frechet_equals_the_closed_form_of_two_gaussians():
    x = gaussian(60_000, [0.0, 0.0, 0.0], [1.0, 2.0, 0.5], 0)
    y = gaussian(60_000, [1.0, -1.0, 0.0], [3.0, 2.0, 0.5], 1)
    assert stats.frechet_distance(x, y) == pytest.approx(2.0 + 4.0, rel=0.03)  # |Δμ|² + Σ(σx − σy)²
    assert stats.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)


def test_frechet_does_not_change_under_rotation():
    x, y = gaussian(500, [0.0] * 6, [1.0] * 6, 2), gaussian(400, [0.3] * 6, [1.5] * 6, 3)
    turn = torch.linalg.qr(gaussian(6, [0.0] * 6, [1.0] * 6, 4)).Q
    assert stats.frechet_distance(x @ turn, y @ turn) == pytest.approx(stats.frechet_distance(x, y), rel=1e-6)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [
        stats.kernel_distance(
            gaussian(300, [0.0] * 8, [1.0] * 8, 2 * k),
            gaussian(300, [0.0] * 8, [1.0] * 8, 2 * k + 1),
            subsets=4,
        )[0]
        for k in range(20)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(20) and min(same) < 0 < max(same)
    shifted, _ = stats.kernel_distance(
        gaussian(300, [0.0] * 8, [1.0] * 8, 50), gaussian(300, [0.7] * 8, [1.0] * 8, 51)
    )
    assert shifted > 20 * np.std(same)


def test_kernel_distance_equals_the_double_sum():
    x, y = gaussian(7, [0.0] * 3, [1.0] * 3, 5), gaussian(7, [1.0] * 3, [1.0] * 3, 6)

    def k(u, v):
        return float((u @ v / 3 + 1) ** 3)

    inside = sum(k(a[i], a[j]) for a in (x, y) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(k(u, v) for u in x for v in y) / 49
    assert stats.kernel_distance(x, y, subsets=1)[0] == pytest.approx(inside - 2 * between)


def test_nearest_finds_planted_copies_in_chunks():
    bank = gaussian(500, [0.0] * 5, [1.0] * 5, 7)
    chosen = torch.tensor([3, 499, 77])
    distance, index = stats.nearest(bank[chosen] + 1e-4, bank, chunk=2)
    assert index.tolist() == chosen.tolist()
    assert torch.allclose(distance, torch.full((3,), 1e-4 * math.sqrt(5), dtype=torch.float64), rtol=1e-3)


def test_copying_z_tells_copies_from_fresh_samples():
    train, held = gaussian(2000, [0.0] * 6, [1.0] * 6, 8), gaussian(400, [0.0] * 6, [1.0] * 6, 9)
    fresh, copies = (
        gaussian(400, [0.0] * 6, [1.0] * 6, 10),
        train[:400] + 0.05 * gaussian(400, [0.0] * 6, [1.0] * 6, 11),
    )
    base = stats.nearest(held, train)[0]
    assert abs(stats.copying_z(stats.nearest(fresh, train)[0], base)) < 3
    assert stats.copying_z(stats.nearest(copies, train)[0], base) < -10
    assert stats.copying_z(base, base) == pytest.approx(0.0, abs=1e-9)  # ties share their mean rank


def test_diversity_of_known_sets():
    basis = torch.eye(10).double()
    assert stats.vendi(basis) == pytest.approx(10.0)
    assert stats.vendi(basis[:2].repeat(5, 1)) == pytest.approx(2.0)
    assert stats.vendi(basis[:1].repeat(8, 1)) == pytest.approx(1.0)
    assert stats.pairwise_spread(basis) == pytest.approx(math.sqrt(2))
    assert stats.pairwise_spread(basis[:1].repeat(4, 1)) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.bootstrap([]),
        lambda: stats.bootstrap([1.0, 0.0], clusters=[0]),
        lambda: stats.frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4)),
        lambda: stats.kernel_distance(torch.zeros(1, 2), torch.zeros(3, 2)),
        lambda: stats.pairwise_spread(torch.zeros(1, 2)),
    ],
)
def test_impossible_questions_are_refused(call):
    with pytest.raises(InputError):
        call()
