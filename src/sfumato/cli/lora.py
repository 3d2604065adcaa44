"""`sfumato lora`: LoRA files by themselves. Taken from two models, made smaller, looked at on a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from sfumato.cli import parse, show

if TYPE_CHECKING:
    from sfumato.adapters.svd import Kept

ABOUT = "LoRA files by themselves: extract, resize, inspect."

Out = Annotated[Path, Option("-o", "--output", help="A .safetensors file, which must not exist yet.")]
Rank = Annotated[str, Option(metavar="R", help="The most ranks that a module gets.")]
Dtype = Annotated[str | None, Option(metavar="TYPE", help="Of what is written: fp32, fp16 or bf16.")]
AsJson = Annotated[bool, Option("--json", help="Answer with one JSON object.")]


def extract(
    base: Annotated[Path, Argument(metavar="BASE", help="The model that the other began as.")],
    tuned: Annotated[Path, Argument(metavar="TUNED", help="The model that it was trained to.")],
    output: Out,
    rank: Rank = "32",
    dtype: Dtype = "fp16",
    as_json: AsJson = False,
) -> None:
    """Write the LoRA that makes one model nearly another, by singular values, and say how nearly."""
    from sfumato.families.adapters import extract as run

    wanted = None if dtype is None else parse.dtype(dtype)
    with show.progress() as bar:
        task = bar.add_task("tensors", total=None)
        kept = run(
            base,
            tuned,
            output,
            parse.whole("rank", rank),
            dtype=wanted,
            on_module=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _tell(output, kept, as_json)


def resize(
    file: Annotated[Path, Argument(metavar="FILE", help="A LoRA.")],
    output: Out,
    rank: Rank,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA with fewer ranks, by singular values, and say how much of it is left."""
    from sfumato.adapters.svd import resize as run

    wanted = None if dtype is None else parse.dtype(dtype)
    with show.progress() as bar:
        task = bar.add_task("modules", total=None)
        kept = run(
            file,
            output,
            parse.whole("rank", rank),
            dtype=wanted,
            on_module=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _tell(output, kept, as_json)


def inspect(
    file: Annotated[Path, Argument(metavar="FILE", help="A LoRA.")],
    model: Annotated[
        str | None,
        Option("-m", "--model", help="The model to look at it on: name, folder or file. Reads both."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a LoRA is from its header; on a model also what of it is used, and ‖ΔW‖/‖W‖ of each part."""
    if model is None:
        from sfumato.cli.inspect import inspect as header

        header(file, None, False, as_json)
        return
    from sfumato.families.adapters import strengths

    found, sizes = strengths(file, model)
    left = {"left": dict(found.left)} if found.left else {}
    if as_json:
        show.answer(
            {"path": str(file), "model": model, "report": found.describe(), "relative": sizes, **left}
        )
        return
    show.line(f"{file}: {found.describe()}")
    for part, size in sizes.items():
        show.line(f"{part:<16}‖ΔW‖/‖W‖ = {size:.2e} at weight 1")


def _tell(output: Path, kept: Kept, as_json: bool) -> None:
    if as_json:
        show.answer(
            {
                "target": str(output),
                "modules": kept.modules,
                "share": kept.share,
                "left": dict(kept.left),
                "bytes": kept.size,
            }
        )
        return
    show.line(
        f"{output}: {kept.modules} modules, {kept.size / 1e6:.1f} MB, {kept.share:.1%} of the change (squares)"
    )
    if kept.left:
        first = next(iter(kept.left))
        show.line(f"left out: {len(kept.left)} tensors, such as {first} ({kept.left[first]})")


VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "extract": (
        extract,
        "sfumato lora extract base.safetensors tuned.safetensors -o style.safetensors --rank 32",
    ),
    "resize": (resize, "sfumato lora resize style.safetensors --rank 8 -o small.safetensors"),
    "inspect": (inspect, "sfumato lora inspect style.safetensors -m sd_xl_base_1.0.safetensors"),
}
