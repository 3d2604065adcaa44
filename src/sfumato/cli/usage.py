"""`sfumato usage`: what was drawn and charged, by key and day."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from typer import Option

from sfumato.cli import show

EXAMPLE = "sfumato usage --keys keys.json --since 2026-01-01"


def usage(
    data: Annotated[
        Path | None,
        Option(metavar="DIR", help="The server's folder; as `sfumato serve` has it by default."),
    ] = None,
    ledger: Annotated[str | None, Option(metavar="URL", help="The server's ledger, if elsewhere.")] = None,
    keys: Annotated[Path | None, Option(metavar="FILE", help="The file of keys, for their names.")] = None,
    since: Annotated[
        str | None,
        Option(metavar="DAY", help="The first day, as 2026-01-31; that of the month by default."),
    ] = None,
    until: Annotated[str | None, Option(metavar="DAY", help="The last day; today by default.")] = None,
    as_json: Annotated[bool, Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Say what a server's keys have used, a line for each key and day. The server may be running."""
    from sfumato.serve.settings import default_data, ledger_url, require_extra

    require_extra()
    from sfumato.serve import keys as ring
    from sfumato.serve.ledger import check_days, day_of, month_of, open_existing

    now = time.time()
    first, last = since or f"{month_of(now)}-01", until or day_of(now)
    check_days(first, last)
    book = open_existing(ledger or ledger_url(data or default_data()))
    try:
        rows = book.usage(first, last)
        currency = book.currency
    finally:
        book.close()
    names = {key.id: key.name for key in ring.read(keys)} if keys is not None else {}
    rows = [{**row, "name": names.get(row["tenant"], row["tenant"])} for row in rows]
    if as_json:
        show.answer({"currency": currency, "since": first, "until": last, "usage": rows})
        return
    cells = [
        [
            row["day"], row["name"], str(row["jobs"]), str(row["pictures"]), f"{row['seconds']:.1f}",
            f"{row['micros'] / 1e6:.6f}",
        ]
        for row in rows
    ]  # fmt: skip
    show.table(
        f"from {first} to {last}", ["day", "key", "jobs", "pictures", "seconds", currency], cells, keys=2
    )
