"""What a picture costs: told before it is drawn, and measured after. FLOPs, seconds, memory, energy and money.

Both bills have the same fields, so that they can be laid beside each other:
    flops, seconds: by stage, and seconds in all; peak_bytes: the most memory; joules; money with its currency.
What is not known is None.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato import planning
from sfumato.memory import peak_resident
from sfumato.receipts.machine import Machine, Point, read_machine
from sfumato.receipts.work import STAGES, Work, by_stage, counted, work_of
from sfumato.tasks.canvas import nearest_size
from sfumato.types import Request, Result

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.sampling import Step

PROMPT = "a red metal sphere behind a small blue cube"  # where none is given
PATIENCE = 1.0  # seconds that a call is repeated for when it is measured
MEASURED = ((0.5, 1), (1.0, 1), (1.0, 4))  # of the sides of the model's own size, and pictures together
BATCHED = ("denoise", "decode")  # stages that work on several pictures together
POWERCAP = Path("/sys/class/powercap")  # of Linux: energy counted by the processor (RAPL)


def estimate(model: Model, request: Request, machine: Machine) -> dict[str, Any]:
    """The bill of a request before it is drawn, as plain JSON. basis: measured, where this model was measured on this
    machine; similar, where another was in its place; None, where seconds are not known.
    """
    request = model.complete(request)
    work = work_of(model, request)
    times = [machine.seconds(model, part.stage, part.flops) for part in work]
    known = [found for found in times if found is not None]
    seconds, basis = None, None
    if len(known) == len(work):
        basis = "measured" if all(measured for _, measured in known) else "similar"
        seconds = dict.fromkeys((part.stage for part in work), 0.0)
        for part, (once, _) in zip(work, known, strict=True):
            seconds[part.stage] += once * part.calls
    total = None if seconds is None else sum(seconds.values())
    return _bill(work, request, seconds, total, _planned_bytes(model, request), None, machine) | {
        "basis": basis
    }


def receipt(
    model: Model, request: Request, recipe: dict[str, Any], machine: Machine, joules: float | None = None
) -> dict[str, Any]:
    """The bill of what was drawn: `recipe` holds the seconds of its stages. joules: counted while it was drawn.

    Of a drawing that shall give equal files each time the recipe holds no seconds, and nothing here is measured.
    """
    request = model.complete(request)
    work = work_of(model, request)
    if "stages" not in recipe:
        return _bill(work, request, None, None, None, None, machine)
    seconds = dict(recipe["stages"])
    return _bill(work, request, seconds, sum(seconds.values()), _peak(model), joules, machine)


def drawn(model: Model, request: Request, on_step: Callable[[Step], None] | None = None) -> Result:
    """Pictures or clips as `Model.generate` draws them, with the receipt in the recipe, by this machine's price.

    Counting FLOPs takes a call of each network for requests of a kind that were not counted before.
    """
    meter = Meter()
    result = model.generate(request, on_step)
    bill = receipt(model, request, result.recipe, read_machine(), meter.joules())
    return replace(result, recipe=result.recipe | {"receipt": bill})


def calibrate(model: Model, machine: Machine, told: Callable[[str], None] = lambda text: None) -> Machine:
    """The machine with the times of a model's stages, measured at its own size, at half of its sides and, where that is
    quick, for four pictures together. Each call is done once to warm up, and the median of some more counts.
    """
    times: dict[str, list[Point]] = {stage: [] for stage in STAGES}
    width, height = model.preset["size"]
    for share, pictures in MEASURED:
        size = nearest_size((int(width * share), int(height * share)), model.system.config.multiple)
        request = model.complete(Request(PROMPT, size=size))
        flops = counted(model, request, size) | _encoding(model, request, size)
        for stage, call in _calls(model, request, size, pictures).items():
            if pictures > 1 and (stage not in BATCHED or times[stage][-1][1] > PATIENCE):
                continue
            told(f"{stage} of {pictures} at {size[0]}x{size[1]}")
            if flops.get(stage):
                times[stage].append((float(pictures * flops[stage]), _timed(call, model.device)))
    return machine.learned(
        model, {stage: list(dict(points).items()) for stage, points in times.items() if points}
    )


class Meter:
    """Joules that the machine counts while it is open; None where it counts none."""

    def __init__(self) -> None:
        self._before = _counters()

    def joules(self) -> float | None:
        """Since it was made."""
        now = _counters()
        if not self._before or self._before.keys() != now.keys():
            return None
        used = [now[name] - before for name, before in self._before.items()]
        return None if min(used) < 0 else sum(used) / 1e6  # a counter that began anew


def _counters() -> dict[str, int]:
    """Microjoules of each package, where they may be read."""
    found = {}
    for place in sorted(POWERCAP.glob("intel-rapl:[0-9]")) if POWERCAP.is_dir() else ():
        try:
            found[place.name] = int((place / "energy_uj").read_text())
        except (OSError, ValueError):
            return {}
    return found


def _encoding(model: Model, request: Request, size: tuple[int, int]) -> dict[str, int]:
    """FLOPs of encoding a picture of that size."""
    from PIL import Image

    shown = model.complete(replace(request, image=Image.new("RGB", size)))
    return {"encode": counted(model, shown, size).get("encode", 0)}


@torch.inference_mode()
def _calls(
    model: Model, request: Request, size: tuple[int, int], pictures: int
) -> dict[str, Callable[[], Any]]:
    """One call of each stage, for so many pictures of that size."""
    pixels = torch.zeros(1, 3, 1, size[1], size[0], device=model.device)
    x = torch.randn(pictures, *model.latent_shape(size[1], size[0]), device=model.device)
    level = model.system.levels.sigmas.double().median()
    denoise = model.denoiser(model.condition(request), request)

    @torch.inference_mode()
    def encode() -> None:
        with model.precision():
            model.system.encode(pixels)

    @torch.inference_mode()
    def step() -> None:
        denoise(x, level)

    return {
        "text": lambda: model.condition(request),
        "encode": encode,
        "denoise": step,
        "decode": lambda: model.decode_pixels(x),
    }


def _bill(
    work: tuple[Work, ...],
    request: Request,
    seconds: dict[str, float] | None,
    total: float | None,
    peak: int | None,
    joules: float | None,
    machine: Machine,
) -> dict[str, Any]:
    price = machine.price
    steps = sum(
        part.calls * part.pictures * (request.frames or 1) * part.size[0] * part.size[1] / 1e6
        for part in work
        if part.stage == "denoise"
    )
    if joules is None and price.watts is not None and total is not None:
        joules = price.watts * total
    money = None if total is None else price.money(total, steps)
    rounded = None if seconds is None else {stage: round(value, 4) for stage, value in seconds.items()}
    return {
        "pictures": request.count,
        "flops": by_stage(work),
        "seconds": rounded,
        "total_seconds": None if total is None else round(total, 4),
        "megapixel_steps": round(steps, 6),
        "peak_bytes": peak,
        "joules": None if joules is None else round(joules, 3),
        "money": None if money is None else round(money, 9),
        "currency": price.currency if money is not None else None,
    }


def _planned_bytes(model: Model, request: Request) -> int | None:
    """Of the plan that fits, or of the least; None where none can be made, of another engine."""
    if planning.tells(model):
        return planning.plan(model, request).peak
    if request.moves:
        return planning.plan_clip(model, request).peak if planning.tells_clips(model) else None
    return planning.plan_pictures(model, request).peak if model.system.traces_pictures else None


def _peak(model: Model) -> int:
    return torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else peak_resident()


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: the median of those that fit into `PATIENCE`, at least one, after one to warm up."""
    call()
    times: list[float] = []
    while sum(times) < PATIENCE or not times:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
