"""Drawing that stops at the step at which the network gives NaN or infinity, and says which of its layers did.

Nothing is watched while all is well but the denoiser's estimate, one look a call. Only then is the call made again with
an ear at every layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.checkpoint.layer import finite
from sfumato.diffusion.parameterization import Denoise
from sfumato.drawing.script import Script, step_at
from sfumato.errors import NonFiniteError
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.generate import Model

NARROW = (torch.float16, torch.int8)  # types in which sound weights may overflow
SAMPLER = "the sampler's step gives"


def watched(
    model: Model,
    make: Callable[[], Denoise],
    told: Conditioning | Script,
    request: Request,
    sigmas: Tensor,
) -> Denoise:
    """The denoiser that `make` makes, which raises `NonFiniteError` where its estimate is not finite.

    told: what it is told. request: complete. sigmas: (S + 1,), the schedule by which a level's step is known.
    """
    denoise = make()

    def checked(x: Tensor, sigma: Tensor) -> Tensor:
        estimate = denoise(x, sigma)
        if _finite(estimate):
            return estimate
        step = step_at(sigmas, sigma)
        what, layer = _culprit(model, make(), told, request, x, sigma)
        dtype = str(model.dtype).removeprefix("torch.")
        better = "draw with `dtype` bf16 or fp32"
        if what == SAMPLER:
            better = "use another sampler or schedule"
        elif model.dtype not in NARROW:
            whose = "its weights, or a LoRA's," if request.loras else "its weights"
            better = f"{whose} are damaged, or not of this model"
        raise NonFiniteError(
            f"{what} NaN or infinity in {dtype}, at step {step} of {len(sigmas) - 1}; {better}", layer
        )

    return checked


def _culprit(
    model: Model, denoise: Denoise, told: Conditioning | Script, request: Request, x: Tensor, sigma: Tensor
) -> tuple[str, str]:
    """(who gives it, as a sentence begins; the layer, "" where it is not known) of a call that is made again."""
    system = model.system
    if not _finite(x):
        return SAMPLER, ""
    if not all(map(_finite, _tensors(told))):
        return "the text encoder gives", ""
    layer, fed = first_not_finite(system.answers(request.moves), lambda: denoise(x, sigma))
    if layer:
        return f"{layer} of the {system.called} gives", layer
    if not fed and request.controls:
        return "a ControlNet gives", ""
    return f"the {system.called} gives", ""


def first_not_finite(network: Any, call: Callable[[], object]) -> tuple[str, bool]:
    """The innermost layer of a network that is the first to make NaN or infinity of finite numbers during a call, ""
    where none is seen to; and whether the network itself was given finite ones.

    The name is that of the layer as it runs, where a packed one may hold several weights. Other threads are not heard.
    """
    if not isinstance(network, nn.Module):  # run by another engine
        return "", True
    found: list[str] = []
    fed: list[bool] = []
    here = threading.get_ident()

    def ear(name: str) -> Callable[..., None]:
        def hear(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
            if threading.get_ident() != here or found:
                return
            if all(map(_finite, _tensors((given, named)))) and not all(map(_finite, _tensors(answer))):
                found.append(name)

        return hear

    def enter(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() == here and not fed:  # the outermost is entered first
            fed.append(all(map(_finite, _tensors((given, named)))))

    hooks = []
    for name, layer in network.named_modules():
        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(ear(name), with_kwargs=True))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(found), ""), all(fed)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or finite(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a layer is given or answers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _tensors(inner)
    elif is_dataclass(value):
        yield from _tensors(tuple(getattr(value, field.name) for field in fields(value)))
