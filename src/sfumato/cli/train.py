"""`sfumato train`: a recipe to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import parse, show

EXAMPLE = "sfumato train recipes/folder.toml --data my-pictures --out runs/mine"


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train, on what, and how.")],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of captioned pictures.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the run and its model go.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe.")
    ] = None,
) -> None:
    """Train from a recipe, or continue after any interruption: the same command again."""
    values = parse.overrides(overrides or [])
    from sfumato.train import run

    run(recipe, data=data, out=out, overrides=values, on_event=lambda event: show.line(str(event)))
