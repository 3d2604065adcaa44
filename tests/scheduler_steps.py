"""A diffusers scheduler and a sampler of ours, step by step on one analytic denoiser, in double precision.

diffusers computes in float32 throughout; here its modules see a torch and a numpy whose float32 is float64, so that
agreement to 1e-8 can be asked.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np
import torch

from sfumato.diffusion.path import FLOW, VP
from sfumato.diffusion.schedules import NoiseLevels, beta_levels, beta_table
from sfumato.sampling import SAMPLERS, SeededNoise

STEPS = 10
SHAPE = (2, 3, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = NoiseLevels(beta_levels(beta_table()).sigmas, log=False)
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


def scheduler_in_double(monkeypatch, name, noise=None, **config):
    """A diffusers scheduler in double precision that draws our noise, step k's at its k-th draw."""
    cls = getattr(importlib.import_module("diffusers"), name)
    module = sys.modules[cls.__module__]
    monkeypatch.setattr(module, "torch", Double(torch))
    monkeypatch.setattr(module, "np", Double(np))
    if noise is not None and hasattr(module, "randn_tensor"):
        count = iter(range(1000))
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise(next(count)))
    made = cls(**config)
    made.set_timesteps(STEPS)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    return made


def their_steps(made, path, denoise, x, level, **step_options):
    """x after each call of `step`; the network's answer is eps, or the velocity on FLOW, at level(scheduler)."""
    seen = []
    for t in made.timesteps:
        sigma = level(made, t)
        denoised = denoise(x, torch.tensor(sigma, dtype=torch.float64))
        alpha = 1.0 if path is FLOW else path.alpha(sigma)  # velocity (x − x0)/sigma, or eps
        x = made.step((x - alpha * denoised) / sigma, t, x, **step_options).prev_sample
        seen.append(x)
    return seen


def our_steps(name, path, denoise, x, sigmas, noise, **options):
    seen = []
    SAMPLERS[name](denoise, x, sigmas, path=path, noise=noise, on_step=lambda s: seen.append(s.x), **options)
    return seen


def compare_steps(ours, theirs, broken_end=False):
    assert len(ours) == len(theirs)
    assert torch.isfinite(ours[-1]).all()
    if broken_end:
        assert torch.isnan(theirs[-1]).all()
        ours, theirs = ours[:-1], theirs[:-1]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, i=i: f"step {i}: {m}")
    assert float((ours[-1] - ours[0]).abs().max()) > 0.1


def fresh():
    return SeededNoise([3, 4], SHAPE, dtype=torch.float64)


def at_index(made, _):
    return float(made.sigmas[made.step_index or 0])


def at_index_vp(made, _):
    return VP.from_ratio(float(made.sigmas[made.step_index or 0]))
