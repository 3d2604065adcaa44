"""What a request will take of this device, told before it is accepted; and what it took, learned from.

Seconds are those of earlier jobs of the same model: of a call of the network for one picture, and of all else, at the
nearest size that was drawn. Memory is traced on tensors without numbers. FLOPs are counted by running a call.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from sfumato import planning
from sfumato.drawing.request import enlarged_size, levels_of
from sfumato.errors import InputError
from sfumato.families.published.trace import WHOLE
from sfumato.generate import BATCH, Model
from sfumato.memory import tracing
from sfumato.receipts.flops import count_flops
from sfumato.sampling import SeededNoise, sampler_named
from sfumato.serve.worker.together import Bench, Spent
from sfumato.tasks.latent import steps_to_run
from sfumato.types import Request

WEIGHT = 0.3  # of what the last job says, against those before
UNKNOWN = 1e-6  # seconds for a pixel of a call, of a model that has drawn nothing yet
COUNTED = 4  # times the model's own pixels: FLOPs of larger pictures are not counted, as counting is drawing
Size = tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """One run of the sampler for one picture. steps: of the sampler; calls: of the network."""

    size: Size
    steps: int
    calls: int

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


@dataclass(frozen=True)
class Expected:
    """What a request will take. runs: of the sampler, for each picture. need: bytes beside the weights."""

    pictures: int
    runs: tuple[Pass, ...]
    seconds: float
    need: int
    flops: int | None

    @property
    def steps(self) -> int:
        """Steps of samplers until all pictures are there: those of pictures drawn together are counted once."""
        return math.ceil(self.pictures / BATCH) * sum(run.steps for run in self.runs)

    @property
    def pixel_steps(self) -> int:
        return self.pictures * sum(run.steps * run.pixels for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        last = self.runs[-1].size
        return {
            "pictures": self.pictures,
            "size": list(last),
            "steps": sum(run.steps for run in self.runs),
            "calls": self.pictures * sum(run.calls for run in self.runs),
            "pixel_steps": self.pixel_steps,
            "seconds": round(self.seconds, 4),
            "memory": self.need,
            "flops": self.flops,
        }


class Costs:
    """Of one model on one device. Threads may share it."""

    def __init__(self, model: Model, bench: Bench, memory: int | None = None):
        self.model, self.bench, self.memory = model, bench, memory
        self._call: dict[Size, float] = {}  # seconds of a call of the network, for a picture of that size
        self._rest: dict[Size, float] = {}  # seconds of all else
        self._need: dict[Any, int] = {}
        self._flops: dict[Size, tuple[int, int]] = {}  # of a guided call, of the decoding
        self._lock = threading.Lock()

    def expected(self, request: Request) -> Expected:
        """Of a complete request. `InputError` if the device's memory does not hold it."""
        runs = passes(self.model, request)
        one = sum(run.calls * self._at(self._call, run.size) for run in runs) + self._at(
            self._rest, runs[-1].size
        )
        return Expected(
            request.count,
            runs,
            request.count * one,
            self._memory(request, runs),
            self._counted(request.count, runs),
        )

    def learn(self, expected: Expected, spent: Spent) -> None:
        """From what a job took."""
        calls = expected.pictures * sum(run.calls * run.pixels for run in expected.runs)
        size = expected.runs[-1].size
        with self._lock:
            if calls:
                _mix(self._call, size, spent.network / calls * size[0] * size[1])
            _mix(self._rest, size, spent.other / expected.pictures)

    def _at(self, known: dict[Size, float], size: Size) -> float:
        """Seconds at a size: as known, or in proportion to the pixels of the nearest that is."""
        with self._lock:
            if size in known:
                return known[size]
            pixels = size[0] * size[1]
            if not known:
                return UNKNOWN * pixels
            near = min(known, key=lambda other: abs(math.log(other[0] * other[1] / pixels)))
            return known[near] * pixels / (near[0] * near[1])

    def _memory(self, request: Request, runs: tuple[Pass, ...]) -> int:
        if planning.tells(self.model):
            plan = planning.plan(
                self.model, request, getattr(self.model.system, "offload", None), self.memory
            )
            if not plan.fits:
                raise planning.refusal(self.model, request, plan)
            return max(stage.activations for stage in plan.stages)
        size = max((run.size for run in runs), key=lambda side: side[0] * side[1])
        with self._lock:
            if size not in self._need:
                self._need[size] = traced(self.model, size)
            need = self._need[size] * min(request.count, BATCH)
        if self.memory is not None and need > self.memory:
            raise InputError(
                f"drawing {request.count} of {size[0]}x{size[1]} needs {planning.shown(need)} of memory, and "
                f"{planning.shown(self.memory)} are there; draw fewer, or smaller",
                argument="size",
            )
        return need

    def _counted(self, pictures: int, runs: tuple[Pass, ...]) -> int | None:
        """FLOPs of all guided calls and of decoding; None where counting would take long."""
        width, height = self.model.preset["size"]
        if hasattr(self.model.system, "trace") or any(run.pixels > COUNTED * width * height for run in runs):
            return None
        for run in runs:
            if run.size not in self._flops:
                self._flops[run.size] = self.bench.do(lambda size=run.size: _flops(self.model, size))  # type: ignore[misc]
        decoding = self._flops[runs[-1].size][1]
        return pictures * (sum(run.calls * self._flops[run.size][0] for run in runs) + decoding)


def passes(model: Model, request: Request) -> tuple[Pass, ...]:
    """The runs of the sampler that a complete request is, for each picture."""
    assert request.size and request.steps
    first = _pass(model, request, request.size, request.steps, request.strength)
    if request.hires is None:
        return (first,)
    size = enlarged_size(request.size, request.hires.scale, model.system.config.multiple)
    steps = request.hires.steps or request.steps
    return (first, _pass(model, request, size, steps, request.hires.strength))


def _pass(model: Model, request: Request, size: Size, steps: int, strength: float | None) -> Pass:
    """Calls are counted by running the sampler on one number."""
    assert request.sampler
    count = steps if strength is None else steps_to_run(steps, strength)
    if not count:
        return Pass(size, 0, 0)
    sigmas = levels_of(model, replace(request, size=size, steps=steps))[-count - 1 :]
    calls = 0

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    noise = SeededNoise([0], (1, 1, 1, 1))
    path = model.system.parameterization.path
    sampler_named(request.sampler)(denoise, noise.initial(), sigmas, path=path, noise=noise)
    return Pass(size, count, calls)


def traced(model: Model, size: Size) -> int:
    """Bytes that a guided call for one picture, or decoding it, holds at its worst moment beside the weights."""
    with torch.inference_mode(), model.precision():
        cond = model.system.condition(["a", None], Request())
    with tracing(WHOLE) as tracer, model.precision():
        x = torch.empty(2, *model.latent_shape(size[1], size[0]), device=model.device)
        level = torch.empty(2, device=model.device)
        _, network = tracer.worst(lambda: model.system.network(x, level, cond))
        _, decoding = tracer.worst(lambda: model.system.decode(x[:1]))
    return max(network, decoding)


def _flops(model: Model, size: Size) -> tuple[int, int]:
    x = torch.zeros(2, *model.latent_shape(size[1], size[0]), device=model.device)
    level = torch.full((2,), 0.5, device=model.device)
    with model.precision():
        cond = model.system.condition(["a", None], Request())
        return count_flops(model.system.network, x, level, cond), count_flops(model.system.decode, x[:1])


def _mix(known: dict[Size, float], size: Size, value: float) -> None:
    known[size] = value if size not in known else (1 - WEIGHT) * known[size] + WEIGHT * value
