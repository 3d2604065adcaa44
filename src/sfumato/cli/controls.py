"""Text of `--control` and `--controlnet` to control pictures and files of ControlNets."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.checkpoint.hub import is_hub_id
from sfumato.cli import parse
from sfumato.cli.loras import listed
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.types import Request

NONE = ["none"]
FORM = "KIND=IMAGE[:WEIGHT[:START-END]]"
EDGES = {"canny": "canny", "softedge": "softedge"}  # kinds whose picture is made of a plain one, and how


@dataclass(frozen=True)
class Given:
    """One `--control`. values: of weight, start and end, those that were given."""

    name: str
    file: str
    values: Mapping[str, float]


def given(texts: Sequence[str]) -> list[Given]:
    """`canny=photo.png:0.8:0-0.6` to its parts; a file that is there may have colons in its own name."""
    return [_given(text) for text in texts]


def _given(text: str) -> Given:
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise InputError(f"control must be {FORM}, not {text[:60]!r}", argument="control")
    parts = rest.split(":")
    count = next((k for k in range(len(parts), 0, -1) if os.path.exists(":".join(parts[:k]))), None)
    if count is None:  # no such file: the message shall name what was meant by it
        count = max(1, len(parts) - 2)
        while count < len(parts) and not _is_number(parts[count].partition("-")[0]):
            count += 1
    file, more = ":".join(parts[:count]), parts[count:]
    if len(more) > 2:
        raise InputError(f"control must be {FORM}, not {text[:60]!r}", argument="control")
    values: dict[str, float] = {}
    if more and more[0]:
        values["weight"] = parse.number(f"control {name}'s weight", more[0])
    if len(more) == 2:
        start, dash, end = more[1].partition("-")
        if not dash:
            raise InputError(
                f"control {name}'s steps must be like 0-0.6, shares of all, not {more[1]!r}",
                argument="control",
            )
        values["start"] = parse.number(f"control {name}'s start", start)
        values["end"] = parse.number(f"control {name}'s end", end)
    return Given(name, file, values)


def files(texts: Sequence[str], what: str = "controlnet") -> dict[str, Path]:
    """`canny=FILE` to files of ControlNets by name, or to folders of what makes pictures for them. what: the option."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise InputError(f"{what} must be KIND=FILE, not {text[:60]!r}", argument=what)
        if name in found:
            raise InputError(f"{what} gives {name!r} twice; call one of them otherwise", argument=what)
        if not Path(file).exists() and not is_hub_id(file):
            right = "a .safetensors file, a folder," if what == "controlnet" else "a folder"
            raise InputError(
                f"{what} {file!r} does not exist; give {right} or org/name of the Hub",
                argument=what,
            )
        found[name] = Path(file)
    return found


def requested(
    wanted: Sequence[Given],
    ready: Sequence[str],
    guess: bool | None,
    said: object,
    like: Path | None,
    dropped: bool,
    makers: Collection[str] = (),
) -> list[dict[str, Any]] | None:
    """The request's controls: those given, laid over what the picture `like` says of its own of the same names.

    ready: kinds whose picture is taken as it is. makers: those whose picture a network makes. said: of `like`, whose
    pictures must be given again.
    """
    before = [dict(each) for each in listed(said)]
    if dropped:
        before = []
    for name in ready:
        if name not in {one.name for one in wanted}:
            raise InputError(
                f"control-ready names {name!r}, which no --control gives", argument="control-ready"
            )
    for name in makers:
        if name not in {one.name for one in wanted}:
            raise InputError(f"annotator names {name!r}, which no --control gives", argument="annotator")
    if guess is not None and not wanted:
        raise InputError("guess goes with --control", argument="guess")
    made: list[dict[str, Any]] = []
    for one in wanted:
        place = next((k for k, each in enumerate(before) if each.get("name") == one.name), None)
        kept = {} if place is None else before.pop(place)
        prepare = kept.get("prepare") if kept else EDGES.get(one.name)
        prepare = one.name if one.name in makers else prepare
        values = {
            **kept,
            "name": one.name,
            "image": parse.picture(f"control {one.name}", Path(one.file), black=True),
            **one.values,
        }
        values["prepare"] = None if one.name in ready else prepare
        if guess is not None:
            values["guess"] = guess
        made.append(values)
    if before:
        left = before[0].get("name")
        raise InputError(
            f"{like} was drawn with a control picture for {left!r}; give it, or a new one, by --control {left}=FILE, "
            "or leave all out by --control none",
            argument="control",
        )
    return made or None


def idle(model: Model, request: Request, networks: Collection[str]) -> list[str]:
    """What is to be said of ControlNets that were given and do nothing: without a picture, or within no step."""
    from sfumato.drawing.control import without_steps

    pictured = {control.name for control in request.controls or ()}
    notes = [
        f"the ControlNet {name} does nothing without its picture; give it by --control {name}=FILE"
        for name in networks
        if name not in pictured
    ]
    for control, steps in without_steps(model, request):
        notes.append(
            f"control {control.name} does nothing: none of the {steps} steps lies between {control.start:g} and "
            f"{control.end:g} of them; give it more of them, or draw with more steps"
        )
    return notes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
