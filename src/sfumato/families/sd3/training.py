"""Stable Diffusion 3 and 3.5 as models that a LoRA is trained for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sfumato.families.published.condition import TextOptions
from sfumato.families.published.training import frozen
from sfumato.families.published.training import trainee as shared
from sfumato.families.sd3.condition import READERS, encode, extent
from sfumato.families.sd3.system import System
from sfumato.families.trainee import Read, Trainee
from sfumato.nn.mmdit import JointBlock
from sfumato.text.syntax import Piece, Sections
from sfumato.types import Conditioning

PLAIN = TextOptions(rule="none", weighting="none")
ARCHITECTURES = {  # as kohya-ss/sd-scripts sai_model_spec.py has them, after "stable-diffusion-3-"
    "sd3-medium": "m",
    "sd3.5-medium": "5-medium",
    "sd3.5-large": "5-large",
    "sd3.5-large-turbo": "5-large",
}


def trainee(system: System, text: bool) -> Trainee:
    """The transformer, and with `text` the CLIPs that are read, in plain layers of the system's own precision.

    T5 is not trained: it is more than twice the transformer, and diffusers loads no LoRA of it.
    """
    transformer = frozen(system, "a LoRA")
    *clips, _ = READERS
    opened = {}
    if text:
        make = system.openers(system.parts, keep=None)
        opened = {clip.part: make[clip.part]() for clip in clips if clip in system.readers}
    notes = {
        "modelspec.architecture": f"stable-diffusion-3-{ARCHITECTURES[system.config.kind]}/lora",
        "modelspec.prediction_type": "flow",
        "ss_base_model_version": system.config.kind,
    }
    return shared(
        system,
        transformer,
        opened,
        opened,
        repeated=(module for module in transformer.modules() if isinstance(module, JointBlock)),
        reader=reader,
        notes=notes,
    )


def reader(system: System, captions: Iterable[str]) -> Read:
    """What reads any of these captions with a system's encoders. As they stand: brackets in them are no weights."""
    windows, length = extent(system.text, [_sections(caption) for caption in ("", *captions)], PLAIN)
    options = replace(PLAIN, length=length)

    def read(some: Sequence[str]) -> Conditioning:
        features = encode(system.text, [_sections(caption) for caption in some], options, windows)
        return Conditioning(features.tokens, features.mask, features.pooled)

    return read


def _sections(caption: str) -> Sections:
    return ((Piece(caption),) if caption else (),)
