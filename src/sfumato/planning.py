"""What a drawing will need in memory, before weights are read, and which way of keeping the networks fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from sfumato.drawing.request import enlarged_size
from sfumato.errors import InputError
from sfumato.generate import BATCH, Model
from sfumato.memory import OFFLOADS, MemoryPlan, Stage, available, check_offload, resident
from sfumato.receipts.work import remember
from sfumato.tasks.canvas import by, nearest_size
from sfumato.types import Request
from sfumato.video.frames import in_memory
from sfumato.video.write import held

FILLED = 0.92  # of the memory that is allowed: so far a peak was above its plan (docs/memory.md)
KERNELS = 48 << 20  # bytes that libraries keep on a CPU once they have worked: code, and pages of theirs
ATTEMPTS = 3  # to fill it: layers laid out for the processor are a little larger than in their files


def plan(model: Model, request: Request, offload: str | None = None, limit: int | None = None) -> MemoryPlan:
    """The plan of drawing a request: the first level of offload that fits, or the one named, whether it fits or not.

    limit: bytes that the user allows; the machine's memory limits in any case. The model must be one that `tells`.
    If it was opened with an offload, nothing is read but headers. A refiner counts, with the networks of its own.
    """
    plans = (plan_of(model, request, level, limit) for level in ([offload] if offload else offloads(model)))
    return first_fitting(plans)


def filled(model: Model, request: Request, found: MemoryPlan) -> MemoryPlan:
    """The plan with as many of the denoiser's layers in memory as fit, if it is one of "sequential" that fits.

    It leaves no room for a larger request. Beside a refiner nothing is kept.
    """
    if found.offload != "sequential" or not found.fits or model.refiner is not None:
        return found
    room = int(found.allowed * FILLED)
    working = [stage.bytes for stage in found.stages if stage.name in ("load", "denoise")]
    keep = room - found.base - max(working)
    for _ in range(ATTEMPTS):
        if keep <= 0:
            break
        fuller = plan_of(model, request, "sequential", found.limit, keep)
        if fuller.peak <= max(room, found.peak):
            return fuller
        keep -= fuller.peak - room
    return found


def tells(model: Model) -> bool:
    """Whether what drawing takes can be told before it is done: of a checkpoint that PyTorch runs."""
    return all(each.system.traces and each.system.engine == "torch" for each in with_refiner(model))


def tells_clips(model: Model) -> bool:
    """Whether a model that tells no plan of pictures, and is open already, tells one of clips."""
    return model.system.traces_clips


def plan_clip(
    model: Model, request: Request, limit: int | None = None, kind: str | None = None
) -> MemoryPlan:
    """The plan of drawing a clip with a model that `tells_clips`, all of it in memory. kind: of file that it is
    written to (`video.formats.WRITTEN`); None is one that is written frame after frame.
    """
    request = model.complete(request)
    assert request.size is not None and request.frames is not None
    with model.precision():
        stages = model.system.trace_clip(request)
    if writing := held(kind or "", request.frames, request.size):
        drawn = in_memory(request.count * request.frames, request.size)
        stages = (*stages, Stage("write", stages[0].weights, writing + drawn))
    return _all_in_memory(model, stages, limit)


def plan_pictures(model: Model, request: Request) -> MemoryPlan:
    """The plan of drawing pictures with a small model that is open already (`traces_pictures`), all of it in memory."""
    request = model.complete(request)
    encodes = request.image is not None or request.hires is not None
    with model.precision():
        stages = model.system.trace_pictures(
            request, final_size(model, request), min(request.count, BATCH), encodes=encodes
        )
    return _all_in_memory(model, stages, None)


def _all_in_memory(model: Model, stages: tuple[Stage, ...], limit: int | None) -> MemoryPlan:
    """The plan of a model whose weights are in the process already."""
    place = model.device
    held = max(0, resident() - stages[0].weights) if place.type == "cpu" else 0
    dtype = str(model.dtype).removeprefix("torch.")
    return MemoryPlan(place.type, dtype, "none", held, stages, available(place), limit)


def final_size(model: Model, request: Request) -> tuple[int, int]:
    """The size of a complete request's last pass."""
    assert request.size is not None
    if request.hires is None:
        return request.size
    return enlarged_size(request.size, request.hires.scale, model.system.config.multiple)


def with_refiner(model: Model) -> list[Model]:
    """The model and its refiner, if it has one."""
    return [model] if model.refiner is None else [model, model.refiner]


def offloads(model: Model) -> tuple[str, ...]:
    """The levels of offload that the model and its refiner can be kept in."""
    return tuple(
        name for name in OFFLOADS if all(name in each.system.offloads for each in with_refiner(model))
    )


def follow(model: Model, plan: MemoryPlan) -> Model:
    """The model with its networks kept as the plan says; of "none" all of them are opened now."""
    return offloaded(model, plan.offload, plan.kept)


def offloaded(model: Model, offload: str, keep: int = 0) -> Model:
    """The model, and its refiner, with another way to keep their networks; keep: as of `MemoryPlan.kept`."""
    return _changed(model, lambda system: system.offloaded(offload, keep))


def _changed(model: Model, change: Callable[[Any], Any]) -> Model:
    """The model with its system changed, and that of its refiner."""
    refiner = None if model.refiner is None else _changed(model.refiner, change)
    changed = Model(
        change(model.system), model.device, model.name, refiner=refiner, annotators=model.annotators
    )
    changed.counted = model.counted
    return changed


def plan_of(model: Model, request: Request, offload: str, limit: int | None, keep: int = 0) -> MemoryPlan:
    """The plan of one level of offload; keep: as of `MemoryPlan.kept`."""
    check_offload(offload)
    request = model.complete(request)
    size = final_size(model, request)
    # a clip's first picture is encoded when it is told to the network, and clips are drawn one by one
    encodes = not request.moves and (request.image is not None or request.hires is not None)
    encodes = encodes or request.clip is not None
    batch = 1 if request.moves else min(request.count, BATCH)
    stages = model.system.trace(request, size, batch, encodes=encodes, offload=offload, keep=keep)
    remember(model, request, size, stages, batch)
    if model.refiner is not None:
        second = model.refiner.system.trace(request, size, batch, encodes=False, offload=offload)
        stages = _together(stages, second)
    place = model.device
    if (most := prepares(model, request)) > 0:
        before = next(k for k, stage in enumerate(stages) if stage.name == "denoise")
        made = Stage("annotate", stages[before].weights, most)
        stages = (*stages[:before], made, *stages[before:])
    return MemoryPlan(
        device=place.type,
        dtype=str(model.dtype).removeprefix("torch."),
        offload=offload,
        base=resident() + KERNELS if place.type == "cpu" else 0,
        stages=stages,
        available=available(place),
        limit=limit,
        kept=keep,
    )


def prepares(model: Model, request: Request) -> int:
    """Bytes of the largest of the networks that make a request's control pictures, each opened for its picture and let
    go after it. They work on the CPU: beside a GPU none of its memory is theirs.
    """
    if model.device.type != "cpu":
        return 0
    makers = [
        (model.annotators.get(control.prepare or ""), control.image) for control in request.controls or ()
    ]
    return max((maker.memory(image.size) for maker, image in makers if maker is not None), default=0)


def _together(first: tuple[Stage, ...], second: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages of a model and of its refiner, which decodes nothing. While one works, the other keeps at most what
    it keeps in its largest stage: all of its networks, or one.
    """

    def beside(stages: tuple[Stage, ...], others: tuple[Stage, ...]) -> list[Stage]:
        most = max(stage.weights for stage in others)
        return [replace(stage, weights=stage.weights + most) for stage in stages]

    refiner = [replace(s, name=f"refiner {s.name}") for s in beside(second, first) if s.name != "decode"]
    *before, decode = beside(first, second)
    return (*before, *refiner, decode)


def first_fitting(plans: Iterator[MemoryPlan]) -> MemoryPlan:
    """The first of the plans that fits, or else the one that needs least."""
    seen = []
    for found in plans:
        if found.fits or found.allowed <= found.base:  # by no other way either
            return found
        seen.append(found)
    return min(seen, key=lambda found: found.peak)


def refusal(model: Model, request: Request, found: MemoryPlan) -> InputError:
    """What to say of a plan that does not fit, with what would: a narrower type, or a smaller size."""
    request = model.complete(request)
    if found.allowed <= found.base:
        remedy = f"the program alone, before it has read a model, takes {shown(found.base)}: allow more"
    else:
        ways = _ways(model, request, found)
        remedy = (
            f"what fits: {' or '.join(ways)}" if ways else "no smaller size or type fits: a smaller model may"
        )
    return _refused(request, found, f" with `offload` {found.offload}", remedy)


def _refused(request: Request, found: MemoryPlan, how: str, remedy: str) -> InputError:
    """The sentence of both refusals. how: of what the plan is, besides the request."""
    assert request.size is not None
    many = f"{request.frames} frames" if request.moves else request.count
    bound = (
        f"`memory` allows {shown(found.allowed)}" if found.limited else f"{shown(found.allowed)} are there"
    )
    return InputError(
        f"drawing {many} of {by(request.size)} needs {shown(found.peak)} of memory{how}, and {bound}; {remedy}",
        argument="memory",
    )


def _ways(model: Model, request: Request, found: MemoryPlan) -> list[str]:
    """Options with which a complete request fits, each with what it needs."""
    assert request.size is not None
    ways = []
    possible = offloads(model)
    for level in possible[possible.index(found.offload) + 1 :]:
        if (less := plan_of(model, request, level, found.limit)).fits:
            ways.append(f"`offload` {level} ({shown(less.peak)})")
            break
    if model.dtype == torch.float32:
        narrow = _changed(model, lambda system: replace(system, dtype=torch.bfloat16))
        if (least := plan(narrow, request, found.offload, found.limit)).fits:
            ways.append(f"`dtype` bf16 ({shown(least.peak)})")
    if request.hires is None and (request.image is None or request.moves):
        for share in (0.75, 0.5, 0.25):
            size = nearest_size(
                (int(request.size[0] * share), int(request.size[1] * share)), model.system.config.multiple
            )
            smaller = plan(model, replace(request, size=size, count=1), found.offload, found.limit)
            if smaller.fits:
                ways.append(f"`size` {by(size)} ({shown(smaller.peak)})")
                break
    if request.moves:
        fewer = replace(request, frames=_half(model, request), count=1)
        if (least := plan(model, fewer, found.offload, found.limit)).fits:
            ways.append(f"`frames` {fewer.frames} ({shown(least.peak)})")
    return ways


def refusal_of_clip(model: Model, request: Request, found: MemoryPlan, kind: str | None = None) -> InputError:
    """What to say of a clip's plan that does not fit, with what would: a smaller size, or fewer frames."""
    request = model.complete(request)
    assert request.size is not None
    ways = []
    half = nearest_size((request.size[0] // 2, request.size[1] // 2), model.system.config.multiple)
    smaller, fewer = replace(request, size=half), replace(request, frames=_half(model, request))
    for option, other in ((f"`size` {by(half)}", smaller), (f"`frames` {fewer.frames}", fewer)):
        if other != request and (least := plan_clip(model, other, found.limit, kind)).fits:
            ways.append(f"{option} ({shown(least.peak)})")
    remedy = f"what fits: {' or '.join(ways)}" if ways else "no shorter or smaller clip fits"
    return _refused(request, found, "", remedy)


def _half(model: Model, request: Request) -> int:
    """Frames of half of the latents of a complete request for a clip; of two at least, or it would be a picture."""
    assert request.size is not None and request.frames is not None
    width, height = request.size
    latents = model.system.latent_shape(request.frames, height, width)[1]
    return model.system.frames_of(max(2, (latents + 1) // 2))


def shown(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
