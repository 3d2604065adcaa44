"""`sfumato models`: what can be asked for."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from sfumato.cli import show

EXAMPLE = "sfumato models --json"


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """List the packaged models and the kinds of checkpoints that are opened, each with what it draws with when nothing
    is said, and the samplers and schedules."""
    from sfumato.diffusion.schedules import SCHEDULES
    from sfumato.families.describe import kinds
    from sfumato.families.presets import presets
    from sfumato.generate import DEFAULT_MODEL, MODELS
    from sfumato.receipts import webui
    from sfumato.sampling import SAMPLERS

    ours, checkpoints = presets()
    if as_json:
        show.answer(
            {
                "models": list(MODELS),
                "default": DEFAULT_MODEL,
                "checkpoints": kinds(),
                "samplers": list(SAMPLERS),
                "schedules": list(SCHEDULES),
                "presets": ours | checkpoints,
            }
        )
        return
    show.line("models, in the package: what they draw with when nothing is said")
    for name, preset in ours.items():
        show.line(f"  {name:19}{_told(preset)}{' (default)' if name == DEFAULT_MODEL else ''}")
    show.line("checkpoints, opened by -m FILE, DIR or org/name; distilled ones differ")
    for name in kinds():
        show.line(f"  {name:19}{_told(checkpoints[name]) if name in checkpoints else ''}".rstrip())
    everyone = ours | checkpoints
    show.line("samplers: what web UIs call them, and whose preset they are")
    for name in SAMPLERS:
        show.line(_who("sampler", name, webui.SAMPLERS.get(name), everyone))
    show.line("schedules, in the same way")
    for name in SCHEDULES:
        show.line(_who("schedule", name, webui.SCHEDULES.get(name), everyone))


def _told(preset: dict[str, Any]) -> str:
    width, height = preset["size"]
    return (
        f"{preset['steps']} steps, guidance {preset['guidance']:g}, {preset['sampler']}, {preset['schedule']}, "
        f"{width}x{height}"
    )


def _who(what: str, name: str, label: str | None, presets: dict[str, dict[str, Any]]) -> str:
    users = [model for model, preset in presets.items() if preset[what] == name]
    families = [
        model for model in users if model.partition("-")[0] == model or model.partition("-")[0] not in users
    ]
    line = f"  {name:14}{label or '':18}{', '.join(families)}".rstrip()
    return textwrap.fill(line, 80, subsequent_indent=" " * 34, break_on_hyphens=False)
