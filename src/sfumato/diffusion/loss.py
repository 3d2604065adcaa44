"""Which noise levels training visits and how much each counts.

A density is a quantile function: it maps u, uniform on (0, 1), to noise levels. So drawing is one call to a
uniform generator, a batch can be spread evenly (`spread`), and a resumed run repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import levels_like
from sfumato.diffusion.schedules import NoiseLevels, shift_sigma
from sfumato.errors import InputError

Density = Callable[[Tensor], Tensor]  # u in (0, 1) -> sigma, elementwise and increasing
WEIGHTINGS = ("plain", "min_snr", "flow")
DENSITIES = ("logit_normal", "uniform")  # of a flow's levels
EDGE = 1e-4  # how near to the ends of a flow's path training comes


def spread(u: Tensor, start: float = 0.0) -> Tensor:
    """Stratify uniform draws u: (B,): draw k falls in the k-th of B parts of (0, 1), rotated by `start`.

    Each value is uniform when `start` is; the batch covers all levels, which lowers the variance of the loss
    (Kingma et al. 2021, Variational Diffusion Models, app. I.1, with independent offsets).
    """
    return ((torch.arange(len(u), device=u.device) + u) / len(u) + start) % 1.0


def uniform(low: float = 0.0, high: float = 1.0) -> Density:
    """sigma uniform between low and high."""
    return lambda u: low + (high - low) * u


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Density:
    """sigma = sigmoid(mean + std · normal): SD3's choice for FLOW (Esser et al. 2024, 2403.03206, eq. 19).

    SD3 uses mean 0, std 1. A positive mean visits noisier levels more often.
    """
    return lambda u: torch.sigmoid(mean + std * _normal_quantile(u))


def log_normal(mean: float = -1.2, std: float = 1.2) -> Density:
    """ln sigma is normal: EDM's choice for VE and data of deviation 0.5 (Karras et al. 2022, table 1)."""
    return lambda u: torch.exp(mean + std * _normal_quantile(u))


def shifted(density: Density, shift: float) -> Density:
    """Move a density on FLOW towards noise as `shift_sigma` does a schedule."""
    return lambda u: shift_sigma(density(u), shift)


def flow_density(
    kind: str = "logit_normal", mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Density:
    """The density of a name among `DENSITIES` on FLOW, shifted, and kept off the path's ends."""
    density = uniform() if kind == "uniform" else logit_normal(mean, std)
    moved = shifted(density, shift) if shift != 1 else density
    return lambda u: moved(u).clamp(EDGE, 1 - EDGE)


def table_density(levels: NoiseLevels) -> Density:
    """Every step of a model's own table equally often."""
    count = len(levels.sigmas)
    return lambda u: levels.step_sigma((u * count).long().clamp(max=count - 1))


@dataclass(frozen=True)
class TrainingPair:
    """One step's network input and answer.

    x: (B, …) scaled for the network; time, weight: (B,) float32; target: like x.
    The loss is mean(weight · mean over the sample of (F − target)²). `noisy` and `sigma` are what x was made
    from, for losses on x0_hat.
    """

    x: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor
    noisy: Tensor
    sigma: Tensor


def training_pair(
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    parameterization: Parameterization,
    weighting: str = "plain",
    gamma: float = 5.0,
) -> TrainingPair:
    """x0, noise: (B, …) clean samples and standard normals; sigma: (B,); weighting: see `loss_weight`."""
    p = parameterization
    noisy = p.path.noisy(x0, noise, sigma)
    _, _, c_in = p.coefficients(levels_like(sigma, x0))
    return TrainingPair(
        x=c_in * noisy,
        time=p.network_time(sigma).float(),
        target=p.target(x0, noise, sigma),
        weight=loss_weight(sigma, p, weighting, gamma).float(),
        noisy=noisy,
        sigma=sigma,
    )


def loss_weight(
    sigma: Tensor, parameterization: Parameterization, weighting: str = "plain", gamma: float = 5.0
) -> Tensor:
    """(B,) weights of the squared error of F. As x0_hat − x0 = c_out (F − target), w on x0_hat is w · c_out².

    plain: 1, the error of the network's own prediction.
    min_snr: min(snr, gamma) on x0_hat; min(snr, gamma) / snr on eps (Hang et al. 2023, 2303.09556, sec. 3.4).
    flow: the error of noise − x0 whatever the network predicts (with `x` this is JiT's v-loss, 2511.13720,
        eq. 7); the level is kept at or above 0.05 in the divisor, as there.
    """
    if weighting == "plain":
        return torch.ones_like(sigma)
    _, c_out, _ = parameterization.coefficients(sigma)
    if weighting == "min_snr":
        return parameterization.path.log_snr(sigma).exp().clamp(max=gamma) * c_out**2
    if weighting == "flow":
        alpha = parameterization.path.alpha(sigma)
        return (c_out * (alpha + sigma) / sigma.clamp(min=0.05)) ** 2
    raise InputError(
        f"weighting {weighting!r} is unknown; use one of {', '.join(WEIGHTINGS)}", argument="weighting"
    )


def prediction_loss(prediction: Tensor, pair: TrainingPair) -> Tensor:
    """(B,) weighted mean squared errors in float32."""
    return pair.weight * (prediction.float() - pair.target.float()).square().flatten(1).mean(1)


def _normal_quantile(u: Tensor) -> Tensor:
    edge = torch.finfo(u.dtype).eps
    return torch.special.ndtri(u.clamp(edge, 1 - edge))
