"""A request made whole: what it leaves open filled in, and what only a model can know checked."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfumato import checks
from sfumato.diffusion.schedules import sigmas_for
from sfumato.drawing.control import settled
from sfumato.errors import InputError
from sfumato.sampling import SAMPLERS, sampler_named
from sfumato.tasks.canvas import by, nearest_size, settle
from sfumato.tasks.latent import pixel_upscaler, steps_to_run
from sfumato.text.syntax import rule_named
from sfumato.text.weighting import weighting_named
from sfumato.types import MAX_CLIP_PIXELS, MAX_SIDE, HiRes, Request

if TYPE_CHECKING:
    from sfumato.generate import Model


def complete(model: Model, request: Request) -> Request:
    """Validate, fill what is open from the picture and the preset, and check what only the model knows: names,
    sizes and steps. Doing it twice changes nothing."""
    request = request.validate()
    if model.system.animates and request.clip is None:
        request = request.with_defaults(frames=model.preset["frames"])
    request = settle(request, model.system.config.multiple, model.preset["size"])
    request = request.with_defaults(**_preset(model, request) | _loras(model, request)).validate()
    assert request.size and request.sampler and request.schedule and request.steps
    check_size(request.size, model.system.config.multiple)
    _check_clip(model, request)
    model.latent_shape(request.size[1], request.size[0], request.frames or 1)
    sampler_named(request.sampler)
    if request.eta is not None and request.sampler not in eta_samplers():
        raise InputError(
            f"eta means nothing to the sampler {request.sampler}; leave it out, or use one of "
            f"{', '.join(eta_samplers())}",
            argument="eta",
        )
    levels_of(model, request)
    if request.strength is not None:
        steps_to_run(request.steps, request.strength)
    if request.hires is not None:
        _check_hires(model, request, request.hires)
    if (request.reuse or 1) > 1 and model.system.split is None:
        raise InputError(
            "this model's network keeps no deep features to reuse; leave out `reuse`", argument="reuse"
        )
    layers = model.system.clip_layers
    if request.clip_skip is not None and request.clip_skip > layers:
        raise InputError(
            f"clip_skip {request.clip_skip} is more than this model's text encoder allows, {layers}",
            argument="clip_skip",
        )
    _check_read(model, request)
    _check_skipped(model, request)
    request = settled(model, request)
    if model.refiner is None and request.refine_at is not None:
        raise InputError("refine_at needs a refiner; open the model with one", argument="refine_at")
    if model.refiner is not None and request.refine_at is None:
        request = replace(request, refine_at=model.refiner.system.config.preset.refine_at)
    return request


def _preset(model: Model, request: Request) -> dict[str, Any]:
    """What the request gets that it leaves open. How many frames is asked for, or else it is a picture."""
    known = model.preset | (model.clip_preset if request.moves else {})
    left = {"frames"} if request.moves else {"frames", "fps", "guidance_first"}
    return {name: value for name, value in known.items() if name not in left}


def _check_clip(model: Model, request: Request) -> None:
    """`InputError` for what a model of clips, or one that animates pictures, cannot draw."""
    assert request.size is not None
    system = model.system
    if system.animates:
        if request.image is None:
            raise InputError(
                f"{checks.shown(model.name)} sets a picture in motion; give an `image`", argument="image"
            )
        for name in ("prompt", "negative"):
            if getattr(request, name):
                raise InputError(f"{checks.shown(model.name)} reads no `{name}`; leave it out", argument=name)
    if request.moves:
        for name in ("variation", "controls", "hires"):
            if getattr(request, name):
                raise InputError(f"{name} is for pictures; leave it out of a clip", argument=name)
        if system.window is not None:
            for name in ("loras", "reuse", "skip_layers"):
                if getattr(request, name) not in (None, (), 1):
                    raise InputError(
                        f"{name} is for pictures of this model; leave it out of a clip", argument=name
                    )
        frames, (width, height) = request.frames or 1, request.size
        if system.window is None and frames * width * height > MAX_CLIP_PIXELS:
            raise InputError(
                f"{frames} frames of {by(request.size)} are {frames * width * height:,} pixels, and a clip has at most "
                f"{MAX_CLIP_PIXELS:,}; ask for fewer frames, or a smaller size",
                argument="frames",
            )


def _loras(model: Model, request: Request) -> dict[str, Any]:
    """The LoRAs to draw with, if any, and what they make of that which a request leaves open."""
    adapters = model.system.adapters
    if adapters is None:
        if request.loras:
            raise InputError(
                f"{checks.shown(model.name)} takes no LoRAs; leave out `loras`", argument="loras"
            )
        return {}
    for name, text in (("prompt", request.prompt), ("negative", request.negative or "")):
        if "<lora:" in text:
            raise InputError(
                f"a LoRA is given by `loras`, not in the {name} as <lora:…>",
                argument=name,
            )
    uses = adapters.settled(request.loras)
    return adapters.preset(uses) | ({"loras": uses} if uses else {})


def levels_of(model: Model, request: Request) -> Tensor:
    """The noise levels of a complete request's schedule, (steps + 1,), falling to 0."""
    assert request.size and request.schedule and request.steps
    tokens = model.system.picture_tokens(request.size[1], request.size[0])
    return sigmas_for(request.schedule, request.steps, model.system.levels, tokens)


def enlarged_size(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """`size` times `scale`, where that is legal; else an `InputError` names the nearest size that is."""
    wanted = (size[0] * scale, size[1] * scale)
    nearest = nearest_size((round(wanted[0]), round(wanted[1])), multiple)
    if any(abs(a - b) > 1e-6 * b for a, b in zip(wanted, nearest, strict=True)):
        raise InputError(
            f"hires.scale {scale:g} makes {wanted[0]:g}x{wanted[1]:g} of {by(size)}, not a multiple of {multiple} "
            f"pixels; {_nearest_scale(size, scale, multiple)}",
            argument="hires.scale",
        )
    return nearest


def _nearest_scale(size: tuple[int, int], scale: float, multiple: int) -> str:
    """The scale next to `scale` that makes of both sides multiples of `multiple`, and the size that it makes."""
    step = multiple / math.gcd(*size)  # of scales: size · k · step is one of whole multiples
    best = max(math.ceil(1 / step - 1e-9), round(scale / step)) * step
    made = (round(size[0] * best), round(size[1] * best))
    return f"the nearest legal size is {by(made)}, of scale {best:.9g}"


def eta_samplers() -> list[str]:
    """The samplers with an option eta."""
    return [name for name, sampler in SAMPLERS.items() if "eta" in inspect.signature(sampler).parameters]


def check_size(size: tuple[int, int], multiple: int) -> None:
    """`InputError`, with the nearest that is, for sides that are no multiples of `multiple` pixels."""
    nearest = nearest_size(size, multiple)
    if tuple(size) != nearest:
        raise InputError(
            f"size {by(size)} is not a multiple of {multiple} pixels; the nearest legal size is {by(nearest)}",
            argument="size",
        )


def _check_read(model: Model, request: Request) -> None:
    """`InputError` for what this model would not be told, and for rules of prompts that do not exist."""
    models = [model] if model.refiner is None else [model, model.refiner]
    for name in request.for_some():
        if not any(name in each.system.reads for each in models):
            raise InputError(f"this model knows nothing of `{name}`; leave it out", argument=name)
    if request.prompt_rules is not None:
        rule_named(request.prompt_rules)
    if request.weighting is not None:
        weighting_named(request.weighting)


def _check_skipped(model: Model, request: Request) -> None:
    """`InputError` for layers that the network does not have, or cannot leave out."""
    if request.skip_layers is None:
        return
    count = model.system.layers
    if not count:
        raise InputError(
            "this model's network leaves no layers out; leave out `skip_layers`", argument="skip_layers"
        )
    for layer in request.skip_layers.layers:
        if layer >= count:
            raise InputError(
                f"skip_layers.layers names the layer {layer}; this model's network has 0 to {count - 1}",
                argument="skip_layers.layers",
            )


def _check_hires(model: Model, request: Request, hires: HiRes) -> None:
    assert request.size and request.schedule and request.steps
    pixel_upscaler(hires.upscaler)
    size = enlarged_size(request.size, hires.scale, model.system.config.multiple)
    if max(size) > MAX_SIDE:
        raise InputError(
            f"hires.scale {hires.scale:g} makes {by(size)}; at most {MAX_SIDE} pixels on a side are drawn",
            argument="hires.scale",
        )
    model.latent_shape(size[1], size[0])
    steps = hires.steps or request.steps
    levels_of(model, replace(request, size=size, steps=steps))
    steps_to_run(steps, hires.strength, "hires.strength")
