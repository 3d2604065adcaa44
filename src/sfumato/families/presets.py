"""What every model and kind of checkpoint draws with when a request says nothing: read from tables, no weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sfumato.families import CARD, PACKAGED
from sfumato.storage import read_json

FIELDS = ("steps", "guidance", "sampler", "schedule", "size")


def presets() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Presets by name: of the packaged models, and of the kinds of checkpoints of which nothing more is known."""
    from sfumato.families.sd.checkpoint import Checkpoint
    from sfumato.families.sd.distilled import preset_named
    from sfumato.families.sd.shapes import SYSTEMS
    from sfumato.families.sd.system import preset_of

    ours = {name: read_json(folder / CARD)["preset"] for name, folder in PACKAGED.items()}
    checkpoints = {}
    for kind, system in SYSTEMS.items():
        found = Checkpoint(kind, system, {})
        checkpoints[kind] = asdict(preset_of(found, preset_named(found)[0]))
    return tuple(  # type: ignore[return-value]
        {name: {field: fields[field] for field in FIELDS} for name, fields in group.items()}
        for group in (ours, checkpoints)
    )
