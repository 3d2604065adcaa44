"""Text of the command line to values, with errors that name the argument."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import InputError, naming

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
READ = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}  # what a text encoder can be kept in
DRAWN = DTYPES | {"int8": "int8"}  # what a network can be drawn with
UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "k": 2**10, "m": 2**20, "g": 2**30,
}  # fmt: skip
_BYTES = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmg]?i?b|[kmg])", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_SIZE = re.compile(r"([0-9]{1,9})(?:[xX×]([0-9]{1,9}))?")


def whole(name: str, text: str) -> int:
    """A whole number such as 7; the range is checked by `Request.validate`."""
    if not _WHOLE.fullmatch(text.strip()):
        raise InputError(f"{name} must be a whole number, not {_quoted(text)}", argument=name)
    return int(text)


def number(name: str, text: str) -> float:
    """A finite or infinite number such as 4.5; the range is checked by `Request.validate`."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} must be a number, not {_quoted(text)}", argument=name) from None


def size(text: str, name: str = "size") -> tuple[int, int]:
    """`128` or `128x96` to (width, height) in pixels."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InputError(f"{name} must be like 128 or 128x96, not {_quoted(text)}", argument=name)
    width = int(match[1])
    return width, int(match[2] or width)


def size_in_bytes(name: str, text: str) -> int:
    """`6GB`, `6.5 GiB`, `800M` to bytes; a single letter is a power of 1024, as in other tools."""
    match = _BYTES.fullmatch(text.strip())
    if not match or match[2].lower() not in UNITS:
        raise InputError(f"{name} must be like 6GB or 800MiB, not {_quoted(text)}", argument=name)
    return int(float(match[1]) * UNITS[match[2].lower()])


def sides(name: str, text: str) -> tuple[int, int, int, int]:
    """`64`, or `0,0,128,0` to pixels at the (left, top, right, bottom)."""
    parts = text.split(",")
    if len(parts) not in (1, 4):
        raise InputError(
            f"{name} must be like 64, for every side, or LEFT,TOP,RIGHT,BOTTOM, not {_quoted(text)}",
            argument=name,
        )
    left, top, right, bottom = (whole(name, part) for part in (parts * 4)[:4])
    return left, top, right, bottom


def variation(text: str) -> dict[str, Any]:
    """`SEED:STRENGTH`, such as 7:0.2."""
    seed, colon, strength = text.partition(":")
    if not colon:
        raise InputError(
            f"variation must be like SEED:STRENGTH, for example 7:0.2, not {_quoted(text)}",
            argument="variation",
        )
    return {"seed": whole("variation", seed), "strength": number("variation", strength)}


def interval(name: str, text: str) -> tuple[float, float]:
    """`LOW:HIGH`, such as 0.3:1."""
    low, colon, high = text.partition(":")
    if not colon:
        raise InputError(
            f"{name} must be like LOW:HIGH, for example 0.3:1, not {_quoted(text)}", argument=name
        )
    return number(name, low), number(name, high)


def guidance(text: str) -> dict[str, float]:
    """`3`, or `1:3` from the first frame of a clip to its last, to fields of a request."""
    first, colon, last = text.partition(":")
    if not colon:
        return {"guidance": number("guidance", text)}
    return {"guidance_first": number("guidance", first), "guidance": number("guidance", last)}


def merged(given: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request from those `given`, some of them inner ones such as `hires.scale`, laid over those `said`."""
    values = dict(said)
    for name, value in given.items():
        outer, dot, inner = name.partition(".")
        if dot:
            values[outer] = {**(values.get(outer) or {}), inner: value}
        else:
            values[outer] = value
    return values


def wholes(name: str, text: str) -> tuple[int, ...]:
    """`7,8,9` to whole numbers."""
    return tuple(whole(name, part) for part in text.split(","))


def micro(pairs: list[str]) -> dict[str, Any]:
    """`original=4096x4096`, `negative-crop=0,64`, `aesthetic=6` … to fields of a request, as `micro.original`."""
    from dataclasses import fields

    from sfumato.types import Micro

    known = [f.name for f in fields(Micro)]
    values: dict[str, Any] = {}
    for pair in pairs:
        shown, equals, text = pair.partition("=")
        name = shown.strip().replace("-", "_")
        if not equals or name not in known:
            names = ", ".join(field.replace("_", "-") for field in known)
            raise InputError(
                f"micro must be like NAME=VALUE, with one of {names}; not {_quoted(pair)}", argument="micro"
            )
        if f"micro.{name}" in values:
            raise InputError(f"micro gives {shown} twice", argument="micro")
        if name.endswith("aesthetic"):
            value: Any = number(f"micro.{name}", text)
        elif name.endswith("crop"):
            left, comma, top = text.partition(",")
            if not comma:
                raise InputError(
                    f"micro.{name} must be like LEFT,TOP, not {_quoted(text)}", argument=f"micro.{name}"
                )
            value = whole(f"micro.{name}", left), whole(f"micro.{name}", top)
        else:
            value = size(text, f"micro.{name}")
        values[f"micro.{name}"] = value
    return values


def refiner(text: str) -> tuple[str, float | None]:
    """`MODEL`, or `MODEL:SHARE`, to the model's name and the share, if one is given; what exists is a name."""
    name, colon, share = text.rpartition(":")
    if not text or (colon and not name):
        raise InputError("refiner is empty; name a model, perhaps with :SHARE", argument="refiner")
    if not colon or os.path.exists(text):
        return text, None
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(
            "refiner must be MODEL or MODEL:SHARE, with a share of the noise levels from 0 to 1, not "
            f"{_quoted(share)}",
            argument="refiner",
        )
    return name, value


def embeddings(texts: list[str]) -> dict[str, Path]:
    """`FILE`, or `NAME=FILE`, to files by name; a file that is there may have = in its own name."""
    files: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or Path(text).is_file():
            name, file = Path(text).stem, text
        if not name or not file:
            raise InputError(
                f"embedding must be FILE or NAME=FILE, not {_quoted(text)}", argument="embedding"
            )
        if name in files:
            raise InputError(
                f"two embeddings are called {name!r}; give one of them another name: --embedding NAME=FILE",
                argument="embedding",
            )
        files[name] = Path(file)
    return files


def picture(name: str, path: Path, mask: bool = False, black: bool = False) -> Image:
    """The picture or mask in a file, read with care; black: on which transparency lies, white otherwise."""
    from sfumato.pictures import BLACK, WHITE, decode, decode_mask, read_file, shown

    data, called = read_file(path, name), f"{name} {shown(path)}"
    with naming(name):
        return decode_mask(data, called) if mask else decode(data, called, BLACK if black else WHITE)


def dtype(text: str, names: Mapping[str, str] = DTYPES, name: str = "dtype") -> torch.dtype:
    """`fp32`, `fp16`, `bf16`, or another of `names`, as PyTorch has it."""
    if text not in names:
        raise InputError(f"{name} must be one of {', '.join(names)}, not {_quoted(text)}", argument=name)
    import torch

    return getattr(torch, names[text])


def between(name: str, value: int, low: int, high: int) -> int:
    """The value itself if it lies in [low, high]."""
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value}", argument=name)
    return value


def folder(name: str, path: Path) -> Path:
    """The path itself if a folder stands there or could be made there."""
    shown = _quoted(str(path))
    try:
        standing = path
        while not os.path.lexists(standing) and standing != standing.parent:
            standing = standing.parent
        if not standing.is_dir():
            raise InputError(
                f"{name} {shown} lies below {_quoted(str(standing))}, which is no folder", argument=name
            )
        if not os.access(standing, os.W_OK | os.X_OK):
            raise InputError(f"{name} {shown} cannot be written to", argument=name)
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise InputError(f"{name} {shown} cannot be used: {reason}", argument=name) from None
    return path


def overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` pairs to a dict; values are TOML (10, 3e-4, true, [0.9, 0.95]), and text where they are not."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise InputError(f"--set takes key=value, not {_quoted(pair)}", argument="set")
        if key in values:
            raise InputError(f"--set gives {key} twice", argument="set")
        try:
            parsed = tomllib.loads(f"value = {text}")
        except (tomllib.TOMLDecodeError, RecursionError):
            parsed = {}
        values[key] = parsed["value"] if parsed.keys() == {"value"} else text
    return values


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
