"""`sfumato evaluate`: how often the model draws what it was asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import parse, show
from sfumato.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from sfumato.generate import Model
    from sfumato.types import Request

EXAMPLE = "sfumato evaluate -m runs/mine --per-group 32 --group single --group binding"
MAX_PICTURES = 100_000
TRAINING_PICTURES = 4_096  # of a recipe, among which copies are looked for


def evaluate(
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A packaged model's name or a folder.")
    ] = None,
    per_group: Annotated[str, typer.Option(metavar="N", help="Prompts per task group.")] = "100",
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="NAME", help="Only these task groups.")
    ] = None,
    seed: Annotated[str, typer.Option(metavar="N", help="Other prompts and other noise.")] = "0",
    steps: Annotated[str | None, typer.Option(metavar="N", help="Sampling steps.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="X", help="How strictly to follow the prompt.")
    ] = None,
    reconstruction: Annotated[
        str, typer.Option(metavar="N", help="Pictures for the autoencoder's table; 0 for none.")
    ] = "64",
    distribution: Annotated[
        str, typer.Option(metavar="N", help="Pictures for distances and diversity; 0 for none.")
    ] = "0",
    training: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="With --distribution: look for copies of this recipe's pictures."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of pictures, if that recipe names none.")
    ] = None,
    clips: Annotated[
        str, typer.Option(metavar="N", help="Clips of scenes in motion instead of pictures; 0 for none.")
    ] = "0",
    frames: Annotated[str, typer.Option(metavar="N", help="Frames of each clip, 1 + 4k.")] = "9",
    split: Annotated[
        str, typer.Option(metavar="NAME", help="Of clips: val, or motions, which training never shows.")
    ] = "val",
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Score pictures of held-out prompts with two detectors, between their ceiling and floor."""
    from sfumato.types import Request

    request = Request(
        seed=parse.whole("seed", seed),
        steps=None if steps is None else parse.whole("steps", steps),
        guidance=None if guidance is None else parse.number("guidance", guidance),
    ).validate()
    prompts = parse.between("per-group", parse.whole("per-group", per_group), 1, MAX_PICTURES)
    rebuilt = parse.between("reconstruction", parse.whole("reconstruction", reconstruction), 0, MAX_PICTURES)
    drawn = parse.between("distribution", parse.whole("distribution", distribution), 0, MAX_PICTURES)
    moving = parse.between("clips", parse.whole("clips", clips), 0, MAX_PICTURES)
    if split not in ("val", "motions"):
        raise InputError(f"split must be val or motions, not {split!r}", argument="split")
    if training is not None and not drawn:
        raise InputError("training goes with --distribution N, the pictures to compare", argument="training")
    if groups:
        from sfumato.evaluate.tasks import task_groups

        task_groups(1, request.seed, groups)  # a wrong name fails before any model is opened
    from sfumato.generate import DEFAULT_MODEL, load

    loaded = load(DEFAULT_MODEL if model is None else model, device=device)
    if moving:
        _clips(
            loaded,
            moving,
            request,
            split,
            parse.between("frames", parse.whole("frames", frames), 5, 1_000),
            as_json,
        )
        return
    known = None if training is None else _pictures_of(training, data)
    _pictures(loaded, request, groups or None, (prompts, rebuilt, drawn), known, as_json)


def _pictures(
    loaded: Model,
    request: Request,
    groups: list[str] | None,
    counts: tuple[int, int, int],
    training: Tensor | None,
    as_json: bool,
) -> None:
    """Measure pictures, and show what came out. counts: of prompts in each group, of pictures that the autoencoder is
    measured by, and of those that distances are. training: pictures among which copies are looked for."""
    from sfumato.evaluate.report import distribution_report, evaluate_model, reconstruction_report

    prompts, rebuilt, drawn = counts
    how: dict[str, Any] = {"steps": request.steps, "guidance": request.guidance}
    with show.progress() as bar:
        hear = _reporter(bar)
        report = evaluate_model(loaded, groups, prompts, request.seed, **how, on_progress=hear)
        answer: dict[str, Any] = {"model": loaded.name, **report.to_dict()}
        if rebuilt:
            answer["reconstruction"] = reconstruction_report(
                loaded.system.autoencoder, rebuilt, request.seed, size=loaded.preset["size"][0]
            )
        if drawn:
            answer["distribution"] = distribution_report(
                loaded, drawn, request.seed, training=training, **how, on_progress=hear
            )
    if as_json:
        show.answer(answer)
        return
    show.table(f"{loaded.name}: pictures that show what was asked, in per cent", *report.table(), keys=2)
    if rebuilt:
        rows = _rebuilt(answer["reconstruction"])
        show.table("autoencoder on unseen scenes", ["", "mean", "95 % interval"], rows)
    if drawn:
        show.table(
            "pictures against unseen scenes", ["", "model", "real"], _distances(answer["distribution"])
        )


def _clips(loaded: Model, count: int, request: Request, split: str, frames: int, as_json: bool) -> None:
    """Measure clips, and show what came out."""
    from sfumato.evaluate.clips import evaluate_clips
    from sfumato.evaluate.detect_network import load_detector

    with show.progress() as bar:
        found = evaluate_clips(
            loaded,
            load_detector(loaded.device),
            count,
            request.seed,
            split=split,
            frames=frames,
            steps=request.steps,
            guidance=request.guidance,
            on_progress=_reporter(bar),
        )
    if as_json:
        show.answer({"model": loaded.name, **found.to_dict()})
        return
    show.table(f"{loaded.name}: {count} clips of {frames} frames, split {split}", *found.table())


def _reporter(bar: Progress) -> Callable[[str, int, int], None]:
    tasks: dict[str, Any] = {}

    def hear(doing: str, done: int, total: int) -> None:
        if doing not in tasks:
            tasks[doing] = bar.add_task(doing, total=total)
        bar.update(tasks[doing], completed=done, total=total)

    return hear


def _rebuilt(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, label in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        value = found[name]
        rows.append([label, f"{value['mean']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}"])
    bands = ", ".join(f"{value:.2f}" for value in found["spectral_error"])
    rows.append(["spectral error by band, coarse to fine", bands, ""])
    return rows


def _pictures_of(recipe: str, data: Path | None) -> Tensor:
    """Pictures (M, 3, H, W) in [-1, 1] that a recipe trains on, the first thousands of them."""
    from sfumato.train.job import training_pictures

    return training_pictures(recipe, data, TRAINING_PICTURES)


def _distances(found: dict[str, Any]) -> list[list[str]]:
    rows = [
        [name.replace("_", " "), *(f"{found[side][name]:.4g}" for side in ("model", "real"))]
        for name in ("kernel_distance", "frechet_distance")
    ]
    for space, near in found.get("nearest_training", {}).items():
        rows.append(
            [f"nearest training picture, {space}", f"{near['median']:.4g}", f"{near['median_of_real']:.4g}"]
        )
    spread = found["diversity"]
    return [
        *rows,
        *(
            [f"diversity: {name}", *(f"{spread[f'{side}_{name}']:.4g}" for side in ("model", "real"))]
            for name in ("spread", "vendi")
        ),
    ]
