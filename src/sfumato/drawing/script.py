"""What a network is told where that changes over the steps, or is said by several prompts together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from sfumato.diffusion.parameterization import Denoise
from sfumato.errors import InputError
from sfumato.text.editing import EDITED, schedule, together
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.generate import Model

CHECKED = 64  # texts of a prompt that changes, the longest


@dataclass(frozen=True)
class Voice:
    """One prompt. stages: (the step up to which it holds, counted from 1; what the network is told, as 2 rows: prompt
    and negative prompt); the last holds to the end. weight: beside those of other voices."""

    stages: tuple[tuple[int, Conditioning], ...]
    weight: float = 1.0


Script = tuple[Voice, ...]
T = TypeVar("T")


def script(model: Model, request: Request, done: int = 0) -> Conditioning | Script:
    """What a complete request tells a model: simply that, unless its prompts change or are several.

    Prompts of A1111's rules may (`text.editing`). done: steps of a pass before this one.
    """
    steps, negative = request.steps, request.negative
    assert steps is not None
    if not _edited(model, request):
        return model.told([request.prompt, negative], request)
    unwanted = ((steps, None),) if negative is None else schedule(negative, steps, done)
    known: dict[tuple[str, str | None], Conditioning] = {}

    def told(step: int, wanted: Sequence[tuple[int, str]]) -> Conditioning:
        texts = _at(wanted, step), _at(unwanted, step)
        if texts not in known:
            known[texts] = model.told(texts, request)
        return known[texts]

    voices = []
    for text, weight in together(request.prompt):
        wanted = schedule(text, steps, done)
        ends = sorted({end for end, _ in (*wanted, *unwanted)})
        voices.append(Voice(tuple((end, told(end, wanted)) for end in ends), weight))
    alone = len(voices) == 1 and len(voices[0].stages) == 1
    return voices[0].stages[0][1] if alone else tuple(voices)


def _edited(model: Model, request: Request) -> bool:
    """Whether its prompts are read as ones that may change."""
    return "prompt_rules" in model.system.reads and (request.prompt_rules or EDITED) == EDITED


def check_texts(model: Model, request: Request) -> None:
    """`InputError`, by the name of prompt or negative, for what a complete request's model could not read of them."""
    assert request.steps is not None
    passes = [(request.steps, 0)]
    if request.hires is not None:
        passes.append((request.hires.steps or request.steps, request.steps))
    for name, text in (("prompt", request.prompt), ("negative", request.negative)):
        texts = {text or ""}
        if _edited(model, request):
            alone = [part for part, _ in together(text or "")] if name == "prompt" else texts
            texts = {held for part in alone for times in passes for _, held in schedule(part, *times)}
        try:
            model.system.check_texts(sorted(texts, key=len)[-CHECKED:], request)
        except InputError as error:
            if name == error.argument or error.argument != "prompt":
                raise
            raise InputError(str(error).replace("the prompt", "the negative", 1), argument=name) from None


def _at(stages: Sequence[tuple[int, T]], step: int) -> T:
    """What holds at a step, counted from 1."""
    return next((held for end, held in stages if step <= end), stages[-1][1])


def step_at(sigmas: Tensor, sigma: Tensor) -> int:
    """The step of the schedule `sigmas`, (S + 1,), that a level of noise belongs to, counted from 1.

    sigma: () or (B,), of which the largest counts. A step's levels are its first and those below it, above the first of
    the next; what lies above the schedule is the first step's.
    """
    level = float(torch.as_tensor(sigma).max())
    return max(1, int((sigmas[:-1].double() >= level * (1 - 1e-9)).sum()))


def changing(
    stages: Sequence[tuple[int, Conditioning]], make: Callable[[Conditioning], Denoise], sigmas: Tensor
) -> Denoise:
    """A denoiser that is told at each level what holds at its step of the schedule `sigmas`, (S + 1,).

    What is told is a function of the level alone (`step_at`), as a sampler needs it, and a picture begun with has what
    its levels would have had from noise.
    """
    made = [(end, make(told)) for end, told in stages]
    if len(made) == 1:
        return made[0][1]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return _at(made, step_at(sigmas, sigma))(x, sigma)

    return denoise
