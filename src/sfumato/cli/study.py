"""`sfumato study …`: many trainings that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import parse, show
from sfumato.cli.train import Reporter

if TYPE_CHECKING:
    from sfumato.study.budget import Plan
    from sfumato.study.recipe import StudyRecipe

ABOUT = "Train the same model in several ways with the same compute, and compare."


def compression(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.toml", help="Arms, seeds, budget, and the model.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the runs go; runs/NAME by default.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what the budget buys, and stop.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.md", help="Train nothing: write the page of what is there by now."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Which compression is worth its cost: pixels and latents of several factors, with equal FLOPs.

    Stop it whenever you like; the same command goes on. A page can be written at any time, with --report.
    """
    from sfumato.study.recipe import read_study

    study = read_study(recipe)
    place = parse.folder("out", out or Path("runs") / study.name)
    if plan:
        _plan(study, as_json)
        return
    from sfumato.study.results import read_results

    if report is not None:
        from sfumato.study.page import write_page

        parse.folder("report", report.parent)
        again = f"sfumato study compression {recipe} --report {report}"
        written = write_page(read_results(study, place), place, report, again)
        if as_json:
            show.answer({"written": [str(path) for path in written]})
        else:
            for path in written:
                show.line(str(path))
        return
    from sfumato.study.run import run_study

    with show.training() as bar:
        heard = Reporter(bar)
        run_study(study, place, device=device, on_event=heard, told=lambda text: heard.say(text))
    found = read_results(study, place)
    if as_json:
        show.answer({"study": str(place), "complete": found.everything()})
    else:
        show.line(str(place))


def _plan(study: StudyRecipe, as_json: bool) -> None:
    from dataclasses import asdict

    from sfumato.study.budget import plan, words_of

    words = words_of(study)
    plans = [plan(study, arm, study.seeds[0], words) for arm in study.arms]
    if as_json:
        kept = [{k: v for k, v in asdict(p).items() if k != "recipe"} for p in plans]
        show.answer({"study": study.name, "seeds": list(study.seeds), "arms": kept})
        return
    columns = [
        "arm",
        "numbers",
        "tokens",
        "weights",
        "autoencoder steps",
        "denoiser steps",
        "GFLOP a picture",
    ]
    show.table(
        f"{study.name}: {study.budget:.3g} FLOPs for each arm, {len(study.seeds)} seeds",
        columns,
        [_row(p) for p in plans],
    )


def _row(p: Plan) -> list[str]:
    first = p.recipe.autoencoder
    return [
        p.arm.name,
        f"{p.numbers:,}",
        str(p.tokens),
        f"{sum(p.parameters) / 1e6:.2f} M",
        f"{first.train.steps if first else 0:,}",
        f"{p.steps[-1]:,}",
        f"{p.picture / 1e9:.3f}",
    ]


VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "compression": (compression, "sfumato study compression recipes/study-cpu.toml --report page.md")
}
