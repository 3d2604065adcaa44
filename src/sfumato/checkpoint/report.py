"""What names of tensors were wanted and what were there: the one place that says how they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sfumato.checkpoint.header import shown
from sfumato.errors import CheckpointError

SHOWN = 10  # names that an error lists before it says how many more there are


@dataclass(frozen=True)
class Report:
    """How the names of a file meet those of a map, or of a module.

    matched: names that have a place. dropped: names left by a rule, with its reason. missing: names that would be
    needed. unexpected: names that have none. doubled: names of ours that a file gives more than once.
    """

    matched: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    doubled: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.doubled)

    def describe(self) -> str:
        """What keeps it from being complete, in one line."""
        told = [
            f"{len(names)} {kind}: {some(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("given twice", self.doubled),
            )
            if names
        ]
        return "; ".join(told) or f"all {len(self.matched)} tensors have their place"

    def require(self, where: str) -> None:
        """`CheckpointError` with the first names of each kind, unless it is complete. `where` stands for the file."""
        if not self.complete:
            raise CheckpointError(f"{where} does not hold exactly the tensors expected: {self.describe()}")


def compare(expected: Iterable[str], found: Iterable[str]) -> Report:
    """Names that are wanted against names that are there, each kind in alphabetical order."""
    wanted, there = set(expected), set(found)
    return Report(
        matched=tuple(sorted(wanted & there)),
        missing=tuple(sorted(wanted - there)),
        unexpected=tuple(sorted(there - wanted)),
    )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(map(shown, names[:SHOWN])) + (f" and {more} more" if more > 0 else "")
