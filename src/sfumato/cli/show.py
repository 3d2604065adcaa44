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


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


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
