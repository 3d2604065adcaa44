"""What a person sees: progress on standard error when it is a terminal, answers on standard output."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text


def console() -> Console:
    """Standard error as a rich console."""
    from rich.console import Console

    return Console(stderr=True)


def answer(value: Any) -> None:
    """Print `value` as one JSON object on one line of standard output."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def line(text: str) -> None:
    """Print one line on standard output, whatever characters a path holds."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def note(message: str) -> None:
    """Print one line on standard error, of something that should be known and hinders nothing."""
    line = " ".join(message.split())
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write("note: " + line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def table(title: str, columns: list[str], rows: list[list[str]], keys: int = 1) -> None:
    """Print a table on standard output; one too wide for it in parts, each with the first `keys` columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    width = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for number, places in enumerate(_fitting(width, keys, console.width)):
        drawn = Table(title=None if number else Text(title), title_justify="left", header_style="bold")
        for place in places:
            drawn.add_column(columns[place], justify="left" if place < keys else "right")
        for row in rows:
            drawn.add_row(*(Text(row[place]) for place in places))
        console.print(drawn)


def _fitting(width: list[int], keys: int, room: int) -> list[list[int]]:
    """Places of the columns of each part: the keys, and as many others as there is room for, at least one."""
    border = 3  # of a column: a line and a space on either side
    first = list(range(keys))
    parts, used = [list(first)], 1 + sum(width[place] + border for place in first)
    left = room - used
    for place in range(keys, len(width)):
        if width[place] + border > left and len(parts[-1]) > keys:
            parts.append(list(first))
            left = room - used
        parts[-1].append(place)
        left -= width[place] + border
    return parts


def progress() -> Progress:
    """A rich progress display on standard error that is silent when that is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )


def training() -> Progress:
    """A progress display whose tasks have a text `told` beside the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    screen = console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        console=screen,
        refresh_per_second=4,
        disable=not screen.is_terminal,
    )


def half_blocks(image: Image, columns: int = 48) -> Text:
    """The picture as text, two pixels to a character: the upper as the ink of ▀, the lower as its ground."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    rows = max(1, round(columns * image.height / image.width / 2))
    pixels = image.convert("RGB").resize((columns, 2 * rows)).tobytes()
    text = Text()
    for row in range(rows):
        for column in range(columns):
            above = 3 * (2 * row * columns + column)
            below = above + 3 * columns
            ink = Color.from_rgb(*pixels[above : above + 3])
            ground = Color.from_rgb(*pixels[below : below + 3])
            text.append("▀", Style(color=ink, bgcolor=ground))
        text.append("\n")
    return text
