"""`sfumato cost`: what a picture costs, in latents and in pixels."""

from __future__ import annotations

from typing import Annotated

import typer

from sfumato.cli import parse, show

EXAMPLE = "sfumato cost -m runs/mine --json"


def cost(
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A packaged model's name or a folder.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="Sampling steps.")] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Measure one picture made by the model and by its pixel twin: numbers, FLOPs, seconds, memory."""
    from sfumato.types import Request

    request = Request(steps=None if steps is None else parse.whole("steps", steps)).validate()
    from sfumato.generate import DEFAULT_MODEL, load
    from sfumato.receipts.cost import cost_report

    report = cost_report(load(DEFAULT_MODEL if model is None else model, device=device), steps=request.steps)
    if as_json:
        show.answer(report)
        return
    columns = [report["latent"], report["pixel"]]
    rows = [
        ["numbers per picture", *(f"{c['numbers']:,}" for c in columns)],
        ["tokens", *(f"{c['tokens']:,}" for c in columns)],
        ["parameters", *(f"{c['parameters']:,}" for c in columns)],
        ["FLOPs: text", *(_flops(c["flops"]["text"]) for c in columns)],
        ["FLOPs: one step", *(_flops(c["flops"]["step"]) for c in columns)],
        ["FLOPs: decode", *(_flops(c["flops"]["decode"]) for c in columns)],
        ["FLOPs: picture", *(_flops(c["flops"]["picture"]) for c in columns)],
        ["seconds per picture", *(f"{c['seconds']:.3f}" for c in columns)],
        ["weights in memory", *(_mebibytes(c["weight_bytes"]) for c in columns)],
        ["other tensors, at most", *(_mebibytes(c["tensor_bytes"]) for c in columns)],
        ["process or GPU, at most", *(_mebibytes(c["peak_bytes"]) for c in columns)],
    ]
    width, height = report["size"]
    title = f"{report['model']}: one {width}x{height} picture, {report['steps']} steps, guidance {report['guidance']:g}"
    show.table(title, ["", "latent", "pixel twin"], rows)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _flops(count: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)
