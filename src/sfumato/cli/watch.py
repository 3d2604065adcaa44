"""What is seen while a picture forms: the bar, and a look at the picture itself, in the terminal or in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.cli import show
from sfumato.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from sfumato.generate import Model
    from sfumato.types import Request, Result


def preview_of(output: Path) -> Path:
    """The file of the forming picture."""
    return output.with_name(f"{output.stem}-preview.png")


def check_preview(output: Path) -> None:
    """Raise `InputError` if the forming picture would go to a file, and one of its name is there already."""
    file = preview_of(output)
    if not show.console().is_terminal and os.path.lexists(file):
        raise InputError(
            f"the preview would overwrite {str(file)!r}; move that file, or name another output",
            argument="preview",
        )


def drawn(model: Model, request: Request, preview: Path | None) -> Result:
    """Draw with a bar; the bill goes into the recipe. preview: the output beside which the first is shown forming."""
    from sfumato.receipts import bill

    with show.progress() as bar:
        hear, clean = watcher(bar, model, preview)
        try:
            return bill.drawn(model, request, hear)
        finally:
            clean()


def watcher(
    bar: Progress, model: Any, preview: Path | None
) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """(on_step, clean up): moves the bar, and shows the forming picture in the terminal or in `name-preview.png`.

    Only a file that was written here is removed.
    """
    task = bar.add_task("drawing", total=None)
    file = None if preview is None else preview_of(preview)
    written = False
    live = None
    if preview is not None and bar.console.is_terminal:
        from rich.live import Live

        live = Live(console=bar.console, transient=True, auto_refresh=False)
        bar.stop()
        live.start()

    def watch(step: Any) -> None:
        nonlocal written
        bar.update(task, total=step.total, completed=step.index + 1)
        if preview is None:
            return
        picture = model.preview(step.denoised[:1])
        if live is not None:
            from rich.console import Group

            live.update(Group(show.half_blocks(picture), bar.get_renderable()), refresh=True)
        elif file is not None:
            from sfumato.storage import atomic_file

            written = True  # before it is: an interrupt may come as soon as it is there
            with atomic_file(file) as temporary:
                picture.save(temporary, format="PNG")

    def clean() -> None:
        if live is not None:
            live.stop()
        elif file is not None and written:
            file.unlink(missing_ok=True)

    return watch, clean
