"""Checkpoints of Stable Diffusion alone: the shared ways of opening them, bound to this family."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sfumato.families.published import checkpoint as shared
from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.published.kinds import Family
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.shapes import SYSTEMS, System

__all__ = ["Checkpoint", "completed", "open_checkpoint"]


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    kind: str | None = None,
    prediction: str | None = None,
    systems: Mapping[str, System] = SYSTEMS,
) -> Checkpoint:
    """See `published.checkpoint.open_checkpoint`."""
    return shared.open_checkpoint(path, _only(systems), variant=variant, kind=kind, prediction=prediction)


def completed(
    found: Checkpoint,
    source: str,
    others: Iterable[str | os.PathLike[str]],
    systems: Mapping[str, System] = SYSTEMS,
) -> Checkpoint:
    """See `published.checkpoint.completed`."""
    return shared.completed(found, source, others, _only(systems))


def _only(systems: Mapping[str, System]) -> tuple[Family, ...]:
    return (replace(FAMILY, systems=systems),)
