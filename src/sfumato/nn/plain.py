"""Configurations of networks from plain values, as JSON has them."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from sfumato.errors import InputError

C = TypeVar("C")


def from_plain(cls: type[C], values: dict[str, Any], what: str) -> C:
    """A dataclass, lists for tuples; an unknown field is an `InputError` that lists the known ones.

    what: whose fields they are, in the error.
    """
    known = list(inspect.signature(cls).parameters)
    for name in values:
        if name not in known:
            raise InputError(f"unknown {what} field {name!r}; known are {', '.join(known)}", argument=name)
    return cls(**{name: as_tuple(value) for name, value in values.items()})


def as_tuple(value: Any) -> Any:
    """Lists, also nested ones, as tuples; anything else as it is."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
