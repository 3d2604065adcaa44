"""What a file of weights is, told from names and shapes by a table, without importing a network or torch.

The table, `marks.json`, holds the families' signatures. They are worked out from the networks' configurations, whose
import takes longer than all that describing a file needs. `python -m sfumato.families.describe` writes it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.checkpoint.detect import Signature, identify
from sfumato.errors import CheckpointError
from sfumato.storage import atomic_file, read_json

TABLE = Path(__file__).parent / "marks.json"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Description:
    """kind: such as "sdxl", or "unknown", with the reason in `why`. layout: whose names the tensors have.

    parts: name to the prefix of its tensors, of the parts that are there. traits: what else the marks say.
    """

    kind: str
    layout: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


def describe(shapes: Mapping[str, Sequence[int]], source: str) -> Description:
    """What tensors of these names and shapes are. Never an error: a file of no known kind is one of kind "unknown"."""
    table = read_json(TABLE)
    try:
        match = identify(shapes, [_signature(entry) for entry in table["signatures"]], source)
    except CheckpointError as error:
        return Description(UNKNOWN, why=str(error))
    if match.part != "checkpoint":
        return Description(match.kind, match.layout, {match.part: match.prefix}, match.traits)
    parts = {
        part: prefix
        for part, prefixes in table["places"][match.kind].items()
        for prefix in prefixes
        if any(name.startswith(prefix) for name in shapes)
    }
    return Description(match.kind, match.layout, parts, match.traits)


def kinds() -> list[str]:
    """The kinds of whole checkpoints that can be opened, such as "sdxl"."""
    return list(read_json(TABLE)["places"])


def table() -> dict[str, Any]:
    """What `marks.json` must hold: signatures, and of kinds that come as single files, each part's prefixes."""
    from sfumato.families import checkpoint_families
    from sfumato.families.published.checkpoint import all_signatures
    from sfumato.families.published.keys import DENOISER_PREFIX, VAE_PREFIX

    families = checkpoint_families()
    places = {
        kind: {family.denoiser: [DENOISER_PREFIX], "vae": [VAE_PREFIX]}
        | {part.name: list(part.prefixes) for part in system.text}
        for family in families
        for kind, system in family.systems.items()
    }
    entries = [{key: value for key, value in asdict(s).items() if value} for s in all_signatures(families)]
    return {"places": places, "signatures": entries}


def write_table(path: Path = TABLE) -> None:
    """Write the table, a line for each signature."""
    whole = table()
    lines = ",\n".join(json.dumps(entry) for entry in whole["signatures"])
    with atomic_file(path) as temporary:
        temporary.write_text(f'{{"places": {json.dumps(whole["places"])},\n"signatures": [\n{lines}\n]}}\n')


def _signature(entry: dict[str, Any]) -> Signature:
    required = {name: None if shape is None else tuple(shape) for name, shape in entry["required"].items()}
    texts = {key: entry.get(key, "") for key in ("kind", "part", "layout", "prefix", "refusal")}
    return Signature(
        **texts,
        required=required,
        forbidden=tuple(entry.get("forbidden", ())),
        traits=entry.get("traits", {}),
    )


if __name__ == "__main__":
    write_table()
