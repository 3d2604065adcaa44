"""The tables of docs/samplers.md, from registries, docstrings and what the samplers do: `python docs/tables.py`.

Only what stands between two markers is written; a test holds the page against this.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato.diffusion.exact import TwoPeaks
from sfumato.diffusion.path import VE
from sfumato.diffusion.schedules import SCHEDULES, beta_levels, beta_table, flow_levels, sigmas_for
from sfumato.errors import InputError
from sfumato.families.sd.levels import ALIGNED
from sfumato.receipts import webui
from sfumato.sampling import SAMPLERS, SeededNoise

PAGE = Path(__file__).parent / "samplers.md"
STEPS = 10
SHAPE = (1, 1, 1, 9)
WITHOUT_ODE = {"ddpm", "lcm"}  # samplers that have no setting without fresh noise


def written(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in (("samplers", sampler_table()), ("schedules", schedule_table())):
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda match, table=table: match[1] + table + match[2], page)
        if count != 1:
            raise ValueError(f"the page needs one place marked {name}")
    return page


def sampler_table() -> str:
    rows = []
    for name, sampler in SAMPLERS.items():
        calls, draws = counted(sampler)
        order = "–" if name in WITHOUT_ODE else str(measured_order(sampler))
        noise = "yes" if draws else "no"
        label = webui.SAMPLERS.get(name, "–")
        rows.append((f"`{name}`", label, order, str(calls), noise, said(sampler)))
    return table(("name", "web UIs", "order", f"calls for {STEPS} steps", "fresh noise", "what it is"), rows)


def schedule_table() -> str:
    rows = []
    of_sd = replace(beta_levels(beta_table()), aligned=ALIGNED)
    for name, schedule in SCHEDULES.items():
        where = [kind for kind, levels in (("VE", of_sd), ("FLOW", flow_levels())) if works(name, levels)]
        label = webui.SCHEDULES.get(name, "–")
        rows.append((f"`{name}`", label, ", ".join(where), said(schedule)))
    return table(("name", "web UIs", "for", "what it is"), rows)


def works(name: str, levels: object) -> bool:
    try:
        sigmas_for(name, STEPS, levels, tokens=1024)
    except InputError:
        return False
    return True


def counted(sampler: Callable[..., Tensor]) -> tuple[int, int]:
    """(calls of the denoiser, draws of fresh noise) of a run to sigma 0 as the sampler stands."""
    counts = [0, 0]
    inner, noise = TwoPeaks().denoiser(VE), SeededNoise([0], SHAPE, dtype=torch.float64)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        counts[0] += 1
        return inner(x, sigma)

    def draw(step: int, number: int = 0) -> Tensor:
        counts[1] += 1
        return noise(step, number)

    sigmas = sigmas_for("karras", STEPS, beta_levels(beta_table()))
    sampler(denoise, noise.initial() * float(sigmas[0]), sigmas, path=VE, noise=draw)
    return counts[0], counts[1]


def measured_order(sampler: Callable[..., Tensor]) -> int:
    """log2 of what twice the steps divide the error by, on an ODE with a known solution, without fresh noise."""
    options = {"eta": 0.0} if "eta" in inspect.signature(sampler).parameters else {}
    data, high, low = TwoPeaks(), 8.0, 0.15
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, *SHAPE) * high
    errors = []
    for steps in (64, 128):
        u = (
            torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2
        )  # short at first: multistep methods start low
        a, b = VE.half_log_snr(high), VE.half_log_snr(low)
        y = sampler(data.denoiser(VE), x, VE.sigma_at(a + (b - a) * u), path=VE, noise=None, **options)
        errors.append(float((y - data.carry(VE, x, high, low)).abs().mean()))
    return round(math.log2(errors[0] / errors[1]))


def said(thing: Callable[..., object]) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
