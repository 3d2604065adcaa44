"""What every model and kind of checkpoint draws with when a request says nothing: read from tables, no weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sfumato.families import CARD, PACKAGED, checkpoint_families, system_module
from sfumato.storage import read_json

FIELDS = ("steps", "guidance", "sampler", "schedule", "size")


def presets() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Presets by name: of the packaged models, and of the kinds of checkpoints of which nothing more is known."""
    from sfumato.families.published.checkpoint import Checkpoint

    ours = {name: read_json(folder / CARD)["preset"] for name, folder in PACKAGED.items()}
    checkpoints = {}
    for family in checkpoint_families():
        for kind, system in family.systems.items():
            found = Checkpoint(kind, system, {}, family=family)
            checkpoints[kind] = asdict(system_module(family).usual_preset(found))
    return tuple(  # type: ignore[return-value]
        {name: {field: fields[field] for field in FIELDS} for name, fields in group.items()}
        for group in (ours, checkpoints)
    )
