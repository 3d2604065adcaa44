"""How the networks of a Stable Diffusion are made from their tensors, and take over tensors that have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfumato.adapters.fold import Touched
from sfumato.checkpoint.refill import refill
from sfumato.families.published.openers import autoencoder, denoiser, renewed
from sfumato.families.published.text import open_clip
from sfumato.families.sd.condition import TextStack, plan_of

if TYPE_CHECKING:
    from sfumato.families.sd.system import System


def openers(
    system: System, parts: Mapping[str, Mapping[str, Tensor]], *, keep: int | None
) -> dict[str, Callable[[], Any]]:
    """How each network of a system is made from the tensors of its part, in the order in which drawing needs them.

    keep: bytes of the U-Net's layers that stay in memory; the others are read whenever they are called. None keeps all.
    """
    shapes, sources, form = system.shapes, system.sources, (system.kept, system.device)

    def text() -> TextStack:
        encoders = tuple(
            open_clip(part.config, parts[part.name], sources[part.name], *form) for part in shapes.text
        )
        return TextStack(plan_of(system.config.kind), encoders, system.tokenizers, system.inversions)

    of = (system.device, system.dtype, system.engine)
    return {
        "text": text,
        "denoiser": lambda: denoiser(shapes.unet, parts["unet"], sources["unet"], *of, keep=keep),
        "autoencoder": lambda: autoencoder(shapes.vae, parts["vae"], sources["vae"], *form),
    }


def renewers(
    system: System, parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Callable[[Any, Touched], bool]]:
    """How each network takes over tensors of its parts that have changed; False where it must be opened again."""
    shapes, sources = system.shapes, system.sources

    def text(stack: TextStack, touched: Touched) -> bool:
        for part, encoder in zip(shapes.text, stack.encoders, strict=True):
            refill(encoder, parts[part.name], touched.get(part.name, ()), sources[part.name])
        return True

    def unet(network: Any, touched: Touched) -> bool:
        names = touched.get("unet", frozenset())
        form = system.device, system.dtype
        return renewed(network, shapes.unet, parts["unet"], names, sources["unet"], *form)

    return {"text": text, "denoiser": unet, "autoencoder": lambda network, touched: "vae" not in touched}
