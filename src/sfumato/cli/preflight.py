"""`sfumato preflight`: what of a picture or a prompt will not survive a model's autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import parse, show
from sfumato.cli.chart import hearer
from sfumato.errors import DataError, InputError
from sfumato.parts import MAX_SIDE

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.fidelity.chart import Chart
    from sfumato.fidelity.preflight import Preflight

EXAMPLE = "sfumato preflight poster.png -m sd_xl_base_1.0.safetensors --require 60 --html poster.html"
BELOW = 3  # the exit code when a score is below --require
ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}
MOST_SIDE = 16_384  # pixels, of a picture that is looked at; drawn is less
UNREAD = "cannot be read"  # in the place of a score
LINES = 12  # regions shown without --json


def preflight(
    picture: Annotated[
        Path | None,
        typer.Argument(metavar="PICTURE|FOLDER", help="A PNG, JPEG or WebP, or a folder of them."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Name, folder, .safetensors file, or org/name.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Look at a prompt instead of a picture.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Of the picture to be drawn; a picture is brought to it first."),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(metavar="SCORE", help="From 0 to 100: exit with code 3 when the score is below."),
    ] = None,
    foretell: Annotated[
        bool,
        typer.Option("--foretell", help="Tell losses from the chart alone, without running the autoencoder."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report as one HTML page.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a mask that keeps what would be lost, for `generate --mask`."
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
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Say before you pay what a picture or a prompt loses: text, small objects, thin lines, patterns, faces."""
    if (picture is None) == (prompt is None):
        raise InputError(
            "give a picture, a folder of them, or --prompt TEXT: one of them", argument="picture"
        )
    least = None if require is None else parse.number("require", require)
    if least is not None and not 0 <= least <= 100:
        raise InputError(f"require must lie between 0 and 100, not {require}", argument="require")
    wanted = None if size is None else parse.size(size)
    most = MOST_SIDE if prompt is None else MAX_SIDE
    if wanted is not None and not all(16 <= side <= most for side in wanted):
        raise InputError(f"size must lie between 16 and {most} pixels a side, not {size}", argument="size")
    if foretell and prompt is not None:
        raise InputError("foretell is for pictures; of a prompt everything is foretold", argument="foretell")
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"the report's name must end in .html, not {html.suffix!r}", argument="html")
    if mask is not None and (prompt is not None or (picture is not None and picture.is_dir())):
        raise InputError("a mask is of one picture", argument="mask")
    if wanted is not None and picture is not None:
        from sfumato.fidelity.room import check_room

        check_room(*wanted)
    files = [] if picture is None else pictures_of(picture)
    kind = None if dtype is None else parse.dtype(dtype)
    from sfumato.families import DEFAULT_MODEL

    name = DEFAULT_MODEL if model is None else model
    folder = picture is not None and picture.is_dir()
    single = [] if folder else files
    opened = {file: _read(file, wanted) for file in single}  # a bad picture fails before a model is opened
    instrument, chart = _chart_of(name, device, kind, vae)
    if prompt is not None:
        score, unread = _prompt(prompt, wanted or _usual_size(name), chart, html, as_json), 0
    else:
        score, unread = _pictures(
            files, opened, wanted, instrument, chart, not foretell, html, mask, as_json, many=folder
        )
    if least is None:
        return
    if score < least:
        show.note(f"the score {score:g} is below the {least:g} that is required")
    if unread:
        show.note(
            f"{unread} of {len(files)} pictures cannot be read: they do not reach the {least:g} that is required"
        )
    if unread or score < least:
        raise typer.Exit(BELOW)


def pictures_of(place: Path) -> list[Path]:
    """The picture files of a folder, by name, or the file itself. `InputError` when there is none."""
    if not place.is_dir():
        return [place]
    found = sorted(p for p in place.iterdir() if p.suffix.lower() in ENDINGS and not p.is_dir())
    if not found:
        raise InputError(f"the folder {str(place)!r} holds no PNG, JPEG or WebP", argument="picture")
    return found


def _read(file: Path, size: tuple[int, int] | None) -> Image:
    from PIL import Image

    from sfumato.fidelity.room import check_room

    image = parse.picture("picture", file)
    if size is None:
        check_room(*image.size)
        return image
    return image.resize(size, Image.Resampling.LANCZOS)


def _chart_of(model: str, device: str | None, dtype: Any, vae: Path | None) -> tuple[Any, Chart]:
    """The instrument and its chart: as measured before of the same weights, or now."""
    from sfumato.fidelity import store
    from sfumato.fidelity.chart import measure
    from sfumato.fidelity.instrument import open_instrument
    from sfumato.fidelity.ocr import find_reader

    instrument = open_instrument(model, device, dtype=dtype, vae=vae)
    chart = store.find(instrument)
    if chart is None:
        show.note(f"{instrument.name} has no chart yet; it is measured now, once")
        with show.progress() as bar:
            chart = measure(instrument, find_reader(), on_progress=hearer(bar, instrument.name))
        store.keep(chart)
    return instrument, chart


def _usual_size(model: str) -> tuple[int, int]:
    """What the model draws when nothing is said: of packaged models by their card, else asked for."""
    from sfumato.families import CARD, is_checkpoint, located, model_folder
    from sfumato.storage import read_json

    place = located(model)
    if is_checkpoint(place):
        raise InputError("give the picture's size with --size, such as 1024x1024", argument="size")
    width, height = read_json(model_folder(place) / CARD)["preset"]["size"]
    return int(width), int(height)


def _prompt(prompt: str, size: tuple[int, int], chart: Chart, html: Path | None, as_json: bool) -> float:
    from sfumato.fidelity.prompt import examine, score
    from sfumato.fidelity.report import prompt_page

    if len(prompt) > 100_000:
        raise InputError(
            f"the prompt has {len(prompt):,} characters; at most 100,000 are read", argument="prompt"
        )
    wishes = examine(prompt, size, chart)
    total = score(wishes)
    if html is not None:
        _write(html, prompt_page(prompt, size, chart.model, total, wishes))
    if as_json:
        answer = {"prompt": prompt, "model": chart.model, "size": list(size), "score": total}
        show.answer(answer | {"wishes": [wish.to_dict() for wish in wishes]})
        return total
    show.line(f"{chart.model} at {size[0]}x{size[1]}: {total:g} of 100")
    for wish in wishes:
        show.line(f"- {wish.what}: {wish.loss:.0%} told wrong. {wish.reason}.")
        for each in wish.helps:
            show.line(f"    {each}")
    if not wishes:
        show.line("nothing in it takes much room")
    return total


def _pictures(
    files: list[Path],
    opened: dict[Path, Image],
    size: tuple[int, int] | None,
    instrument: Any,
    chart: Chart,
    run: bool,
    html: Path | None,
    mask: Path | None,
    as_json: bool,
    many: bool,
) -> tuple[float, int]:
    """The lowest score, and how many pictures of a folder cannot be read; these are named and left out of it."""
    import numpy as np

    from sfumato.fidelity import store
    from sfumato.fidelity.ocr import find_reader
    from sfumato.fidelity.preflight import preflight as examine
    from sfumato.fidelity.report import shrunk

    reader, others = find_reader(), store.known(chart.digest)
    reports, bad = [], []
    with show.progress() as bar:
        for file in bar.track(files, description="pictures"):
            try:
                image = opened.pop(file, None) or _read(file, size)
            except InputError as error:
                if not many:
                    raise
                bad.append({"picture": str(file), "error": str(error)})
                continue
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
            report = examine(pixels, instrument, chart, name=str(file), run=run, reader=reader, others=others)
            reports.append(shrunk(report) if many else report)
    if not reports:
        raise DataError(f"none of {len(files)} pictures can be read; the first: {bad[0]['error']}")
    _outputs(reports, chart.model, html, mask, bad if many else None)
    if as_json and many:
        ordered = sorted(reports, key=lambda report: report.score)
        show.answer({"model": chart.model, "pictures": [r.to_dict() for r in ordered], "unreadable": bad})
    elif as_json:
        show.answer(reports[0].to_dict())
    elif many:
        _table(reports, bad)
    else:
        _one(reports[0])
    return min(report.score for report in reports), len(bad)


def _outputs(
    reports: list[Preflight],
    model: str,
    html: Path | None,
    mask: Path | None,
    bad: list[dict[str, str]] | None,
) -> None:
    """The files asked for. bad: of a folder, what of it cannot be read; None for a picture alone."""
    from sfumato.fidelity.preflight import keep_mask
    from sfumato.fidelity.report import folder_page, picture_page

    if html is not None:
        _write(html, picture_page(reports[0]) if bad is None else folder_page(reports, model, bad))
    if mask is not None:
        import numpy as np
        from PIL import Image

        from sfumato.storage import atomic_file

        with atomic_file(mask) as temporary:
            Image.fromarray((keep_mask(reports[0]) * 255).astype(np.uint8)).save(temporary, format="PNG")


def _one(report: Preflight) -> None:
    from sfumato.fidelity.advice import MASK, OVERLAY
    from sfumato.fidelity.regions.region import KINDS

    width, height = report.size
    show.line(
        f"{report.name}: {report.score:g} of 100 with {report.model} at {width}x{height}; {report.count('lost')} lost, "
        f"{report.count('worn')} worn, {report.count('kept')} kept"
    )
    for finding in report.findings[:LINES]:
        left, top, right, bottom = finding.region.box
        run = "" if finding.measured is None else f", measured {finding.measured:.2f}"
        show.line(
            f"- {KINDS[finding.region.kind]} at {left},{top} to {right},{bottom}, {finding.verdict}: foretold loss "
            f"{finding.predicted:.2f}{run}; {finding.reason}"
        )
        if finding.before is not None and finding.after is not None:
            show.line(f"    reads {finding.before!r}, then {finding.after!r}")
        for each in finding.helps:
            if each not in (OVERLAY, MASK):
                show.line(f"    {each}")
    if len(report.findings) > LINES:
        show.line(f"and {len(report.findings) - LINES} more, which --json and --html show")
    for each in (OVERLAY, MASK):
        if any(each in finding.helps for finding in report.findings):
            show.line(f"what helps: {each}")
    for note in report.notes:
        show.note(note)


def _table(reports: list[Preflight], bad: list[dict[str, str]]) -> None:
    from sfumato.fidelity.regions.region import KINDS

    rows = []
    for report in sorted(reports, key=lambda report: report.score):
        worst = KINDS[report.findings[0].region.kind] if report.findings else ""
        counts = [str(report.count(verdict)) for verdict in ("lost", "worn", "kept")]
        rows.append([Path(report.name).name, f"{report.score:g}", *counts, worst])
    rows = [[Path(each["picture"]).name, UNREAD, "", "", "", ""] for each in bad] + rows
    count = len(rows)
    show.table(
        f"{count} picture{'s' if count > 1 else ''}, worst first",
        ["picture", "score", "lost", "worn", "kept", "worst"],
        rows,
    )
    for each in bad:
        show.note(f"{UNREAD}: {each['error']}")
    for note in reports[0].notes:
        show.note(note)


def _write(file: Path, text: str) -> None:
    from sfumato.storage import atomic_file

    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
