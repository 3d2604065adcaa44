"""`sfumato generate`: a prompt to picture files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import parse, show

if TYPE_CHECKING:
    from rich.progress import Progress

EXAMPLE = 'sfumato generate "a red metal sphere behind a small blue cube" -o out.png --seed 7'


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw; may be empty.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="A .png, .jpg or .webp file; several become name-0, name-1 …"),
    ] = Path("out.png"),
    count: Annotated[str, typer.Option("-n", "--count", metavar="N", help="How many pictures.")] = "1",
    seed: Annotated[str, typer.Option(metavar="N", help="Picture k is the picture of seed + k.")] = "0",
    steps: Annotated[str | None, typer.Option(metavar="N", help="Sampling steps.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="X", help="How strictly to follow the prompt.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="See `sfumato models`.")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="NAME", help="See `sfumato models`.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels: 128 or 128x96.")] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What to stay away from.")] = "",
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A packaged model's name or a folder.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; the faster one by default.")
    ] = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Show the picture forming; beside the output if this is no terminal."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Draw pictures from a prompt. Each file carries its recipe."""
    from sfumato.receipts.provenance import check_output
    from sfumato.types import Request

    request = Request(
        prompt=prompt,
        negative=negative,
        count=parse.whole("count", count),
        seed=parse.whole("seed", seed),
        steps=None if steps is None else parse.whole("steps", steps),
        guidance=None if guidance is None else parse.number("guidance", guidance),
        sampler=sampler,
        schedule=schedule,
        size=None if size is None else parse.size(size),
    ).validate()
    check_output(output, request.count, request)

    started = time.perf_counter()
    from sfumato.generate import DEFAULT_MODEL, load

    loaded = load(DEFAULT_MODEL if model is None else model, device=device)
    with show.progress() as bar:
        watch, clean = _watcher(bar, loaded, output if preview else None)
        try:
            result = loaded.generate(request, on_step=watch)
        finally:
            clean()
    files = result.save(output)
    seconds = time.perf_counter() - started
    if as_json:
        show.answer(
            {
                "files": [str(file) for file in files],
                "seeds": request.seeds(),
                "seconds": round(seconds, 3),
                "recipe": result.recipe,
            }
        )
    else:
        for file in files:
            show.line(str(file))


def _watcher(
    bar: Progress, model: Any, preview: Path | None
) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """(on_step, clean up): moves the bar, and shows the forming picture in the terminal or in `name-preview.png`."""
    task = bar.add_task("drawing", total=None)
    file = None if preview is None else preview.with_name(f"{preview.stem}-preview.png")
    live = None
    if preview is not None and bar.console.is_terminal:
        from rich.live import Live

        live = Live(console=bar.console, transient=True, auto_refresh=False)
        bar.stop()
        live.start()

    def watch(step: Any) -> None:
        bar.update(task, total=step.total, completed=step.index + 1)
        if preview is None:
            return
        picture = model.preview(step.denoised[:1])
        if live is not None:
            from rich.console import Group

            live.update(Group(show.half_blocks(picture), bar.get_renderable()), refresh=True)
        elif file is not None:
            from sfumato.storage import atomic_file

            with atomic_file(file) as temporary:
                picture.save(temporary, format="PNG")

    def clean() -> None:
        if live is not None:
            live.stop()
        elif file is not None:
            file.unlink(missing_ok=True)

    return watch, clean
