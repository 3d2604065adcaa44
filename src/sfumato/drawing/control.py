"""ControlNets at work in a drawing: which act at a level, and what they add together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sfumato import checks
from sfumato.errors import InputError
from sfumato.pictures import BLACK, flatten
from sfumato.tasks.canvas import canvas
from sfumato.tasks.hints import check_hints, hint
from sfumato.tasks.latent import steps_to_run
from sfumato.tasks.pixels import to_pixels
from sfumato.types import Conditioning, Control, Request

if TYPE_CHECKING:
    from sfumato.generate import Model

# (x, time, cond, guess) → what is added to the network, in the order in which it takes it
Adds = Callable[[Tensor, Tensor, Conditioning, bool], tuple[Tensor, ...]]
Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Acting:
    """One ControlNet shown its picture. low, high: it acts where low <= time <= high."""

    adds: Adds
    weight: float
    guess: bool
    low: float
    high: float


def acting(model: Model, request: Request, sigmas: Tensor) -> list[Acting]:
    """The ControlNets of a complete request, opened, as they are to act over the schedule `sigmas`, (S + 1,).

    Those that the model does not have are left out: a refiner draws without them.
    """
    assert request.size is not None
    found = []
    times = model.system.parameterization.network_time(sigmas[:-1].double()).tolist()
    for control in request.controls or ():
        if control.name not in model.system.controls:
            continue
        shown = hint(control, request.size, request.fit, model.system.config.multiple, model.annotators)
        pixels = (to_pixels(shown)[None, :, 0].to(model.device) + 1) / 2  # (1, 3, H, W) in [0, 1]
        steps = [k for k in range(len(times)) if _acts(k, len(times), control.start, control.end)]
        if not steps or control.weight == 0:
            continue
        # a step's levels are its first and those below it, above the first of the next
        low = times[steps[-1] + 1] if steps[-1] + 1 < len(times) else -torch.inf
        more = {}
        if control.name in model.system.masked_controls:
            more = {"mask": _to_paint(model, request)}
        with model.precision():
            adds = model.system.controller(control.name, pixels, **more)
        found.append(Acting(adds, control.weight, control.guess, low, times[steps[0]]))
    return found


def _to_paint(model: Model, request: Request) -> Tensor | None:
    """(1, 1, H, W) of a settled request, 1 where it paints; None for everywhere."""
    drawn = canvas(request)
    if drawn is None or drawn.mask is None:
        return None
    return torch.from_numpy(np.asarray(drawn.mask) > 0).float()[None, None].to(model.device)


def without_steps(model: Model, request: Request) -> list[tuple[Control, int]]:
    """The controls within whose bounds no step lies, each with how many steps there are."""
    if not request.controls:
        return []
    request = model.complete(request)
    assert request.steps is not None
    steps = request.steps if request.strength is None else steps_to_run(request.steps, request.strength)
    return [
        (control, steps)
        for control in request.controls or ()
        if steps and not any(_acts(k, steps, control.start, control.end) for k in range(steps))
    ]


def _acts(step: int, steps: int, start: float, end: float) -> bool:
    """Whether a step, counted from 0, lies between two shares of all: diffusers' `controlnet_keep`."""
    return step / steps >= start and (step + 1) / steps <= end


def controlled(answer: Network, controls: list[Acting], halves: bool) -> Network:
    """The network with what the ControlNets add. halves: rows are a wanted and an unwanted half, of which guess mode
    leaves the second to itself.
    """

    def network(x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        if not controls:
            return answer(x, time, cond)
        level = float(time.flatten()[0])  # a sampler tells all rows one time
        slack = 1e-6 * max(abs(level), 1e-6)
        total: tuple[Tensor, ...] | None = None
        for each in controls:
            if not (each.low + slack < level <= each.high + slack):
                continue
            added = _added(each, x, time, cond, halves)
            total = added if total is None else tuple(a + b for a, b in zip(total, added, strict=True))
        return answer(x, time, cond) if total is None else answer(x, time, cond, control=total)

    return network


def _added(each: Acting, x: Tensor, time: Tensor, cond: Conditioning, halves: bool) -> tuple[Tensor, ...]:
    if not (each.guess and halves):
        return tuple(each.weight * tensor for tensor in each.adds(x, time, cond, each.guess))
    rows = len(x) // 2
    when = time if time.ndim == 0 or len(time) == 1 else time[:rows]
    half = each.adds(x[:rows], when, cond.change(lambda tensor: tensor[:rows]), True)
    return tuple(each.weight * torch.cat([tensor, torch.zeros_like(tensor)]) for tensor in half)


def settled(model: Model, request: Request) -> Request:
    """The request with upright control pictures. `InputError` for those that the model does not have, or cannot have in
    this request."""
    if not request.controls:
        return request
    upright = (flatten(c.image, f"control {c.name}", BLACK) for c in request.controls)
    controls = tuple(replace(c, image=image) for c, image in zip(request.controls, upright, strict=True))
    request = replace(request, controls=controls)
    for control in request.controls or ():
        known = model.system.controls
        if control.name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(
                f"this model has no ControlNet {checks.shown(control.name)}: {has}; one is opened with the model, by "
                f"`controlnets` {control.name}=FILE",
                argument="controls",
            )
    if (request.reuse or 1) > 1:
        raise InputError("reuse and `controls` do not go together; leave out one", argument="reuse")
    part = request.inpaint is not None and request.inpaint.padding is not None
    original = request.image.size if part and request.image is not None else None
    check_hints(request, model.system.config.multiple, original, model.annotators)
    return request
