"""Pocket as a model that a LoRA is trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from sfumato.adapters.names import Share
from sfumato.errors import InputError
from sfumato.families.pocket.system import System
from sfumato.families.trainee import Read, Trainee
from sfumato.text import pad
from sfumato.types import Conditioning

MULTIPLE = 8  # of tokens in a row


def trainee(system: System, text: bool) -> Trainee:
    """The system's own networks, in float32 and frozen. Its text encoder is a part of the denoiser."""
    denoiser, tokenizer = system.denoiser.requires_grad_(False), system.tokenizer
    device = next(denoiser.parameters()).device

    def reader(captions: Iterable[str]) -> Read:
        longest = max((len(tokenizer.encode(caption)) for caption in captions), default=1)

        def read(some: Sequence[str]) -> Conditioning:
            rows = [tokenizer.encode(caption) for caption in some]
            ids, mask = pad([*rows, [1] * longest], MULTIPLE)  # the last row gives the length
            ids, mask = ids[:-1].to(device), mask[:-1].to(device)
            return Conditioning(denoiser.text(ids, mask), mask)

        return read

    return Trainee(
        system=system,
        kind="pocket",
        networks={"denoiser": denoiser},
        texts=("denoiser.text",),
        repeated=tuple(denoiser.dit.blocks),
        parameterization=system.parameterization,
        levels=system.levels,
        reader=reader,
        sized=lambda cond, height, width: cond,
        predict=system.network,
        spell=_spell,
        identity=lambda: hashlib.sha256(repr(sorted(system.hashes().items())).encode()).hexdigest(),
        notes={"modelspec.architecture": "pocket/lora", "ss_base_model_version": "pocket"},
    )


def _spell(path: str, layout: str) -> Share:
    if layout != "diffusers":
        raise InputError(
            f"the layout {layout} has no names for pocket's layers; use diffusers", argument="lora.layout"
        )
    return Share(path)
