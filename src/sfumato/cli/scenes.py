"""`sfumato scenes`: pictures of the procedural world, with their truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import parse, show
from sfumato.errors import InputError

EXAMPLE = "sfumato scenes --out my-scenes -n 100"
MAX_SCENES = 10_000_000


def scenes(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.")],
    count: Annotated[str, typer.Option("-n", "--count", metavar="N", help="How many pictures.")] = "100",
    size: Annotated[str, typer.Option(metavar="N", help="Side in pixels.")] = "128",
    seed: Annotated[str, typer.Option(metavar="N", help="The first scene's seed.")] = "0",
    split: Annotated[str, typer.Option(metavar="NAME", help="train or a held-out split.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Render a captioned folder with instance masks, depth and scene graphs."""
    number = parse.whole("count", count)
    if not 1 <= number <= MAX_SCENES:
        raise InputError(f"count must be between 1 and {MAX_SCENES}, not {number}", argument="count")
    side = parse.size(size)
    first = parse.whole("seed", seed)
    from sfumato.scenes.folder import write_folder

    write_folder(out, number, size=side[0], seed=first, split=split)
    if as_json:
        show.answer({"out": str(out), "count": number, "size": side[0], "seed": first, "split": split})
    else:
        show.line(f"{out}: {number} scenes")
