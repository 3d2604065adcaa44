"""Which noise levels a sampler visits: schedule(steps, levels, options) -> (steps + 1,) sigmas, ending in 0.

`NoiseLevels` is what a schedule may know of a model: the levels it was trained on and the path they lie on.
Every schedule works for every model; where the customary definition speaks of time steps, a level's place in
that table is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.checks import meant, shown
from sfumato.diffusion.path import FLOW, VE, Path
from sfumato.errors import InputError


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The levels a model was trained on.

    sigmas: (N,) float64, increasing. path: where they lie. offset: the time step of sigmas[0], 1 on FLOW.
    log: interpolate between time steps in log sigma (k-diffusion) or in sigma (diffusers). shift: by which levels of
    FLOW that are spaced evenly were moved to be these. aligned: the eleven levels of ten steps that were published for
    the model (`ays`), if they were.
    """

    sigmas: Tensor
    path: Path = VE
    offset: int = 0
    log: bool = field(default=True)
    shift: float = 1.0
    aligned: tuple[float, ...] = ()

    @property
    def sigma_min(self) -> float:
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self.sigmas[-1])

    def time(self, sigma: Tensor) -> Tensor:
        """The fractional time step of levels, in their shape and dtype; outside, that of the nearest end."""
        table = self.sigmas.to(sigma.device)
        low = (
            torch.searchsorted(table, sigma.double().contiguous(), right=True).sub(1).clamp(0, len(table) - 2)
        )
        a, b, s = table[low], table[low + 1], sigma.double().clamp(self.sigma_min, self.sigma_max)
        share = (s.log() - a.log()) / (b.log() - a.log()) if self.log else (s - a) / (b - a)
        return (low + share + self.offset).to(sigma.dtype)

    def sigma(self, time: Tensor) -> Tensor:
        """The level of a time step, the inverse of `time`; float64."""
        place = (time.double() - self.offset).clamp(0, len(self.sigmas) - 1)
        low = place.floor().long().clamp(max=len(self.sigmas) - 2)
        a, b, share = self.sigmas[low], self.sigmas[low + 1], place - low
        return (a.log() + share * (b.log() - a.log())).exp() if self.log else a + share * (b - a)

    def step_sigma(self, place: Tensor) -> Tensor:
        """Table entries at whole places 0 … N − 1."""
        return self.sigmas[place.long()]


def flow_levels(shift: float = 1.0, steps: int = 1000) -> NoiseLevels:
    """FLOW levels 1/steps … 1, moved by `shift` (SD3: 3). A flow network is told sigma, not the place."""
    sigmas = shift_sigma(torch.arange(1, steps + 1, dtype=torch.float64) / steps, shift)
    return NoiseLevels(sigmas, FLOW, offset=1, log=False, shift=shift)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """shift · sigma / (1 + (shift − 1) sigma): the level at a resolution whose noise must be `shift` times as
    strong for the same uncertainty (Esser et al. 2024, eq. 23, shift = sqrt(m / n) for m pixels against n).
    FLOW only.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(cells: int, base_cells: int) -> float:
    """sqrt(cells / base_cells): the shift of eq. 23 for a latent of `cells` positions."""
    return math.sqrt(cells / base_cells)


def beta_table(
    kind: str = "scaled_linear", start: float = 0.00085, end: float = 0.012, steps: int = 1000
) -> Tensor:
    """(steps,) float64 betas of a DDPM.

    scaled_linear: square roots spaced evenly (SD); linear: Ho et al. 2020; cosine: Nichol & Dhariwal 2021,
    eq. 17 (start and end do not matter).
    """
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise InputError(f"beta table {kind!r} is unknown; use linear, scaled_linear or cosine", argument="kind")


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas rescaled so that the last level holds no signal, alpha_bar 0 (Lin et al. 2023, alg. 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def beta_levels(betas: Tensor, log: bool = True) -> NoiseLevels:
    """VE levels sqrt((1 − alpha_bar) / alpha_bar) of a DDPM; alpha_bar 0 becomes 2⁻²⁴, sigma 4096."""
    alpha_bar = torch.cumprod(1 - betas.double(), 0)
    alpha_bar = torch.where(alpha_bar > 0, alpha_bar, torch.full_like(alpha_bar, 2.0**-24))
    return NoiseLevels(((1 - alpha_bar) / alpha_bar).sqrt(), VE, log=log)


def normal(steps: int, levels: NoiseLevels) -> Tensor:
    """Time steps spaced evenly from last to first, both included (k-diffusion; diffusers' linspace)."""
    last = len(levels.sigmas) - 1 + levels.offset
    return _ending(levels.sigma(torch.linspace(last, levels.offset, steps, dtype=torch.float64)))


def sgm_uniform(steps: int, levels: NoiseLevels) -> Tensor:
    """Time steps spaced evenly from last to first, without the first: the final 0 stands for it (sgm)."""
    last = len(levels.sigmas) - 1 + levels.offset
    return _ending(levels.sigma(torch.linspace(last, levels.offset, steps + 1, dtype=torch.float64)[:-1]))


def simple(steps: int, levels: NoiseLevels) -> Tensor:
    """Every (N / steps)-th entry of the table, counted from the noisy end (ComfyUI's `simple`)."""
    count = len(levels.sigmas)
    back = (torch.arange(steps, dtype=torch.float64) * (count / steps)).floor()
    return _ending(levels.step_sigma(count - 1 - back))


def trailing(steps: int, levels: NoiseLevels) -> Tensor:
    """Time steps round(N − k N / steps) − 1: the last one is always visited (Lin et al. 2023, table 2)."""
    count = len(levels.sigmas)
    place = count - torch.arange(steps, dtype=torch.float64) * (count / steps)
    return _ending(levels.step_sigma(place.round() - 1))


def leading(steps: int, levels: NoiseLevels, offset: int = 1) -> Tensor:
    """Multiples of floor(N / steps) plus `offset`: the grid of DDIM and SD 1, without the noisiest."""
    place = torch.arange(steps - 1, -1, -1) * (len(levels.sigmas) // steps) + offset
    return _ending(levels.step_sigma(place.clamp(max=len(levels.sigmas) - 1)))


def lcm(steps: int, levels: NoiseLevels, trained: int = 50) -> Tensor:
    """`steps` of the `trained` levels that latent consistency models are distilled on, from the noisiest, evenly apart.

    Those are every (N / trained)-th entry of the table; 4 of 50 are the time steps 999, 759, 499 and 259 (Luo et al.
    2023, 2310.04378, sec. 4.3; diffusers' `LCMScheduler`).
    """
    if steps > trained:
        raise InputError(
            f"schedule lcm has {trained} levels, fewer than {steps}; use fewer steps", argument="steps"
        )
    place = (torch.arange(steps, dtype=torch.float64) * (trained / steps)).floor()
    return _ending(levels.step_sigma((trained - place) * (len(levels.sigmas) // trained) - 1))


def karras(
    steps: int,
    levels: NoiseLevels,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> Tensor:
    """sigma^(1/rho) spaced evenly between the ends, the model's by default (Karras et al. 2022, eq. 5)."""
    low, high = _ends(levels, sigma_min, sigma_max)
    return _ending(torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho)


def exponential(
    steps: int, levels: NoiseLevels, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """log sigma spaced evenly from sigma_max to sigma_min."""
    low, high = _ends(levels, sigma_min, sigma_max)
    return _ending(torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp())


def log_snr_uniform(
    steps: int, levels: NoiseLevels, sigma_min: float | None = None, sigma_max: float | None = None
) -> Tensor:
    """log(alpha / sigma) spaced evenly: DPM-Solver's grid (Lu et al. 2022, 2206.00927, sec. 3.4).

    On VE the same as `exponential`. An end without signal is visited first; the even part then starts at
    half_log_snr −5 (sigma 0.9933 on FLOW).
    """
    low, high = _ends(levels, sigma_min, sigma_max)
    path = levels.path
    first = path.half_log_snr(high)
    pure = [high] if math.isinf(first) else []
    even = torch.linspace(
        max(first, -5.0) if pure else first, path.half_log_snr(low), steps - len(pure), dtype=torch.float64
    )
    sigmas = torch.cat([torch.tensor(pure, dtype=torch.float64), path.sigma_at(even)])
    return _ending(sigmas)


def linear(steps: int, levels: NoiseLevels) -> Tensor:
    """sigma spaced evenly from sigma_max to 0 (rectified flow's own grid)."""
    return torch.linspace(levels.sigma_max, 0, steps + 1, dtype=torch.float64)


def flow_shift(steps: int, levels: NoiseLevels, shift: float = 3.0) -> Tensor:
    """`linear` moved towards noise by `shift` (Esser et al. 2024, eq. 23; SD3 uses 3). FLOW only."""
    _flow_only("flow_shift", levels)
    return shift_sigma(linear(steps, levels), shift)


def flow_match(steps: int, levels: NoiseLevels) -> Tensor:
    """sigma spaced evenly between the model's ends, both included, then moved by the model's shift once more. It is the
    grid of diffusers' FlowMatchEulerDiscreteScheduler, of Stability's reference, and of ComfyUI's `normal`. FLOW only.
    """
    _flow_only("flow_match", levels)
    even = torch.linspace(levels.sigma_max, levels.sigma_min, steps, dtype=torch.float64)
    return _ending(shift_sigma(even, levels.shift))


def flow_dynamic(
    steps: int,
    levels: NoiseLevels,
    tokens: int | None = None,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> Tensor:
    """sigma spaced evenly from 1, moved by exp(mu), where mu grows with the picture from 0.5 at 256 tokens to 1.15 at
    4096: diffusers' `use_dynamic_shifting`. FLOW only.

    tokens: of the picture, as the network cuts it. The model's own shift does not count.
    """
    _flow_only("flow_dynamic", levels)
    if tokens is None:
        raise InputError(
            "schedule flow_dynamic must know how many tokens the picture has, which this model does not tell; use "
            "flow_shift",
            argument="schedule",
        )
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    even = torch.linspace(1, 1 / len(levels.sigmas), steps, dtype=torch.float64)
    return _ending(shift_sigma(even, math.exp(mu)))


def _flow_only(name: str, levels: NoiseLevels) -> None:
    if levels.path is not FLOW:
        raise InputError(f"schedule {name} needs a flow model; use karras or normal", argument="schedule")


def ays(steps: int, levels: NoiseLevels) -> Tensor:
    """Align Your Steps (Sabour et al. 2024, 2404.14507): the ten-step levels that its authors published for the model;
    other counts by linear interpolation of log sigma over the step's share, as they advise. VE only."""
    if not levels.aligned:
        other = "flow_shift" if levels.path is FLOW else "karras"
        raise InputError(
            f"schedule ays has levels for the models of its authors, and none for this one; use {other}",
            argument="schedule",
        )
    known = torch.tensor(levels.aligned, dtype=torch.float64).log()
    place = torch.linspace(0, len(known) - 1, steps + 1, dtype=torch.float64)[:-1]
    low = place.floor().long().clamp(max=len(known) - 2)
    return _ending((known[low] + (place - low) * (known[low + 1] - known[low])).exp())


def share_interval(sigmas: Tensor, start: float, stop: float) -> tuple[float, float]:
    """(low, high) of the levels low < sigma <= high of a schedule's steps i with start · S < i < stop · S, from 0 on.

    So Stability's reference and diffusers say when skip-layer guidance acts; step 0 is never among them. The same
    two numbers, between which nothing lies, where there is no such step.
    """
    steps = len(sigmas) - 1
    first, last = math.floor(start * steps) + 1, math.ceil(stop * steps) - 1
    if first > last or first > steps - 1:
        return 0.0, 0.0
    return float(sigmas[min(last, steps - 1) + 1]), float(sigmas[first])


def _ending(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _ends(levels: NoiseLevels, low: float | None, high: float | None) -> tuple[float, float]:
    return (levels.sigma_min if low is None else low), (levels.sigma_max if high is None else high)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "normal": normal,
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "trailing": trailing,
    "leading": leading,
    "lcm": lcm,
    "log_snr": log_snr_uniform,
    "ays": ays,
    "linear": linear,
    "flow_shift": flow_shift,
    "flow_match": flow_match,
    "flow_dynamic": flow_dynamic,
}
SIZED = {"flow_dynamic"}  # schedules that depend on how large the picture is


def sigmas_for(name: str, steps: int, levels: NoiseLevels, tokens: int | None = None) -> Tensor:
    """The named schedule with its default options: (steps + 1,) float64, strictly decreasing to 0.

    tokens: how many of them a network makes of the picture, for the schedules that ask.
    """
    if name not in SCHEDULES:
        raise InputError(
            f"schedule {shown(name)} is unknown{meant(name, SCHEDULES)}; use one of {', '.join(SCHEDULES)}",
            argument="schedule",
        )
    if steps < 1:
        raise InputError(f"steps must be at least 1, not {steps}", argument="steps")
    sigmas = SCHEDULES[name](steps, levels, **({"tokens": tokens} if name in SIZED else {}))
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise InputError(
            f"schedule {name} cannot make {steps} different levels for this model; use fewer steps",
            argument="steps",
        )
    return sigmas
