"""`sfumato train`: a recipe to a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli import parse, show

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sfumato.train.loop import Event

EXAMPLE = "sfumato train recipes/folder.toml --data my-pictures --out runs/mine"
QUIET_SECONDS = 30.0  # between lines about progress where there is no terminal


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="What to train, on what, and how.")],
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of captioned pictures.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the run and its model go.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value: denoiser.train.steps=100."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Train from a recipe, or continue after any interruption: the same command again."""
    values = parse.overrides(overrides or [])
    if out is not None:
        parse.folder("out", out)
    from sfumato.train import run

    started = time.perf_counter()
    with show.training() as bar:
        folder = run(recipe, data=data, out=out, overrides=values, device=device, on_event=Reporter(bar))
    if as_json:
        show.answer({"model": str(folder), "seconds": round(time.perf_counter() - started, 1)})
    else:
        show.line(str(folder))


class Reporter:
    """Hears a run's events: a bar per stage on a terminal, a line now and then elsewhere."""

    def __init__(self, bar: Progress):
        self.bar = bar
        self.tasks: dict[tuple[str, str], TaskID] = {}
        self.spoke = -QUIET_SECONDS

    def __call__(self, event: Event) -> None:
        if event.kind in ("step", "prepare"):
            self._move(event)
        elif event.kind == "sheet":
            self.say(f"{event.stage}: samples at step {event.step} in {event.text}")
        elif event.text:
            self.say(f"{event.stage}: {event.text}")

    def _move(self, event: Event) -> None:
        told = describe(event)
        key = (event.stage, event.kind)
        if key not in self.tasks:
            name = event.stage if event.kind == "step" else f"{event.stage} (preparing)"
            self.tasks[key] = self.bar.add_task(name, total=event.total, start=True, told="")
        self.bar.update(self.tasks[key], completed=event.step, total=event.total, told=told)
        now = time.monotonic()
        if self.bar.disable and (now - self.spoke >= QUIET_SECONDS or event.step == event.total):
            self.spoke = now
            self.say(f"{event.stage} {event.step}/{event.total} {told}".rstrip())

    def say(self, text: str) -> None:
        """A line of text, above the bars."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(event: Event) -> str:
    """Loss, speed, share of the machine's peak, waiting, and time left, as far as the event knows them."""
    parts = []
    if "loss" in event.values:
        parts.append(f"loss {event.values['loss']:.4f}")
    if event.rate:
        parts.append(f"{event.rate:.1f}/s")
    if event.mfu:
        parts.append(f"MFU {event.mfu:.0%}")
    if event.stall > 0.005:
        parts.append(f"waiting {event.stall:.0%}")
    if event.seconds_left:
        parts.append(f"{duration(event.seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as 45s, 12m 05s or 3h 20m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
