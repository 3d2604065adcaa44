"""Numbers about samples: intervals, distances between distributions, nearest neighbours, diversity.

Everything is a pure function of tensors; randomness comes from a fixed seed, so that a report repeats to the digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, float | int]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


def bootstrap(
    values: Sequence[float] | Tensor,
    *,
    clusters: Sequence[int] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean (Efron & Tibshirani 1993, ch. 13).

    `clusters` names the unit that is drawn (the prompt, when several pictures share one); without it each
    value is its own unit. When every value is 0 or 1 and all are equal, resampling can only repeat them and
    would claim certainty; the bounds are then Wilson's, over the number of units.
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    if data.size == 0:
        raise InputError("an interval needs at least one value", argument="values")
    names = np.arange(data.size) if clusters is None else np.asarray(clusters)
    if names.shape != data.shape:
        raise InputError(f"clusters has {names.size} entries for {data.size} values", argument="clusters")
    _, unit = np.unique(names, return_inverse=True)
    sums, sizes = np.bincount(unit, weights=data), np.bincount(unit).astype(np.float64)
    mean = float(data.mean())
    if mean in (0.0, 1.0) and np.all(data == mean):
        low, high = wilson(mean * len(sizes), len(sizes), confidence)
        return Interval(mean, low, high, data.size)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(draws)
    for start in range(0, draws, 250):  # bounded memory: 250 x units
        chosen = generator.integers(len(sizes), size=(min(250, draws - start), len(sizes)))
        means[start : start + len(chosen)] = sums[chosen].sum(1) / sizes[chosen].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), data.size)


def wilson(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); it has a width at 0 and at 1 too."""
    z = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(confidence, dtype=torch.float64)))
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 50, size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """Squared MMD with the cubic kernel (x·y/D + 1)³, unbiased, over random subsets (KID; Binkowski et al.
    2018, eq. 4).

    x: (N, D), y: (M, D) features. Returns the mean over subsets and its standard deviation. About 0 for equal
    distributions, and it may be slightly negative: the estimator is unbiased.
    """
    x, y = _features(x, y)
    size = min(size, len(x), len(y))
    if size < 2:
        raise InputError("the kernel distance needs at least two pictures on each side", argument="features")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a = x[torch.randperm(len(x), generator=generator)[:size]]
        b = y[torch.randperm(len(y), generator=generator)[:size]]
        values.append(float(_mmd2(a, b)))
    return float(np.mean(values)), float(np.std(values))


def _mmd2(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased MMD² of two samples of one size: the diagonal terms k(a_i, a_i) are left out."""
    n = len(a)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(a, a), kernel(b, b))) / (n * (n - 1))
    return within - 2 * kernel(a, b).mean()


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|μx − μy|² + tr(Σx + Σy − 2 (Σx Σy)^½): the squared 2-Wasserstein distance of the fitted Gaussians
    (Heusel et al. 2017, eq. 6).

    x: (N, D), y: (M, D). Biased upwards for small samples: compare only values made with the same N and M.
    """
    x, y = _features(x, y)
    if min(len(x), len(y)) < 2:
        raise InputError("the Fréchet distance needs at least two pictures on each side", argument="features")
    covariance_x, covariance_y = (
        torch.cov(x.T).reshape(x.shape[1], -1),
        torch.cov(y.T).reshape(x.shape[1], -1),
    )
    values, vectors = torch.linalg.eigh(covariance_x)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_y @ root).clamp_min(0).sqrt().sum()
    distance = (
        (x.mean(0) - y.mean(0)).square().sum() + covariance_x.trace() + covariance_y.trace() - 2 * cross
    )
    return max(0.0, float(distance))


def nearest(queries: Tensor, bank: Tensor, *, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """For each of `queries` (N, D) its nearest row of `bank` (M, D): Euclidean distances (N,) and indices (N,)."""
    queries, bank = _features(queries, bank)
    found = [torch.cdist(part, bank).min(dim=1) for part in queries.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def copying_z(generated: Tensor, held_out: Tensor) -> float:
    """Mann–Whitney z of generated-to-training against held-out-to-training distances (C_T of Meehan et al. 2020).

    Both are (N,) nearest-neighbour distances to the same training set. About 0 when generated pictures are as
    far from the training set as unseen real ones; far below 0 (under −3) when they sit closer, which is
    copying; above 0 when farther.
    """
    n, m = len(generated), len(held_out)
    pooled = torch.cat([generated, held_out]).double()
    _, inverse, counts = pooled.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # mean rank of ties
    u = float(rank[:n].sum()) - n * (n + 1) / 2
    total = n + m
    ties = float((counts.double() ** 3 - counts).sum()) / (total * (total - 1))
    spread = math.sqrt(max(n * m / 12 * (total + 1 - ties), 1e-12))
    return (u - n * m / 2) / spread


def pairwise_spread(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of rows of (N, D); 0 when all pictures are the same."""
    if len(features) < 2:
        raise InputError("diversity needs at least two pictures", argument="features")
    return float(torch.pdist(features.double()).mean())


def vendi(features: Tensor) -> float:
    """Effective number of different pictures among (N, D), in 1..N (Friedman & Dieng 2023, eq. 1; cosine kernel).

    Rows are compared by direction from the origin: centre them first on what all pictures share.
    """
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    values = torch.linalg.eigvalsh(rows @ rows.T / len(rows)).clamp_min(0)
    values = values[values > 1e-12]
    return float(torch.exp(-(values * values.log()).sum()))


def _features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"features must be (N, D) and (M, D), not {tuple(x.shape)} and {tuple(y.shape)}",
            argument="features",
        )
    return x.detach().cpu().double(), y.detach().cpu().double()
