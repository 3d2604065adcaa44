"""`sfumato generate --prompts FILE`: many requests into a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli import parse, show
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.bulk.drawing import Task
    from sfumato.bulk.prompts import Line
    from sfumato.cli.loras import Given
    from sfumato.generate import Model
    from sfumato.parts import LoraUse
    from sfumato.types import Request

Write = Callable[["Sequence[Task]"], "Iterator[dict[str, Any]]"]


def lines_of(prompts: Path, given: dict[str, Any], others: dict[str, Any], output: Path) -> list[Line]:
    """The requests of a file. given: what the command line says for all. others: what goes with one picture only.

    `InputError` if any of those is there, or the output is a file's name.
    """
    from sfumato.bulk.prompts import read_prompts

    for name, value in others.items():
        if value:
            raise InputError(f"--prompts draws each line of a file; leave out {name}", argument="prompts")
    if output.suffix:
        raise InputError(
            f"with --prompts the output is a folder, such as -o pictures, not {str(output)!r}",
            argument="output",
        )
    return read_prompts(prompts, parse.merged(given, {}))


def largest(lines: Sequence[Line]) -> Request:
    """The request that needs the most memory, as far as their sizes say."""

    def pixels(line: Line) -> int:
        width, height = line.request.size or (0, 0)
        return width * height * line.request.count

    return max(lines, key=pixels).request


def draw(loaded: Model, lines: Sequence[Line], folder: Path, write: Write, as_json: bool) -> None:
    """Draw what is not there yet, with a bar, and say what there is."""
    from sfumato.bulk import drawing

    started = time.perf_counter()
    parse.folder("output", folder)
    wanted = drawing.tasks(loaded, lines, folder)
    left = drawing.missing(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    receipts: list[dict[str, Any]] = []
    with show.progress() as bar:
        task = bar.add_task("drawing", total=len(wanted), completed=len(wanted) - len(left))
        try:
            for receipt in write(left):
                receipts.append(receipt)
                bar.update(task, advance=1)
        finally:
            total = drawing.add_bill(folder, receipts)
    seconds = round(time.perf_counter() - started, 3)
    answer = {
        "folder": str(folder),
        "lines": len(wanted),
        "drawn": len(left),
        "there_before": len(wanted) - len(left),
    }
    if as_json:
        files = [str(task.output) for task in wanted]
        show.answer({**answer, "seconds": seconds, "bill": total, "outputs": files})
    else:
        show.line(
            f"{folder}: {len(left)} of {len(wanted)} lines drawn in {seconds:.1f} s, the others were there"
        )


def writer(
    loaded: Model,
    options: dict[str, Any],
    adapters: Sequence[Given],
    wanted: Sequence[LoraUse],
    partial: bool,
    ray: str | None,
    replicas: str,
) -> Write:
    """What draws tasks: this process, or those of a Ray cluster, which open the model as this one did. options: of
    `load`. adapters, wanted: the LoRAs, and how much of each.
    """
    if ray is None:
        from sfumato.bulk.drawing import draw_here

        return lambda tasks: draw_here(loaded, tasks)
    from sfumato.cluster.bulk import Opening, drawing

    uses = {use.name: use for use in wanted}
    loras = tuple(
        {
            "lora": one.file,
            "weight": uses[one.name].weight,
            "name": one.name,
            "blocks": dict(uses[one.name].blocks),
            "partial": partial,
        }
        for one in adapters
    )
    return drawing(Opening(options, loras), ray, replicas_of(replicas))


def replicas_of(text: str) -> int:
    """How many processes of a cluster are to work."""
    return parse.between("replicas", parse.whole("replicas", text), 1, 1000)
