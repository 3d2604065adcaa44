"""Text of the command line to values, with errors that name the argument."""

from __future__ import annotations

import re

from sfumato.errors import InputError

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


def size(text: str) -> tuple[int, int]:
    """`128` or `128x96` to (width, height) in pixels."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InputError(f"size must be like 128 or 128x96, not {_quoted(text)}", argument="size")
    width = int(match[1])
    return width, int(match[2] or width)


def overrides(pairs: list[str]) -> dict[str, str]:
    """`key=value` pairs to a dict of texts; a key given twice is an error."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"--set takes key=value, not {_quoted(pair)}", argument="set")
        if key in values:
            raise InputError(f"--set gives {key} twice", argument="set")
        values[key] = value
    return values


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
