"""What the modules of a model are called in adapters' files: tables that a family offers, and their spellings.

A file names a module by a path with dots after a prefix (`unet.down_blocks.0.…`), or by one in which underscores stand
for the dots (`lora_unet_down_blocks_0_…`). The second cannot be read back, so all spellings of all modules are listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from sfumato.checkpoint.rules import KeyMap, Split, SwapHalves

WEIGHT, BIAS = ".weight", ".bias"
WHOLE, SWAPPED = (0,), (1, 0)


@dataclass(frozen=True)
class Share:
    """A module, and of which rows of another layout's it is made: of its `of` equal parts, those numbered `rows`.

    One of three that are fused there has the rows (0,), (1,) or (2,) of 3; one whose halves stand in the other order
    has (1, 0) of 2.
    """

    module: str
    rows: tuple[int, ...] = WHOLE
    of: int = 1


@dataclass(frozen=True)
class Target:
    """What a file's module changes: a module of a part of ours, by a share of its rows."""

    part: str
    share: Share


Table = Mapping[str, tuple[Share, ...]]  # paths of modules in files to ours


@dataclass(frozen=True)
class PartNames:
    """One network as files name it.

    part: its name among ours. tables: several where several layouts are in use.
    dotted: prefixes of paths with dots, such as "unet."; "" where paths stand alone. flat: prefixes of paths with
    underscores, such as "lora_unet_".
    """

    part: str
    tables: tuple[Table, ...]
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
                    targets = tuple(Target(part.part, share) for share in ours)
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


def modules(table: KeyMap) -> dict[str, tuple[Share, ...]]:
    """Paths of modules with weights, theirs to ours, from a table of tensors.

    One that is several of ours is there as a whole, and each of its parts by its number, as OneTrainer has them.
    """
    found: dict[str, tuple[Share, ...]] = {}
    for rule in table.rules:
        theirs = rule.theirs
        if not isinstance(theirs, str) or not theirs.endswith(WEIGHT):
            continue
        path = theirs.removesuffix(WEIGHT)
        if isinstance(rule, Split):
            ours = [name.removesuffix(WEIGHT) for name in rule.ours]
            found[path] = tuple(Share(name, (k,), len(ours)) for k, name in enumerate(ours))
            found |= {f"{path}.{k}": (Share(name),) for k, name in enumerate(ours)}
        else:
            rows = (SWAPPED, 2) if isinstance(rule, SwapHalves) else (WHOLE, 1)
            found[path] = (Share(str(rule.ours).removesuffix(WEIGHT), *rows),)
    return found


def same(paths: Iterable[str]) -> dict[str, tuple[Share, ...]]:
    """A table of paths that files and we share."""
    return {path: (Share(path),) for path in paths}


def inverse(table: Table) -> dict[str, Share]:
    """Each module of ours: the module there that it is a share of, where several say it the first."""
    found: dict[str, Share] = {}
    for theirs, shares in table.items():
        for share in shares:
            found.setdefault(share.module, Share(theirs, share.rows, share.of))
    return found


def with_aliases(table: Table, aliases: Mapping[str, str]) -> dict[str, tuple[Share, ...]]:
    """The table with other endings of paths beside those there: {"to_out.0": "to_out"}."""
    more = dict(table)
    for path, ours in table.items():
        for ending, other in aliases.items():
            if path.endswith("." + ending):
                more.setdefault(path[: -len(ending)] + other, ours)
    return more
