"""What a request asks of a machine: FLOPs by stage, counted on the model's own networks before anything is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato.diffusion.guidance import ALWAYS
from sfumato.drawing.clips import drawn_together
from sfumato.drawing.denoise import denoiser
from sfumato.drawing.request import enlarged_size, levels_of
from sfumato.families.published.trace import WHOLE
from sfumato.flops import count_flops, with_flops
from sfumato.generate import BATCH
from sfumato.memory import tracing
from sfumato.sampling import SeededNoise, sampler_named
from sfumato.tasks.latent import steps_to_run
from sfumato.types import Request

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.generate import Model
    from sfumato.memory import Stage

WINDOW = 300  # characters that a window of 75 tokens reads, roughly
KEPT = 64  # kinds of request that a model keeps the count of
LARGE = 4  # times a small model's own pixels: from there on tracing is quicker than a call
STAGES = ("text", "encode", "denoise", "decode")


@dataclass(frozen=True)
class Work:
    """One stage of one pass, of the pictures that are drawn together. flops: of one call for all of them; of denoising,
    of a guided call of the network. calls: how many; one without guidance is half of one. size: (width, height) that it
    works at.
    """

    stage: str
    flops: int
    calls: float
    pictures: int
    size: tuple[int, int]

    @property
    def total(self) -> float:
        return self.flops * self.calls


def work_of(model: Model, request: Request) -> tuple[Work, ...]:
    """The work of a request, in the order in which it is done. What a refiner does is not told apart: it counts as the
    model's own. With `reuse` the real work is less, by the calls that skip the deep part of the network.
    """
    request = model.complete(request)
    assert request.size is not None and request.steps is not None
    one = replace(request, count=1)
    size = request.size
    flops = counted(model, one, size)
    # each clip is told its own first picture, and drawn alone
    batch, told = (1, request.count) if request.moves else (BATCH, 1)
    begun, drawn = [Work("text", flops["text"], told, 1, size)], []
    if _encodes(request):
        begun.append(Work("encode", flops["encode"], 1, 1, size))
    passes = [(size, flops["denoise"], calls(model, request, request.strength))]
    if request.hires is not None:
        hires = request.hires
        size = enlarged_size(size, hires.scale, model.system.config.multiple)
        flops = counted(model, replace(one, hires=None, image=None, strength=None, mask=None), size)
        second = replace(request, steps=hires.steps or request.steps)
        passes.append((size, flops["denoise"], calls(model, second, hires.strength)))
    whole, rest = divmod(request.count, batch)
    for times, pictures in ((whole, batch), (1, rest)):
        if times and pictures:
            drawn += [Work("denoise", pictures * f, times * n, pictures, at) for at, f, n in passes]
            drawn.append(Work("decode", pictures * flops["decode"], times, pictures, size))
    return (*begun, *drawn)


def by_stage(work: tuple[Work, ...]) -> dict[str, int]:
    """FLOPs of each stage in whole."""
    totals = {stage: sum(part.total for part in work if part.stage == stage) for stage in STAGES}
    return {stage: round(total) for stage, total in totals.items() if total}


def counted(model: Model, request: Request, size: tuple[int, int]) -> dict[str, int]:
    """FLOPs of reading both prompts, of encoding where drawing begins with it, of one guided call of the network and of
    decoding, for one picture.

    Of a model that tells what drawing takes, on tensors without numbers; of a small one by doing each once, unless that
    would take long. Kept with the model.
    """
    key = _key(model, request, size)
    if key not in model.counted:
        _keep(model, key, _counted(model, request, size))
    return model.counted[key]


def remember(
    model: Model, request: Request, size: tuple[int, int], stages: Sequence[Stage], batch: int
) -> None:
    """Keep with the model what a trace for `batch` pictures has counted, so that it is not done again."""
    if request.hires is not None:  # its larger pass is one without a picture to begin with
        request = replace(request, hires=None, image=None, strength=None, mask=None)
    flops = {stage.name: stage.flops for stage in stages if stage.name in STAGES}
    one = {name: count if name == "text" else count // batch for name, count in flops.items()}
    _keep(model, _key(model, request, size), one)


def _key(model: Model, request: Request, size: tuple[int, int]) -> tuple[object, ...]:
    """What decides the FLOPs of a picture."""
    shown = tuple(control.name for control in request.controls or ())
    texts: tuple[object, ...] = (request.prompt, request.negative)
    if model.system.traces:  # read in windows: how many follows from the length
        texts = tuple(len(text or "") // WINDOW for text in (request.prompt, request.negative))
    return (
        size,
        request.frames or 1,
        request.guidance == 1,
        _encodes(request),
        request.first_given,
        request.text_length,
        shown,
        texts,
    )


def _encodes(request: Request) -> bool:
    """Whether drawing begins with encoding. A clip's first picture is encoded as it is told to the network."""
    return request.clip is not None if request.moves else request.image is not None


def _keep(model: Model, key: tuple[object, ...], flops: dict[str, int]) -> None:
    while len(model.counted) >= KEPT:
        model.counted.pop(next(iter(model.counted)), None)
    model.counted[key] = flops


def _counted(model: Model, request: Request, size: tuple[int, int]) -> dict[str, int]:
    if model.system.traces:
        stages = model.system.trace(request, size, 1, encodes=_encodes(request), offload="none")
        return {stage.name: stage.flops for stage in stages if stage.name in STAGES}
    frames = request.frames or 1
    shape = model.latent_shape(size[1], size[0], frames)
    film = request.moves and _is_large(model, request, size)  # its pieces are alike, and a trace knows it
    traced = model.system.trace_clip(replace(request, size=size)) if film else ()
    plain = Request(request.prompt, request.negative, size=size, guidance=request.guidance)
    if request.moves:
        plain = replace(plain, image=request.image, frames=frames, fps=request.fps, fit=request.fit)
    level = torch.tensor(0.5, dtype=torch.float64)
    with torch.inference_mode(), model.precision():
        cond, text = with_flops(model.condition, plain)
        whole = replace(model.complete(plain), guidance_interval=ALWAYS)
        with _counter(model, request, size) as count:
            x = torch.zeros(1, *shape, device=model.device)
            found = {"text": text, "denoise": 0}
            for (length, known), times in _stretches(model, request, shape[1]).items():
                told = cond
                if model.system.window is not None and request.moves:
                    told = replace(cond, channels=x[:, :, :known].expand(len(cond), -1, -1, -1, -1))
                step = count(denoiser(model, told, whole), x[:, :, :length], level)
                found["denoise"] += times * step
            if traced:
                found["decode"] = next(stage.flops for stage in traced if stage.name == "decode")
            else:
                found["decode"] = count(model.decode_pixels, x)
            if _encodes(request):
                pixels = torch.zeros(1, 3, frames, size[1], size[0], device=model.device)
                found["encode"] = count(model.system.encode, pixels)
        return found


def _stretches(model: Model, request: Request, latents: int) -> Counter[tuple[int, int]]:
    """(latents, those of them that are known) of what is drawn together, and how often that is."""
    kinds: Counter[tuple[int, int]] = Counter()
    done = int(request.first_given)
    for start, stop in drawn_together(model, request, latents):
        kinds[stop - start, done - start] += 1
        done = stop
    return kinds


def _is_large(model: Model, request: Request, size: tuple[int, int]) -> bool:
    """Whether its work is counted on tensors without numbers, by a model that can."""
    own = math.prod(model.preset["size"]) * (model.clip_preset["frames"] if request.moves else 1)
    traces = model.system.traces_clips if request.moves else model.system.traces_pictures
    return traces and math.prod(size) * (request.frames or 1) > LARGE * own


@contextmanager
def _counter(model: Model, request: Request, size: tuple[int, int]) -> Iterator[Callable[..., int]]:
    """What counts the FLOPs of a call: by doing it, or of a large one on tensors without numbers."""
    if not _is_large(model, request, size):
        yield count_flops
        return
    with tracing(WHOLE) as tracer:

        def count(call: Callable[..., Any], *args: Any) -> int:
            before = tracer.flops
            call(*args)
            return tracer.flops - before

        yield count


def calls(model: Model, request: Request, strength: float | None = None) -> float:
    """Calls of the network for one picture, by running the sampler on one number. One that is not guided, outside of
    `guidance_interval`, counts half.
    """
    assert request.sampler and request.steps
    sigmas = levels_of(model, request)
    if strength is not None:
        sigmas = sigmas[len(sigmas) - 1 - steps_to_run(request.steps, strength) :]
    if len(sigmas) == 1:
        return 0.0
    interval = request.guidance_interval or model.system.config.preset.interval
    weights: list[float] = []

    def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
        level = float(torch.as_tensor(sigma).max())
        guided = interval is None or interval[0] < level <= interval[1]
        weights.append(1.0 if guided or request.guidance == 1 else 0.5)
        return torch.zeros_like(x)

    noise = SeededNoise([0], (1, 1, 1, 1), "cpu", torch.float32)
    path = model.system.parameterization.path
    sampler_named(request.sampler)(denoise, noise.initial(), sigmas, path=path, noise=noise)
    return sum(weights)
