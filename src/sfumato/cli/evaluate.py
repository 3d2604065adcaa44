"""`sfumato evaluate`: how often the model draws what it was asked to."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.cli import parse, show

EXAMPLE = "sfumato evaluate -m runs/mine --per-group 32"


def evaluate(
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A packaged model's name or a folder.")
    ] = None,
    per_group: Annotated[str, typer.Option(metavar="N", help="Prompts per task group.")] = "32",
    steps: Annotated[str | None, typer.Option(metavar="N", help="Sampling steps.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Score pictures of held-out prompts against the truth."""
    count = parse.whole("per-group", per_group)
    from sfumato.types import Request

    request = Request(steps=None if steps is None else parse.whole("steps", steps)).validate()
    from sfumato.evaluate import report
    from sfumato.generate import DEFAULT_MODEL, load

    result = report(load(model or DEFAULT_MODEL, device=device), per_group=count, steps=request.steps)
    show.answer(result) if as_json else show.line(str(result))
