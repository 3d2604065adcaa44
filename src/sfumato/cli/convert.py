"""`sfumato convert`: a checkpoint in another layout or precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli import loras, parse, show

EXAMPLE = "sfumato convert model.safetensors model/ --dtype bf16"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .safetensors file or a diffusers folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write; it must not exist yet.")],
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="fp32, fp16 or bf16; as it is, if not given.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="single or folder; by the name of DST, if not given.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of a folder's files to read, such as fp16.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="The kind of model that a VAE or text encoder alone belongs to."),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="epsilon or v, where the checkpoint does not say it or is wrong."),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:X]",
            help="A LoRA to put into the weights for good, with its weight, as generate's --lora; may be repeated.",
        ),
    ] = None,
    lora_partial: Annotated[
        bool, typer.Option("--lora-partial", help="Merge what fits of a LoRA and say what is left.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Write a checkpoint as a single file or as a diffusers folder, tensor for tensor."""
    wanted = None if dtype is None else parse.dtype(dtype)
    adapters = [one.request({}) | {"file": one.file} for one in loras.given(merge or [], "merge")]
    reports: list[str] = []
    from sfumato.families.convert import convert as run

    with show.progress() as bar:
        task = bar.add_task("tensors", total=None)
        written = run(
            source,
            target,
            layout=layout,
            dtype=wanted,
            variant=variant,
            kind=kind,
            prediction=prediction,
            merge=[(one["file"], one["weight"], one.get("blocks", {})) for one in adapters],
            partial=lora_partial,
            on_report=reports.append,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        show.answer(
            {
                "target": str(target),
                "kind": written.kind,
                "layout": written.layout,
                "tensors": dict(written.tensors),
                "bytes": written.size,
                "dropped": dict(written.dropped),
                **({"merged": reports} if reports else {}),
            }
        )
        return
    parts = ", ".join(f"{name} {count}" for name, count in written.tensors.items())
    show.line(f"{target}: {written.kind}, {written.size / 1e9:.2f} GB; tensors: {parts}")
    for report in reports:
        show.line(f"merged: {report}")
    for reason, count in Counter(written.dropped.values()).items():
        show.line(f"left out: {count} ({reason})")
