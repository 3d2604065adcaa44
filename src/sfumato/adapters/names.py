"""What the modules of a model are called in adapters' files: tables that a family offers, and their spellings.

A file names a module by a path with dots after a prefix (`unet.down_blocks.0.…`), or by one in which underscores stand
for the dots (`lora_unet_down_blocks_0_…`). The second cannot be read back, so all spellings of all modules are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from sfumato.checkpoint.rules import KeyMap, Split

WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Target:
    """A module of ours. place, of: what a file calls one module are `of` of ours, of which this is number `place`."""

    part: str
    module: str
    place: int = 0
    of: int = 1


@dataclass(frozen=True)
class PartNames:
    """One network as files name it.

    part: its name among ours. tables: from paths of modules there to ours; several where several layouts are in use.
    dotted: prefixes of paths with dots, such as "unet."; "" where paths stand alone. flat: prefixes of paths with
    underscores, such as "lora_unet_".
    """

    part: str
    tables: tuple[Mapping[str, tuple[str, ...]], ...]
    dotted: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """All that a family calls by names in adapters.

    blocks: names of groups of layers, for weights by block, to what paths of ours begin with (`unet.down_blocks`).
    """

    family: str
    parts: tuple[PartNames, ...]
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def spelled(self) -> dict[str, tuple[Target, ...]]:
        """Every spelling of every module."""
        found: dict[str, tuple[Target, ...]] = {}
        for part in self.parts:
            for table in part.tables:
                for theirs, ours in table.items():
                    targets = tuple(Target(part.part, m, k, len(ours)) for k, m in enumerate(ours))
                    for prefix in part.dotted:
                        found.setdefault(prefix + theirs, targets)
                    for prefix in part.flat:
                        found.setdefault(prefix + theirs.replace(".", "_"), targets)
        return found

    def places(self, block: str) -> tuple[str, ...]:
        """What our paths begin with in a block such as "down.1", or in a path itself; () where it is unknown."""
        head, tail = block, ""
        while head:
            if head in self.blocks:
                return tuple(start + tail for start in self.blocks[head])
            head, dot, last = head.rpartition(".")
            tail = dot + last + tail
        return (block,)


def modules(table: KeyMap, drop: str = "") -> dict[str, tuple[str, ...]]:
    """Paths of modules with weights, theirs to ours, from a table of tensors. drop: a prefix of theirs to leave out."""
    found: dict[str, tuple[str, ...]] = {}
    for rule in table.rules:
        theirs, ours = rule.theirs, rule.ours
        names = ours if isinstance(rule, Split) else (ours,)
        if not isinstance(theirs, str) or not theirs.endswith(WEIGHT) or not theirs.startswith(drop):
            continue
        found[theirs[len(drop) : -len(WEIGHT)]] = tuple(str(n).removesuffix(WEIGHT) for n in names)
    return found


def same(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """A table of paths that files and we share."""
    return {path: (path,) for path in paths}


def with_aliases(
    table: Mapping[str, tuple[str, ...]], aliases: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The table with other endings of paths beside those there: {"to_out.0": "to_out"}."""
    more = dict(table)
    for path, ours in table.items():
        for ending, other in aliases.items():
            if path.endswith("." + ending):
                more.setdefault(path[: -len(ending)] + other, ours)
    return more
