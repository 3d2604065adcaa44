"""`sfumato chart`: what the autoencoder of a model keeps of a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import parse, show
from sfumato.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

EXAMPLE = "sfumato chart -m sd_xl_base_1.0.safetensors -m runs/mine -o charts"


def chart(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="A name, folder, .safetensors file or org/name; an autoencoder alone will do. May be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR|FILE",
            help="A folder for chart.html, .png, .pdf and .json, or one file with such an ending. `chart` by default.",
        ),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="Another autoencoder for a checkpoint: a file or a folder.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, bf16 or fp16; what pictures are drawn in by default."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="Take what was measured before of the same weights and dtype.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer with the chart as JSON, and write files only with -o.")
    ] = False,
) -> None:
    """Measure an autoencoder as an optical instrument: fine patterns, words, lines, small objects, edges, colours."""
    names = models or [_default()]
    if vae is not None and len(names) > 1:
        raise InputError(
            "--vae goes with one model; several autoencoders are compared by -m for each", argument="vae"
        )
    place = output if output is not None or as_json else Path("chart")
    kind = None if dtype is None else parse.dtype(dtype)
    from sfumato.fidelity.page import check_place, write

    if place is not None:
        check_place(place)
    from sfumato.fidelity import store
    from sfumato.fidelity.chart import measure
    from sfumato.fidelity.instrument import open_instrument
    from sfumato.fidelity.ocr import MISSING, find_reader
    from sfumato.fidelity.specimens import specimens

    reader = None
    charts, seen = [], []
    with show.progress() as bar:
        for name in names:
            instrument = open_instrument(name, device, dtype=kind, vae=vae)
            found = store.find(instrument) if cached else None
            if found is None or not found.reader:
                reader = reader or find_reader()
            if found is None:
                if reader is None:
                    show.note(MISSING)
                found = measure(instrument, reader, on_progress=hearer(bar, name))
                store.keep(found)
            elif reader is not None and not found.reader:
                show.note(
                    f"the chart of {name} was measured without an OCR engine; without --cached it is read by one"
                )
            charts.append(found)
            if place is not None:
                seen.append(specimens(instrument))
            del instrument  # one autoencoder in memory at a time
    files = [] if place is None else write(charts, seen, place)
    if as_json:
        values = [each.to_dict() for each in charts]
        show.answer(values[0] if len(values) == 1 else {"charts": values})
        return
    show_limits(charts)
    for file in files:
        show.line(str(file))


def show_limits(charts: list[Any]) -> None:
    """The limits as a table."""
    from sfumato.fidelity.table import rows_of

    rows = [[words, *cells] for words, cells in rows_of(charts)]
    show.table("what the autoencoder keeps", ["", *(each.model for each in charts)], rows)


def hearer(bar: Progress, model: str) -> Callable[[str, int, int], None]:
    """Moves a bar for each section of a chart."""
    tasks: dict[str, Any] = {}

    def hear(doing: str, done: int, total: int) -> None:
        if doing not in tasks:
            tasks[doing] = bar.add_task(f"{model}: {doing}", total=total)
        bar.update(tasks[doing], completed=done, total=total)

    return hear


def _default() -> str:
    from sfumato.families import DEFAULT_MODEL

    return DEFAULT_MODEL
