"""Stable Diffusion 1, 2 and XL as models that a LoRA is trained for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.families.published.training import frozen
from sfumato.families.published.training import trainee as shared
from sfumato.families.sd.condition import size_numbers, size_vector
from sfumato.families.sd.system import System
from sfumato.families.trainee import Read, Trainee
from sfumato.nn.spatial import TransformerBlock
from sfumato.nn.unet import Resnet
from sfumato.text.syntax import Piece
from sfumato.text.weighting import encode_windows
from sfumato.text.windows import lay_out, level
from sfumato.types import Conditioning

TRAINED = ("sd1", "sd2", "sdxl")
NOTES = {  # sources: Stability-AI/ModelSpec, architectures; kohya-ss/sd-scripts train_util.py, `get_sai_model_spec`
    "sd1": {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1"},
    "sd2": {"modelspec.architecture": "stable-diffusion-v2-512/lora", "ss_base_model_version": "sd_v2"},
    "sd2-v": {"modelspec.architecture": "stable-diffusion-v2-768-v/lora", "ss_base_model_version": "sd_v2"},
    "sdxl": {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_base_model_version": "sdxl_base_v1-0",
    },
}


def trainee(system: System, text: bool) -> Trainee:
    """The U-Net, and with `text` the text encoders, in plain layers of the system's own precision.

    `InputError` for kinds that are not trained here: inpainting, refiners, latent consistency models.
    """
    kind = system.config.kind
    lcm = system.config.distilled == "lcm"
    if kind not in TRAINED or lcm:
        raise InputError(
            f"LoRAs are trained for {', '.join(TRAINED)}, not for {kind}"
            + (" as a latent consistency model" if lcm else ""),
            argument="lora.base",
        )
    unet = frozen(system, "a LoRA")
    opened: dict[str, Any] = {}
    if text:
        opened["text"] = system.openers(system.parts, keep=None)["text"]()
    parts = [part.name for part in system.shapes.text]
    v = system.config.prediction == "v"
    notes = NOTES["sd2-v" if kind == "sd2" and v else kind] | {
        "modelspec.prediction_type": "v" if v else "epsilon",
        "ss_v2": str(kind == "sd2"),
        "ss_v_parameterization": str(v),
        "ss_zero_terminal_snr": str(system.config.zero_snr),
    }
    return shared(
        system,
        unet,
        dict(zip(parts, opened["text"].encoders, strict=True)) if text else {},
        opened,
        repeated=(m for m in unet.modules() if isinstance(m, TransformerBlock | Resnet)),
        reader=reader,
        sized=functools.partial(_sized, bool(system.shapes.unet.vector)),
        notes=notes,
    )


def reader(system: System, captions: Iterable[str]) -> Read:
    """What reads any of these captions with a system's encoders. As they stand: brackets in them are no weights."""
    tokenizers, inversions = system.tokenizers, system.text.fitted
    places = tuple(zip(tokenizers, inversions, strict=True))

    def windows(caption: str, place: int) -> tuple[Any, ...]:
        tokenizer, known = places[place]
        return lay_out(((Piece(caption),) if caption else (),), tokenizer, known)

    least = max((len(windows(caption, 0)) for caption in captions), default=1)

    def read(some: Sequence[str]) -> Conditioning:
        stack, tokens, pooled = system.text, [], None
        plan = stack.plan
        for place, (encoder, tokenizer) in enumerate(zip(stack.encoders, tokenizers, strict=True)):
            rows = level([windows(caption, place) for caption in some], tokenizer, least)
            features, pooled = encode_windows(
                encoder, tokenizer, rows, clip_skip=plan.clip_skip, final_norm=plan.final_norm
            )
            tokens.append(features)  # (B, 77·k, D of this encoder)
        return Conditioning(torch.cat(tokens, dim=-1), None, pooled)

    return read


def _sized(told: bool, cond: Conditioning, height: int, width: int) -> Conditioning:
    """SDXL is told that the picture was of this size, uncropped."""
    if not told:
        return replace(cond, vector=None)
    assert cond.vector is not None
    vector: Tensor = size_vector(cond.vector, size_numbers((height, width)))
    return replace(cond, vector=vector)
