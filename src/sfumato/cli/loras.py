"""LoRAs on the command line: `--lora [NAME=]FILE[:WEIGHT][:BLOCK=FACTOR,…]` to what is opened and asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli.parse import number
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.generate import Model

NONE = ["none"]  # `--lora none` takes out those of --like
FORM = "[NAME=]FILE[:WEIGHT][:BLOCK=FACTOR,…]"


@dataclass(frozen=True)
class Given:
    """One `--lora`. weight, blocks: None where they are not said."""

    name: str
    file: Path
    weight: float | None = None
    blocks: dict[str, float] | None = None

    def request(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """As a request has it; what is not said here is as in `said`, of a picture it is to be like."""
        blocks = said.get("blocks") if self.blocks is None else self.blocks
        weight = said.get("weight", 1.0) if self.weight is None else self.weight
        return {"name": self.name, "weight": weight, **({"blocks": blocks} if blocks else {})}


def given(texts: Sequence[str], option: str = "lora") -> list[Given]:
    """What the command line says by an option. `InputError` for what is of another form, and for two of one name."""
    found: list[Given] = []
    for text in texts:
        one = _one(text, option)
        if any(one.name == other.name for other in found):
            raise InputError(
                f"two LoRAs are called {one.name!r}; give one of them another name: --{option} NAME=FILE",
                argument=option,
            )
        found.append(one)
    return found


def _one(text: str, option: str) -> Given:
    rest, blocks, weight = text, None, None
    if not os.path.exists(rest):
        head, colon, tail = rest.rpartition(":")
        if colon and "=" in tail and not os.path.exists(tail.partition("=")[2]):
            rest, blocks = head, _blocks(tail)
        head, colon, tail = rest.rpartition(":")
        if colon and not os.path.exists(rest) and not ("/" in tail or "\\" in tail):
            rest, weight = head, number(f"{option}.weight", tail)
    name, equals, file = rest.partition("=")
    if not equals or os.path.exists(rest):
        path = Path(rest)
        name, file = path.name if path.is_dir() else path.stem, rest
    if not name or not file:
        raise InputError(f"{option} must be {FORM}, not {text[:60]!r}", argument=option)
    return Given(name, Path(file), weight, blocks)


def _blocks(text: str) -> dict[str, float]:
    """`down.1=0.5,mid=0` to factors by block."""
    found: dict[str, float] = {}
    for pair in text.split(","):
        block, equals, factor = pair.partition("=")
        block = block.strip()
        if not equals or not block or block in found:
            raise InputError(f"lora blocks must be like down.1=0.5,mid=0, not {text[:60]!r}", argument="lora")
        found[block] = number(f"lora block {block}", factor)
    return found


def requested(
    loras: Sequence[Given], said: object, like: Path | None, dropped: bool
) -> list[dict[str, Any]] | None:
    """The request's `loras` of those `given`, and those `said` in the picture `like`, which need their files."""
    told = {str(use.get("name")): use for use in listed(said)}
    if not dropped:
        for name in told:
            if not any(one.name == name for one in loras):
                raise InputError(
                    f"{like} was drawn with the LoRA {name!r}; give its file by --lora, or leave all out by "
                    "--lora none",
                    argument="lora",
                )
    found = [one.request(told.get(one.name, {})) for one in loras]
    return found or None


def listed(said: object) -> list[dict[str, Any]]:
    """What a recipe has under a name that should hold a list of objects; what is none says nothing."""
    return [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []


def attach(model: Model, loras: Sequence[Given], wanted: Sequence[Any], partial: bool) -> list[str]:
    """Open them as the request wants them, before networks are read. Returns what is to be said of them."""
    uses = {use.name: use for use in wanted}
    notes = []
    for one in loras:
        use = uses[one.name]
        report = model.attach(one.file, use.weight, name=one.name, blocks=dict(use.blocks), partial=partial)
        if report.left:
            notes.append(f"LoRA {one.name}: {report.describe()}")
        if idle := model.system.adapters and model.system.adapters.idle(use):
            notes.append(
                f"LoRA {one.name} changes nothing in {' and '.join(idle)}, so a factor there does nothing"
            )
    return notes
