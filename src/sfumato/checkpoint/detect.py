"""What a file of weights is, by the names and shapes of its tensors: exactly one kind, or an error that says why not.

A `Signature` is data: a few tensors that must be there with their shapes, and names that must not. Families write them;
this file knows none. Signatures with a `refusal` are of kinds that are recognised so that they can be refused by name.
They are looked at first: a file with the marks of an unsupported kind is not taken for a supported one it resembles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from sfumato.checkpoint.header import shown
from sfumato.checkpoint.report import some
from sfumato.errors import CheckpointError

DIFFERENCES = 5  # tensors that an error compares with those of the nearest kind

Shape = tuple[int | None, ...]  # None is any extent


@dataclass(frozen=True)
class Signature:
    """The marks of one kind of file.

    kind: the system or network, such as "sdxl". part: "checkpoint" for a whole single file, else the network alone:
    "unet", "vae", "text_encoder". layout: whose names they are. required: name to shape, or to None for any shape; a
    `*` in a name stands for any run of characters, and one such name must be there. forbidden: names, with `*` too.
    prefix: what stands before the names of a network that is alone. traits: what else the marks say, for the family.
    refusal: why it cannot be used, as the end of a sentence that begins with "this is"; empty if it can.
    """

    kind: str
    part: str
    layout: str
    required: Mapping[str, Shape | None]
    forbidden: tuple[str, ...] = ()
    prefix: str = ""
    traits: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""

    @property
    def title(self) -> str:
        part = "" if self.part == "checkpoint" else f" {self.part}"
        return f"{self.kind}{part} ({self.layout} names)"


def identify(
    shapes: Mapping[str, Sequence[int]], signatures: Iterable[Signature], source: str = "the file"
) -> Signature:
    """The one signature that a file with these tensors (name to shape) bears.

    `CheckpointError` when it is of a kind that is refused, or of none: it names the nearest kind and the first
    tensors that differ. `source` names the file in messages.
    """
    signatures = tuple(signatures)
    matches = [signature for signature in signatures if not any(_differences(signature, shapes))]
    for refused in (s for s in matches if s.refusal):
        raise CheckpointError(f"{source} cannot be used: this is {refused.refusal}")
    if len(matches) > 1:
        kinds = " and ".join(signature.title for signature in matches)
        raise CheckpointError(f"{source} bears the marks of {kinds}; exactly one is right")
    if matches:
        return matches[0]
    raise CheckpointError(f"{source} is of no known kind: {_nearest(shapes, signatures)}")


def _differences(signature: Signature, shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What keeps a file from bearing the signature, in words, one by one; nothing when it does."""
    for name, shape in signature.required.items():
        if (found := _find(name, shapes)) is None:
            yield f"{name} is missing"
        elif shape is not None and not _fits(shapes[found], shape):
            right = ", ".join("any" if side is None else str(side) for side in shape)
            yield f"{name} is {tuple(shapes[found])} where ({right}) is right"
    for name in signature.forbidden:
        if (found := _find(name, shapes)) is not None:
            yield f"{shown(found)} does not belong there"


def _find(name: str, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The name itself if it is there, or the first that its `*` stands for."""
    if "*" in name:
        return next((found for found in shapes if fnmatchcase(found, name)), None)
    return name if name in shapes else None


def _fits(found: Sequence[int], shape: Shape) -> bool:
    return len(found) == len(shape) and all(
        side is None or side == at for at, side in zip(found, shape, strict=True)
    )


def _nearest(shapes: Mapping[str, Sequence[int]], signatures: Sequence[Signature]) -> str:
    """The kind that most marks speak for, and what differs."""
    best, highest, differences = None, 0.0, [""]
    for signature in (s for s in signatures if not s.refusal):
        there = sum(_find(name, shapes) is not None for name in signature.required)
        wrong = sum(_find(name, shapes) is not None for name in signature.forbidden)
        told = list(_differences(signature, shapes))
        score = (there - wrong) / len(signature.required) - len(told) / 100  # names first, then their shapes
        if score > highest:
            best, highest, differences = signature, score, told
    if best is None:
        return f"none of its {len(shapes)} tensors is one we look for; the first are {some(sorted(shapes))}"
    return f"the nearest is {best.title}, but {'; '.join(differences[:DIFFERENCES])}"
