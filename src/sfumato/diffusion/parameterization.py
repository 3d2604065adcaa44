"""What a network predicts, and how its answer becomes an estimate of the clean sample.

A network sees x scaled to about unit variance and a time, and answers F:

    x0_hat = c_skip · x + c_out · F(c_in · x, time)                       (Karras et al. 2022, eq. 7)

With x = alpha · x0 + sigma · noise, n = sqrt(alpha² + sigma²) and m = alpha + sigma, the four kinds predict

    eps    noise                              x0_hat = (x − sigma F) / alpha              c_in = 1 / n
    v      (alpha · noise − sigma · x0) / n   x0_hat = (alpha x − sigma n F) / n²         c_in = 1 / n
    x      x0                                 x0_hat = F                                  c_in = 1 / n
    flow   noise − x0                         x0_hat = (x − sigma F) / m                  c_in = 1 / m

A latent consistency model mixes its answer with the sample so that at time 0 it is the sample (`consistency`).

On VP n = 1 and on FLOW m = 1, which gives back the definitions of the papers (v: Salimans & Ho 2022, app. D;
flow: Liu et al. 2022, eq. 1). Because they are written for any path, an SD network runs on VE, and a flow
network may too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.path import FLOW, Path, levels_like
from sfumato.errors import InputError

KINDS = ("eps", "v", "x", "flow")
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> x0_hat


@dataclass(frozen=True)
class Parameterization:
    """One kind of prediction on one path.

    time: maps a tensor of levels to what the network is told. None means sigma / (alpha + sigma), which lies
        in [0, 1] and is sigma itself on FLOW. `NoiseLevels.time` gives the time step of an SD network.
    boundary: of the time, what x / n and the estimate count for in the answer; None leaves the estimate as it is.
    """

    kind: str = "flow"
    path: Path = FLOW
    time: Callable[[Tensor], Tensor] | None = None
    boundary: Callable[[Any], tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"prediction {self.kind!r} is unknown; use one of {', '.join(KINDS)}", argument="kind"
            )

    def coefficients(self, sigma: Any) -> tuple[Any, Any, Any]:
        """(c_skip, c_out, c_in) at a level, a float or a tensor. eps has none where alpha is 0."""
        c_skip, c_out, c_in = self._unbounded(sigma)
        if self.boundary is None:
            return c_skip, c_out, c_in
        time = self.network_time(torch.as_tensor(sigma, dtype=getattr(sigma, "dtype", torch.float64)))
        of_x, of_estimate = self.boundary(time if isinstance(sigma, Tensor) else float(time))
        return of_estimate * c_skip + of_x * c_in, of_estimate * c_out, c_in

    def _unbounded(self, sigma: Any) -> tuple[Any, Any, Any]:
        alpha = self.path.alpha(sigma)
        n = (alpha * alpha + sigma * sigma) ** 0.5
        if self.kind == "eps":
            return 1 / alpha, -sigma / alpha, 1 / n
        if self.kind == "v":
            return alpha / n**2, -sigma / n, 1 / n
        if self.kind == "x":
            return 0 * sigma, 0 * sigma + 1, 1 / n
        m = alpha + sigma
        return 1 / m, -sigma / m, 1 / m

    def network_time(self, sigma: Tensor) -> Tensor:
        """What the network is told at the levels `sigma`, in their shape."""
        return self.time(sigma) if self.time else sigma / (self.path.alpha(sigma) + sigma)

    def denoiser(self, net: Callable[..., Tensor], cond: Any) -> Denoise:
        """Close net(x_in, time, cond) -> F over its condition: denoise(x, sigma) -> x0_hat.

        x: (B, …); sigma: a number, or a scalar or (B,) tensor; the network gets its time as (B,) float32.
        """

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = torch.as_tensor(sigma)
            c_skip, c_out, c_in = self.coefficients(levels_like(level, x))
            time = self.network_time(level).to(device=x.device, dtype=torch.float32).expand(x.shape[0])
            return c_skip * x + c_out * net(c_in * x, time, cond)

        return denoise

    def target(self, x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """What a perfect network answers for x0 + noise at sigma: (B, …)."""
        if self.kind == "eps":
            return noise
        if self.kind == "x":
            return x0
        if self.kind == "flow":
            return noise - x0
        level = levels_like(sigma, x0)
        alpha = self.path.alpha(level)
        return (alpha * noise - level * x0) / (alpha * alpha + level * level) ** 0.5


def consistency(time: Any, data_std: float = 0.5, scale: float = 10.0) -> tuple[Any, Any]:
    """(c_skip, c_out) at a time step, 0 … 999: 1 and 0 at time 0, and all but 0 and 1 beyond the first few steps.

    Luo et al. 2023 (2310.04378), eq. 9, with Karras' c_skip and c_out; data_std and scale are those of diffusers'
    `LCMScheduler`.
    """
    t = scale * time
    return data_std**2 / (t**2 + data_std**2), t / (t**2 + data_std**2) ** 0.5
