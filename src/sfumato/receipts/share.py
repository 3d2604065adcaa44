"""One picture's share of what several took that were drawn together, so that the bills of their files add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIGITS = 9  # of a share that is no whole number: shares add up to within some billionths
MEASURED = ("seconds", "stages")  # of a recipe
BILLED = (  # of a receipt, a server's among them; memory is not shared out
    "calls",
    "expected_seconds",
    "flops",
    "joules",
    "megapixel_steps",
    "money",
    "pixel_steps",
    "seconds",
    "seconds_of",
    "total_seconds",
)


def share(recipe: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """The recipe of `count` pictures with its measured seconds and its receipt as those of picture `index` alone.

    The receipt's `pictures` stays: how many were drawn together. Whole numbers are shared out without a rest, the first
    pictures bearing one more.
    """
    found = {**recipe, **_shared(recipe, MEASURED, index, count)}
    bill = recipe.get("receipt")
    if isinstance(bill, Mapping):
        found["receipt"] = {**bill, **_shared(bill, BILLED, index, count)}
    return found


def _shared(values: Mapping[str, Any], names: tuple[str, ...], index: int, count: int) -> dict[str, Any]:
    return {name: _part(values[name], index, count) for name in names if name in values}


def _part(value: Any, index: int, count: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _part(inner, index, count) for name, inner in value.items()}
    if isinstance(value, int):
        return value // count + (index < value % count)
    return value if value is None or count == 1 else round(value / count, DIGITS)
