"""`sfumato models`: what can be asked for."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.cli import show

EXAMPLE = "sfumato models --json"


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """List the packaged models, the kinds of checkpoints that are opened, the samplers and the schedules."""
    from sfumato.diffusion.schedules import SCHEDULES
    from sfumato.families.describe import kinds
    from sfumato.generate import DEFAULT_MODEL, MODELS
    from sfumato.sampling import SAMPLERS

    if as_json:
        show.answer(
            {
                "models": list(MODELS),
                "default": DEFAULT_MODEL,
                "checkpoints": kinds(),
                "samplers": list(SAMPLERS),
                "schedules": list(SCHEDULES),
            }
        )
        return
    show.line("models       " + ", ".join(MODELS))
    show.line("checkpoints  " + ", ".join(kinds()))
    show.line("samplers     " + ", ".join(SAMPLERS))
    show.line("schedules    " + ", ".join(SCHEDULES))
