"""`sfumato scenes`: pictures of the procedural world, with their truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import parse, show

EXAMPLE = "sfumato scenes --out my-scenes -n 100"


def scenes(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.")],
    count: Annotated[str, typer.Option("-n", "--count", metavar="N", help="How many pictures.")] = "100",
    size: Annotated[str, typer.Option(metavar="N", help="Side in pixels.")] = "128",
    seed: Annotated[str, typer.Option(metavar="N", help="Scene k is the scene of seed + k.")] = "0",
    split: Annotated[str, typer.Option(metavar="NAME", help="train, or a held-out split.")] = "train",
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Render a captioned folder with instance masks, depth and scene graphs."""
    number = parse.between("count", parse.whole("count", count), 1, 10_000_000)
    side = parse.between("size", parse.whole("size", size), 8, 4096)
    first = parse.between("seed", parse.whole("seed", seed), 0, 2**63 - 1 - number)
    parse.folder("out", out)
    from sfumato.runtime import pick_device
    from sfumato.scenes.folder import write_folder

    with show.progress() as bar:
        task = bar.add_task("rendering", total=number)
        write_folder(
            out,
            number,
            seed=first,
            size=side,
            split=split,
            device=str(pick_device(device)),
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        show.answer({"out": str(out), "count": number, "size": side, "seed": first, "split": split})
    else:
        show.line(str(out))
