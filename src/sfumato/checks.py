"""Checks of single values, each an `InputError` that names the argument and says what would be right."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable

from sfumato.errors import InputError

MAX_PROMPT = 32_000  # characters; what the OpenAI image endpoint accepts
MAX_LEVEL = 1e6  # of noise
SHOWN = 80  # characters of a value in a message


def text(name: str, value: object) -> None:
    """Text that can be kept anywhere: Unicode, not too long, without NUL."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {shown(value)}", argument=name)
    if len(value) > MAX_PROMPT:
        raise InputError(
            f"{name} has {len(value)} characters; at most {MAX_PROMPT} are accepted", argument=name
        )
    if "\0" in value:
        raise InputError(f"{name} holds a NUL character; remove it", argument=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half of a surrogate pair at position {error.start}; give valid Unicode",
            argument=name,
        ) from None


def name(name: str, value: object) -> None:
    """A name, or None."""
    if value is not None and not (isinstance(value, str) and value):
        raise InputError(f"{name} must be a name, not {shown(value)}", argument=name)


def integer(name: str, value: object, low: int, high: int, argument: str | None = None) -> None:
    """A whole number from low to high. argument: what the error names, `name` by default."""
    argument = argument or name
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, not {shown(value)}", argument=argument)
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {shown(value)}", argument=argument)


def whole(name: str, value: object, least: int) -> None:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            f"{name} must be a whole number of at least {least}, not {shown(value)}", argument=name
        )


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(name: str, value: object, low: float, high: float, argument: str | None = None) -> None:
    """A number from low to high, so none that is not one."""
    argument = argument or name
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, not {shown(value)}", argument=argument)
    if not low <= value <= high:  # false for NaN too
        raise InputError(
            f"{name} must be between {low:g} and {high:g}, not {shown(value)}", argument=argument
        )


def interval(name: str, value: object) -> None:
    """Two numbers, low and high."""
    if not (isinstance(value, tuple) and len(value) == 2):
        raise InputError(f"{name} must be two numbers, low and high, not {shown(value)}", argument=name)
    for end, bound in zip(("low", "high"), value, strict=True):
        number(f"{name}.{end}", bound, 0.0, MAX_LEVEL)
    if value[0] > value[1]:
        raise InputError(
            f"{name} must go from low to high, not from {value[0]:g} to {value[1]:g}", argument=name
        )


def picture(name: str, value: object) -> None:
    """A PIL picture with pixels."""
    from PIL.Image import Image

    if not isinstance(value, Image):
        raise InputError(
            f"{name} must be a PIL picture (`sfumato.pictures` makes one of a file or an array), not "
            f"{type(value).__name__}",
            argument=name,
        )
    if 0 in value.size:
        raise InputError(f"{name} has no pixels", argument=name)


def either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def meant(word: str, names: Iterable[str]) -> str:
    """ ", did you mean NAME?" for a word that is nearly one of `names`, else ""."""
    near = difflib.get_close_matches(word.lower(), list(names), 1)
    return f", did you mean {near[0]}?" if near else ""


def shown(value: object) -> str:
    """A value as a message can hold it: as JSON writes it, which every door knows, and what is no JSON as Python does;
    short, no more of it read than that needs, and without failing on a number of a million digits.
    """
    if isinstance(value, str):
        value = value[: SHOWN + 1]
    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            text += piece[: SHOWN + 1]
            if len(text) > SHOWN:
                break
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except (ValueError, RecursionError):
            many = isinstance(value, int)
            return (
                "a number of very many digits" if many else f"a {type(value).__name__} that cannot be shown"
            )
    text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text[: SHOWN + 1])
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
