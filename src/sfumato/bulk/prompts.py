"""A file of prompts: one request a line, as plain text, JSON Lines or CSV.

.txt     each line is a prompt; empty lines are passed over
.jsonl   each line is an object with fields of a request: {"prompt": "a red cube", "seed": 7, "size": [128, 96]}
.csv     the first line names the fields, inner ones as hires.scale; an empty cell says nothing; a size is 128x96
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato import checks
from sfumato.errors import DataError, InputError
from sfumato.parts import MAX_SEED
from sfumato.storage import strict_json
from sfumato.types import Request

MOST_BYTES = 2**30
ELSEWHERE = ("image", "mask", "clip", "controls")  # fields whose value is a picture, which a line cannot hold
WORDS = ("prompt", "negative", "sampler", "schedule", "fit", "prompt_rules", "weighting", "hires.upscaler")
WHOLE = (
    "count",
    "seed",
    "steps",
    "clip_skip",
    "reuse",
    "text_length",
    "frames",
    "hires.steps",
    "variation.seed",
)


@dataclass(frozen=True)
class Line:
    """One request. number: of the line in the file, counted from 1."""

    number: int
    request: Request


def read_prompts(path: Path, common: Mapping[str, Any]) -> list[Line]:
    """The requests of a file, each with the fields of `common` that its line does not say itself.

    A line without a seed has the common one, or 0, plus its place in the file, so that equal prompts give different
    pictures. `InputError` for a file of another kind, `DataError` naming the line for one that is no request.
    """
    text = _text(path)
    read = {".txt": _of_text, ".jsonl": _of_json, ".csv": _of_csv}.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f"prompts must be a .txt, .jsonl or .csv file, not {path.name!r}", argument="prompts"
        )
    lines = [_line(number, values, common, place) for place, (number, values) in enumerate(read(text, path))]
    if not lines:
        raise DataError(f"{path} holds no prompts", argument="prompts")
    return lines


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"prompts {str(path)!r} has more than {MOST_BYTES:,} bytes", argument="prompts")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"prompts {str(path)!r} cannot be read: {error.strerror}", argument="prompts"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 at byte {error.start}", argument="prompts") from None


def _line(number: int, values: dict[str, Any], common: Mapping[str, Any], place: int) -> Line:
    try:
        for name in ELSEWHERE:
            if name in values:
                raise InputError(f"a line of prompts cannot hold {name}; draw it by itself", argument=name)
        request = Request.from_dict({"prompt": "", **common, **values})
        if "seed" not in values:
            request = replace(request, seed=(request.seed + place) % (MAX_SEED + 1))
    except InputError as error:
        raise DataError(f"line {number} of the prompts: {error}", argument="prompts") from None
    return Line(number, request)


def _of_text(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _of_json(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = strict_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"line {number} of {path} is no JSON: {str(error)[:120]}", argument="prompts"
            ) from None
        if not isinstance(values, dict):
            raise DataError(f"line {number} of {path} must be an object", argument="prompts")
        yield number, values


def _of_csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(text), strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        if "prompt" not in names or len(set(names)) < len(names):
            raise DataError(
                f"the first line of {path} must name the fields, each once, with prompt among them",
                argument="prompts",
            )
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(
                    f"line {rows.line_num} of {path} has {len(row)} cells for {len(names)} fields",
                    argument="prompts",
                )
            yield rows.line_num, _nested(zip(names, row, strict=True), rows.line_num)
    except csv.Error as error:
        raise DataError(f"line {rows.line_num} of {path} is no CSV: {error}", argument="prompts") from None


def _nested(cells: Iterable[tuple[str, str]], number: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in cells:
        if not text:
            continue
        outer, _, inner = name.partition(".")
        value = _value(name, text, number)
        if inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[name] = value
    return found


def _value(name: str, text: str, number: int) -> Any:
    if name in WORDS:
        return text
    try:
        if name == "size":
            width, _, height = text.partition("x")
            return [int(width), int(height)]
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        raise DataError(
            f"line {number} of the prompts: {name} cannot be {checks.shown(text)}", argument="prompts"
        ) from None
