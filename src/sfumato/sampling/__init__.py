"""Samplers: pure functions from noise to a sample, each written once for every path.

    sampler(denoise, x, sigmas, *, path, noise, on_step=None, **its own options) -> x

denoise(x, sigma) -> x0_hat; x: (B, …) at sigmas[0]; sigmas: (S + 1,) decreasing, usually to 0; noise(step,
draw) -> standard normal like x. No state, no device logic, no printing; `on_step` sees every step and may
raise to cancel.
"""

from collections.abc import Callable

from torch import Tensor

from sfumato.checks import meant, shown
from sfumato.errors import InputError
from sfumato.sampling.multistep import dpmpp_2m, lms, unipc
from sfumato.sampling.noise import SeededNoise
from sfumato.sampling.ode import dpm2, euler, heun
from sfumato.sampling.sde import ddim, ddpm, dpmpp_2m_sde, dpmpp_2s_a, dpmpp_sde, euler_a, lcm
from sfumato.sampling.step import Step

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm2": dpm2,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2s_a": dpmpp_2s_a,
    "unipc": unipc,
    "ddim": ddim,
    "ddpm": ddpm,
    "lms": lms,
    "lcm": lcm,
}

__all__ = ["SAMPLERS", "SeededNoise", "Step", "sampler_named"]


def sampler_named(name: str) -> Callable[..., Tensor]:
    """The sampler of that name; an unknown one is an `InputError` that lists them."""
    if name not in SAMPLERS:
        raise InputError(
            f"sampler {shown(name)} is unknown{meant(name, SAMPLERS)}; use one of {', '.join(SAMPLERS)}",
            argument="sampler",
        )
    return SAMPLERS[name]
