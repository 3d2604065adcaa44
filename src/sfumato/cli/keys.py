"""`sfumato keys`: who may use a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from sfumato.cli import parse, show
from sfumato.errors import InputError

ABOUT = "Keys of a server: made, revoked, listed. Only their hashes are kept."
Keys = Annotated[Path, Option("--keys", metavar="FILE", help="The file of keys.")]
AsJson = Annotated[bool, Option("--json", help="Answer with one JSON object.")]


def add(
    name: Annotated[str, Argument(help="What to call it.")],
    keys: Keys,
    budget: Annotated[
        str | None,
        Option(metavar="AMOUNT", help="What it may spend in a calendar month (UTC), as 2.50."),
    ] = None,
    rate: Annotated[str | None, Option(metavar="N", help="Jobs that it may submit in a minute.")] = None,
    queue: Annotated[str | None, Option(metavar="N", help="Jobs that it may have open at once.")] = None,
    watch: Annotated[bool, Option("--watch", help="For /metrics alone: it may not draw.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, this once."""
    from sfumato.serve import keys as ring
    from sfumato.serve import money

    limits = {
        name: None if text is None else _limit(name, text)
        for name, text in (("rate", rate), ("queue", queue))
    }
    micros = None if budget is None else money.amount(budget, "budget")
    token, key = ring.add(keys, name, budget=micros, role=ring.WATCH if watch else ring.DRAW, **limits)
    if as_json:
        show.answer({"key": token, "id": key.id, "name": key.name})
    else:
        show.line(token)


def revoke(
    name: Annotated[str, Argument(help="The key's name or id.")], keys: Keys, as_json: AsJson = False
) -> None:
    """Revoke a key. A running server refuses it from its next request on."""
    from sfumato.serve import keys as ring

    key = ring.revoke(keys, name)
    if as_json:
        show.answer({"revoked": key.id, "name": key.name})
    else:
        show.line(f"revoked {key.name} ({key.id})")


def listing(keys: Keys, as_json: AsJson = False) -> None:
    """List the keys with their limits."""
    from sfumato.serve import keys as ring

    found = ring.read(keys)
    if as_json:
        names = ("id", "name", "made", "revoked", "budget", "rate", "queue", "role")
        show.answer({"keys": [{name: getattr(key, name) for name in names} for key in found]})
        return
    rows = [
        [
            key.name,
            key.id,
            key.role,
            _day(key.made),
            "in use" if key.revoked is None else f"revoked {_day(key.revoked)}",
            "" if key.budget is None else f"{key.budget / 1e6:g}",
            "" if key.rate is None else str(key.rate),
            "" if key.queue is None else str(key.queue),
        ]
        for key in found
    ]
    columns = ["name", "id", "role", "made", "state", "a month", "a minute", "open"]
    show.table(f"{len(found)} keys", columns, rows)


def _day(when: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(when))


def _limit(name: str, text: str) -> int:
    value = parse.whole(name, text)
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}", argument=name)
    return value


VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "add": (add, "sfumato keys add studio --keys keys.json --budget 20 --rate 60"),
    "revoke": (revoke, "sfumato keys revoke studio --keys keys.json"),
    "list": (listing, "sfumato keys list --keys keys.json"),
}
