"""Models opened for serving: networks shared by all that is drawn, and all work done on the device's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato import checks, planning
from sfumato.diffusion.schedules import SCHEDULES, sigmas_for
from sfumato.drawing.clips import as_clip, makes_clips
from sfumato.drawing.script import check_texts
from sfumato.errors import InputError
from sfumato.generate import Model, eta_samplers, load
from sfumato.runtime import DTYPES
from sfumato.sampling import SAMPLERS
from sfumato.serve.asked import CLIP
from sfumato.serve.settings import ModelSpec
from sfumato.serve.store import is_id
from sfumato.serve.worker.loras import Sent
from sfumato.serve.worker.together import Precision, Together
from sfumato.types import Conditioning, Request

HEAVY = frozenset({"encode", "decode", "condition", "preview", "split", "inpaint_channels"})
GREY = (128, 128, 128)
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Shared:
    """A system whose network is called together with other drawings', and whose heavy work the bench does.

    A GPU's precision is by thread, so the bench works within the model's own.
    """

    def __init__(self, system: Any, together: Together, precision: Precision):
        self._system, self._together, self._precision = system, together, precision

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._system, name)
        return partial(self._done, found) if name in HEAVY and callable(found) else found

    def _done(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            with self._precision():
                return call(*args, **kwargs)

        return self._together.bench.do(work)

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """Each piece is decoded by the bench when it is asked for."""
        pieces = self._done(self._system.decode_pieces, latent)
        while (piece := self._done(next, pieces, None)) is not None:
            yield piece

    def network(self, x: Tensor, time: Tensor, cond: Conditioning, **more: Any) -> Tensor:
        return self._together(self._system, self._precision, x, time, cond, more)

    def controller(self, name: str, pixels: Tensor) -> Callable[..., Any]:
        return partial(self._done, self._done(self._system.controller, name, pixels))


@dataclass(frozen=True)
class Opened:
    """A model to serve. model: it alone; shared: the same as drawings have it; sent: the LoRAs of its clients."""

    name: str
    model: Model
    shared: Model
    sent: Sent

    @property
    def loras(self) -> list[str]:
        """The names of those LoRAs that are the server's own."""
        adapters = self.model.system.adapters
        return [] if adapters is None else sorted(name for name in adapters.opened if not is_id(name, "file"))

    def asked(self, request: Request, kind: str, sent: Collection[str] = ()) -> Request:
        """The complete request of a client. `InputError` for what the model, or the route it came by, does not draw.

        sent: the LoRAs that the client may name beside the server's own; of others' it hears nothing.
        """
        for use in (request.loras or ()) if self.model.system.adapters is not None else ():
            if use.name not in sent and use.name not in self.loras:
                known = f"there is {', '.join(self.loras)}; " if self.loras else ""
                raise InputError(
                    f"there is no LoRA {checks.shown(use.name)}; {known}others are sent to /v1/files and called by "
                    "their ids",
                    argument="loras",
                )
        if kind == CLIP:
            request = as_clip(self.model, request)
        request = self.model.complete(request)
        if kind != CLIP and request.moves:
            raise InputError("a job draws pictures; send what has frames to /v1/videos", argument="frames")
        check_texts(self.model, request)
        return request

    def facts(self) -> dict[str, Any]:
        """What clients may know of it, as plain JSON."""
        system = self.model.system
        preset = self.model.preset
        return {
            "name": self.name,
            "preset": {**preset, "size": list(preset["size"])},
            "multiple": system.config.multiple,
            "clips": makes_clips(self.model),
            "clip_preset": self.model.clip_preset,
            "needs_image": system.animates,
            "loras": self.loras,
            "takes_loras": system.adapters is not None and system.adapters.fitting,
            "controls": list(system.controls),
            "annotators": list(self.model.annotators),
            "weights": self.model.hashes,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "samplers": list(SAMPLERS),
            "schedules": [name for name in SCHEDULES if _possible(name, system)],
            "eta_samplers": eta_samplers(),
        }


def _possible(schedule: str, system: Any) -> bool:
    """Whether a model can be drawn with by the schedule."""
    try:
        sigmas_for(schedule, 2, system.levels, 1)
    except InputError as error:
        return error.argument != "schedule"
    return True


def open_model(spec: ModelSpec, device: str | None, together: Together, memory: int | None) -> Opened:
    """Open a model with its LoRAs and ControlNets, as a plan of memory wants it. Errors of `load` and of the plan."""
    options: dict[str, Any] = {
        name: value
        for name in ("vae", "refiner", "variant", "preset", "tokenizer")
        if (value := getattr(spec, name)) is not None
    }
    if spec.dtype is not None:
        options["dtype"] = dtype_named(spec.dtype)
    options |= {name: dict(getattr(spec, name)) or None for name in ("controlnets", "annotators")}
    found = load(spec.source, device, offload="auto", **options)
    found = _named(_planned(found, spec, memory), spec.name)
    for name, file in spec.loras.items():
        found.attach(file, 0.0, name=name)
    if spec.loras and found.system.adapters is not None:
        found.system.adapters.standing = ()  # a LoRA is for those who ask for it
    refiner = None
    if found.refiner is not None:
        refiner = _shared(found.refiner, f"{spec.name}-refiner", together, None)
    shared = _shared(found, spec.name, together, refiner)
    return Opened(spec.name, found, shared, Sent(found.system.adapters))


def _named(model: Model, name: str) -> Model:
    """The same called as clients call it, in errors and recipes, and not by where its files lie."""
    refiner = None if model.refiner is None else _named(model.refiner, f"{name}-refiner")
    return Model(model.system, model.device, name, model.dtype, refiner, model.annotators)


def _shared(model: Model, name: str, together: Together, refiner: Model | None) -> Model:
    plain = Model(model.system, model.device, name, model.dtype)
    shared: Any = Shared(model.system, together, plain.precision)
    return Model(shared, model.device, name, model.dtype, refiner, model.annotators)


def _planned(model: Model, spec: ModelSpec, memory: int | None) -> Model:
    if not planning.tells(model):
        return model if not model.system.traces else planning.offloaded(model, spec.offload or "none")
    request = usual(model)
    found = planning.plan(model, request, spec.offload, memory)
    if not found.fits:
        raise planning.refusal(model, request, found)
    return planning.follow(model, found)


def usual(model: Model) -> Request:
    """What a model draws of whom nobody asks anything special: a picture, or a clip if that is what it was made for."""
    request = Request()
    if "frames" in model.preset:
        request = as_clip(model, request)
    if model.system.animates:
        request = replace(request, image=Image.new("RGB", model.preset["size"], GREY))
    return request


def shortest(model: Model) -> Request:
    """The least of the same in which everything happens once: two steps, of a clip one, and the fewest frames."""
    request = replace(usual(model), steps=2)
    if not request.moves:
        return request
    for frames in range(2, model.preset["frames"] + 1):
        short = replace(request, frames=frames, steps=1)
        with contextlib.suppress(InputError):
            model.complete(short)
            return short
    return request


def dtype_named(name: str) -> torch.dtype:
    """A precision by its short or long name. `InputError` for others."""
    known = {**DTYPES, "int8": torch.int8}
    full = SHORT.get(name, name)
    if full not in known:
        raise InputError(f"dtype must be fp32, bf16, fp16 or int8, not {name!r}", argument="dtype")
    return known[full]
