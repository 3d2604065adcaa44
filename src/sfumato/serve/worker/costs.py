"""What a request will take of this device, told before it is accepted; and what it took, learned from.

FLOPs and calls of the network are those of `receipts/work.py`. Seconds are learned from jobs that were drawn here, in
company: of a call of the network for one picture, and of all else, at the nearest size. Memory is planned for
checkpoints, and for models of our own traced on tensors without numbers.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from sfumato import planning
from sfumato.drawing.clips import drawn_together
from sfumato.drawing.request import enlarged_size
from sfumato.errors import InputError
from sfumato.families.published.trace import WHOLE
from sfumato.generate import BATCH, Model
from sfumato.memory import tracing
from sfumato.receipts.machine import read_machine
from sfumato.receipts.work import by_stage, calls, work_of
from sfumato.serve.worker.together import Spent
from sfumato.tasks.latent import steps_to_run
from sfumato.types import Request
from sfumato.video.frames import on_disk
from sfumato.video.write import held

WEIGHT = 0.3  # of what the last job says, against those before
UNKNOWN = 1e-6  # seconds for a pixel of a call, of a model that has drawn nothing yet
PIXEL = 3 * 4  # bytes of a decoded pixel: what drawing takes at least
WORDS = 8  # texts are counted and planned for by lengths of so many words
KEPT = 256  # kinds of request whose memory is remembered
Size = tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """One run of the sampler for one picture, or clip. calls: of the network; one without guidance is half of one."""

    size: Size
    steps: int
    calls: float
    frames: int = (
        1  # that are drawn together: of a long clip a part, for which the sampler runs several times
    )

    @property
    def pixels(self) -> int:
        """Of all frames that are drawn together."""
        return self.size[0] * self.size[1] * self.frames


@dataclass(frozen=True)
class Expected:
    """What a request will take. runs: of the sampler, for each picture or clip. need: bytes beside the weights. fps: of
    clips.
    """

    pictures: int
    runs: tuple[Pass, ...]
    seconds: float
    need: int
    flops: dict[str, int]  # by stage
    fps: float | None = None
    frames: int = 1  # of each

    @property
    def steps(self) -> int:
        """Steps of samplers until all is there: those of pictures drawn together are counted once."""
        together = 1 if self.frames > 1 else BATCH
        return math.ceil(self.pictures / together) * sum(run.steps for run in self.runs)

    @property
    def pixel_steps(self) -> int:
        return self.pictures * sum(run.steps * run.pixels for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        last = self.runs[-1].size
        moving = {"frames": self.frames, "fps": self.fps} if self.frames > 1 else {}
        return {
            "pictures": self.pictures,
            **moving,
            "size": list(last),
            "steps": sum(run.steps for run in self.runs),
            "calls": round(self.pictures * sum(run.calls for run in self.runs), 2),
            "pixel_steps": self.pixel_steps,
            "seconds": round(self.seconds, 4),
            "memory": self.need,
            "flops": self.flops,
        }


class Costs:
    """Of one model on one device. Threads may share it. memory: bytes that drawing may take beside the weights."""

    def __init__(self, model: Model, memory: int | None = None):
        self.model, self.memory = model, memory
        # no LoRAs: which of them are folded in, those who draw decide, and nothing here is to wait for them
        plain: Any = _WithoutAdapters(model.system)
        self.plain = Model(plain, model.device, model.name, model.dtype, annotators=model.annotators)
        self.watts = read_machine().price.watts
        self._call: dict[
            int, float
        ] = {}  # seconds of a call of the network, for a picture or clip of so many pixels
        self._rest: dict[int, float] = {}  # seconds of all else
        self._traced: dict[Size, int] = {}  # memory of a picture, by size
        self._need: dict[Any, int] = {}  # memory, by kind of request
        self._lock = threading.Lock()

    def expected(self, request: Request, kind: str = "") -> Expected:
        """Of a complete request. kind: of file that a clip is written to. `InputError` if the device's memory does not
        hold it.
        """
        runs = passes(self.model, request)
        one = sum(run.calls * self._at(self._call, run.pixels) for run in runs)
        one += self._at(self._rest, runs[-1].pixels)
        _check_disk(request)
        request = _nominal(request)
        seconds, frames = request.count * one, request.frames or 1
        need, writing = self._memory(request, runs), held(kind, frames, runs[-1].size)
        if writing > need:
            need = writing
            self._check_room(request, runs[-1].size, need)
        flops = by_stage(work_of(self.plain, request))
        return Expected(request.count, runs, seconds, need, flops, request.fps, frames)

    def joules(self, seconds: float) -> float | None:
        """What the device took, where the machine's price says its watts (`sfumato cost --watts --keep`)."""
        return None if self.watts is None else round(self.watts * seconds, 3)

    def learn(self, expected: Expected, spent: Spent) -> None:
        """From what a job took."""
        weighed = expected.pictures * sum(run.calls * run.pixels for run in expected.runs)
        pixels = expected.runs[-1].pixels
        with self._lock:
            if weighed:
                _mix(self._call, pixels, spent.network / weighed * pixels)
            _mix(self._rest, pixels, spent.other / expected.pictures)

    def _at(self, known: dict[int, float], pixels: int) -> float:
        """Seconds at so many pixels: as known, or in proportion to the nearest number that is."""
        with self._lock:
            if pixels in known:
                return known[pixels]
            if not known:
                return UNKNOWN * pixels
            near = min(known, key=lambda other: abs(math.log(other / pixels)))
            return known[near] * pixels / near

    def _memory(self, request: Request, runs: tuple[Pass, ...]) -> int:
        """Bytes: of a request of the same kind if there was one, else worked out."""
        sizes = tuple(run.size for run in runs)
        shown = tuple(sorted({(c.name, c.prepare or "", c.image.size) for c in request.controls or ()}))
        texts = request.prompt, request.negative, request.text_length
        key = sizes, request.frames, request.count, texts, request.image is None, request.clip is None, shown
        if key not in self._need:
            self._check_room(
                request, sizes[-1], runs[-1].pixels * PIXEL
            )  # what is far too large is not worked out
            need = self._worked_out(request, sizes)
            with self._lock:
                while len(self._need) >= KEPT:
                    self._need.pop(next(iter(self._need)))
                self._need[key] = need
        need = self._need[key]
        self._check_room(request, sizes[-1], need)
        return need

    def _check_room(self, request: Request, size: Size, need: int) -> None:
        """`InputError` if so many bytes are not there."""
        if self.memory is None or need <= self.memory:
            return
        frames = f"{request.frames} frames of " if request.moves else ""
        raise InputError(
            f"drawing {request.count} of {frames}{size[0]}x{size[1]} needs {planning.shown(need)} of memory, and "
            f"{planning.shown(self.memory)} are there; draw fewer, or smaller",
            argument="size",
        )

    def _worked_out(self, request: Request, sizes: tuple[Size, ...]) -> int:
        if planning.tells(self.model):
            # the room is what is free now that the weights are there, and the plan begins before they are
            plan = planning.plan(self.plain, request, self.model.system.offload)
            return max(stage.activations for stage in plan.stages)
        if request.moves and planning.tells_clips(self.model):
            return max(stage.activations for stage in planning.plan_clip(self.model, request).stages)
        largest = max(sizes, key=lambda size: size[0] * size[1])
        with self._lock:
            if largest not in self._traced:
                self._traced[largest] = traced(self.model, largest)
        drawing = self._traced[largest] * min(request.count, BATCH)
        return max(drawing, planning.prepares(self.model, request))


class _WithoutAdapters:
    """A system that takes no LoRAs."""

    def __init__(self, system: Any):
        self._system = system

    def __getattr__(self, name: str) -> Any:
        return None if name == "adapters" else getattr(self._system, name)


def _check_disk(request: Request) -> None:
    """`InputError` for a film whose frames do not fit on the disk, where they wait to be written."""
    frames, size = request.count * (request.frames or 1), request.size or (0, 0)
    need = on_disk(frames, size) if request.moves else 0
    if need and need > (free := shutil.disk_usage(tempfile.gettempdir()).free):
        raise InputError(
            f"{frames:,} frames of {size[0]}x{size[1]} need {planning.shown(need)} of the server's disk until they are "
            f"written, and {planning.shown(free)} are free; draw fewer, or smaller",
            argument="frames",
        )


def _nominal(request: Request) -> Request:
    """A request that takes as much, and stands for all of its kind: texts of about that length, no LoRAs."""
    texts = [
        None if text is None else "a " * (WORDS * math.ceil(len(text.split()) / WORDS))
        for text in (request.prompt, request.negative)
    ]
    return replace(request, prompt=texts[0] or "", negative=texts[1], seed=0, variation=None, loras=None)


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
    count = steps if strength is None else steps_to_run(steps, strength)
    called = calls(model, replace(request, size=size, steps=steps), strength) if count else 0.0
    if not request.moves:
        return Pass(size, count, called)
    latents = model.latent_shape(size[1], size[0], request.frames or 1)[1]
    times = len(drawn_together(model, request, latents))
    return Pass(size, times * count, times * called, math.ceil((request.frames or 1) / times))


def traced(model: Model, size: Size) -> int:
    """Bytes that a guided call for one picture, or decoding it, holds at its worst beside the weights."""
    with torch.inference_mode(), model.precision():
        cond = model.system.condition(["a", None], Request())
    with tracing(WHOLE) as tracer, model.precision():
        x = torch.empty(2, *model.latent_shape(size[1], size[0]), device=model.device)
        level = torch.empty(2, device=model.device)
        _, network = tracer.worst(lambda: model.system.network(x, level, cond))
        _, decoding = tracer.worst(lambda: model.system.decode(x[:1]))
    return max(network, decoding)


def _mix(known: dict[int, float], pixels: int, value: float) -> None:
    known[pixels] = value if pixels not in known else (1 - WEIGHT) * known[pixels] + WEIGHT * value
