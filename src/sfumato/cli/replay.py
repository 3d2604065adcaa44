"""`sfumato replay`: a picture or a clip made again from the recipe it carries, and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import controls, loras, options, parse, show
from sfumato.cli.memory import planned
from sfumato.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.receipts.replay import Changed, Difference
    from sfumato.sampling.step import Step
    from sfumato.types import Request, Result

EXAMPLE = "sfumato replay out.png --verify"
UNLIKE = 3  # exit code of --verify
EXACT = ("", ".png", ".webp")  # endings of files that keep every value; of a folder of PNG none


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A picture or a clip that sfumato drew.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Keep the new one there.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help=f"Exit with {UNLIKE} when the new one is another, or the file was changed after it was drawn.",
        ),
    ] = False,
    picture: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A picture that it began with, was painted by or was shown: found by its pixels. May be repeated.",
        ),
    ] = None,
    model: options.Model = None,
    embedding: options.Embedding = None,
    lora: options.Lora = None,
    controlnet: options.ControlNet = None,
    annotator: options.Annotator = None,
    refiner: options.Refiner = None,
    parts: options.Parts = None,
    vae: options.Vae = None,
    variant: options.Variant = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = None,
    engine: options.Engine = None,
    device: options.Device = None,
    offload: options.Offload = None,
    deterministic: options.Deterministic = False,
    as_json: options.AsJson = False,
) -> None:
    """Draw a picture or a clip again from its recipe, and say how near it comes and which ingredient is another.

    Weights are named by their hashes, so files may lie anywhere; give those that the recipe names.
    """
    from sfumato.receipts import clips, provenance
    from sfumato.receipts.bill import drawn as draw
    from sfumato.receipts.replay import changed, difference_of_clips, edited

    if output is not None and output.resolve() == file.resolve():
        raise InputError(f"{output} is what is replayed; keep the new one elsewhere", argument="output")
    recipe, before = _read(file)
    request = _request(recipe, file, _pictures(picture or ()))
    adapters = loras.given(lora or [])
    if output is not None and request.moves:
        clips.check_output(output)
    elif output is not None:
        provenance.check_output(output, 1, request)
    kernels = recipe.get("kernels")
    if deterministic or (isinstance(kernels, dict) and kernels.get("deterministic") is True):
        from sfumato.runtime import deterministic as ask

        ask()
    by_name = {
        "embeddings": parse.embeddings(embedding or []),
        "controlnets": controls.files(controlnet or []),
        "annotators": controls.files(annotator or [], "annotator"),
    }
    uses = request.loras or ()
    _check_named(recipe, "loras", [one.name for one in adapters], [use.name for use in uses])
    for group, given in by_name.items():
        asked = [] if group == "embeddings" else [control.name for control in request.controls or ()]
        _check_named(recipe, group, list(given), asked)
    opened = _opened(
        recipe,
        file,
        model,
        refiner=refiner,
        **by_name,
        parts=parts or None,
        vae=vae,
        variant=variant,
        tokenizer=tokenizer,
        device=device,
        engine=engine,
        dtype=dtype,
    )
    loras.requested(adapters, [use.to_json() for use in uses], file, False)  # says whose file is missing
    loras.attach(opened, adapters, uses, True)
    opened, _ = planned(opened, request, offload, None, told=False)
    with show.progress() as bar:
        task = bar.add_task("drawing", total=None)

        def watch(step: Step) -> None:
            bar.update(task, completed=step.index + 1, total=step.total)

        # a bill is only for a file that is kept
        result = opened.generate(request, watch) if output is None else draw(opened, request, watch)
    now = _written(result, file)
    found = difference_of_clips(before, now, palette=file.suffix.lower() == ".gif")
    frames = result.clips[0].frames if result.clips else result.images
    edits = edited(recipe, before, frames, found, exact=file.suffix.lower() in EXACT)
    others = [*edits, *changed(recipe, result.recipe)]
    # rounding does not write into files, so pixels that were changed in one are never near
    painted = any(each.name == "pixels" for each in edits)
    verdict = "different" if found is None or painted else found.verdict
    if output is not None:
        result.save(output)
    _tell(before, now, found, verdict, others, as_json)
    if verify and (verdict == "different" or edits):
        raise typer.Exit(UNLIKE)


def _read(file: Path) -> tuple[dict[str, Any], Sequence[Image]]:
    """The recipe in a file, and the picture or the frames that are there."""
    from sfumato.receipts import clips
    from sfumato.video.formats import BY_PYAV
    from sfumato.video.read import read_clip

    moving = file.is_dir() or file.suffix.lower().removeprefix(".") in (*BY_PYAV, "gif")
    recipe = clips.read_recipe(file)
    said = recipe.get("request")
    moving = moving or (isinstance(said, dict) and "frames" in said)  # a WebP may be either
    if not moving:
        return recipe, [parse.picture("picture", file)]
    fps = said.get("fps") if isinstance(said, dict) else None
    given = float(fps) if file.is_dir() and isinstance(fps, int | float) else None
    return recipe, read_clip(file, argument="file", fps=given).frames


def _pictures(files: Sequence[Path]) -> list[Image]:
    """Pictures that drawing may have begun with, and the frames of clips."""
    from sfumato.video.formats import BY_PYAV
    from sfumato.video.read import read_clip

    found: list[Image] = []
    for file in files:
        if file.suffix.lower().removeprefix(".") in (*BY_PYAV, "gif"):
            found += read_clip(file, argument="picture").frames
        else:
            found.append(parse.picture("picture", file))
    return found


def _request(recipe: dict[str, Any], file: Path, pictures: list[Image]) -> Request:
    from sfumato.types import Request

    try:
        return Request.from_dict(recipe.get("request", {}), pictures)
    except InputError as error:
        text = str(error)
        if "give the picture itself" in text or "give the clip itself" in text:
            text = (
                text.replace("picture itself", "clip that it began with")
                if "clip" in recipe["request"]
                else text
            )
            text += " by --picture FILE" if not pictures else ": none that --picture gives is the recipe's"
        raise InputError(f"{file}: {text}", argument=error.argument) from None


def _check_named(recipe: dict[str, Any], group: str, given: list[str], asked: list[str]) -> None:
    """`InputError` for a file that has no place in the recipe. group: of it; asked: names in its request."""
    said = recipe.get(group)
    known = {*asked, *(said if isinstance(said, dict) else ())}
    for name in given:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            option = group.removesuffix("s")
            raise InputError(f"the recipe has no {option} {name!r}: {has}", argument=option)


def _opened(recipe: dict[str, Any], file: Path, model: str | None, *, dtype: str | None, **given: Any) -> Any:
    """The model of the recipe, which may be a stranger's and name any place: only a name that we know is followed."""
    from sfumato.generate import MODELS, load
    from sfumato.runtime import DTYPES

    name = recipe.get("model")
    if model is None and name not in MODELS:
        raise InputError(f"{file} was drawn by the model {name!r}; give it by -m", argument="model")
    before = recipe.get("refiner")
    if isinstance(before, dict) and given["refiner"] is None:
        raise InputError(
            f"{file} was finished by the refiner {before.get('model')!r}; give it by --refiner",
            argument="refiner",
        )
    names = {text: name for name, text in parse.DRAWN.items()}
    said = names.get(str(recipe.get("dtype")))
    kind = dtype or said
    read_as = recipe.get("read_as")
    known: dict[str, Any] = {
        key: str(read_as[key])
        for key in ("prediction", "preset")
        if isinstance(read_as, dict) and key in read_as
    }
    without = recipe.get("without")
    engine = given.pop("engine") or recipe.get("engine")
    text = recipe.get("text_dtype")
    import torch

    return load(
        model or str(name),
        dtype=None if kind is None else parse.dtype(kind, parse.DRAWN),
        without=[str(each) for each in without] if isinstance(without, list) else (),
        text_dtype=DTYPES.get(str(text), torch.int8 if text == "int8" else None),
        engine=engine if isinstance(engine, str) and engine != "torch" else None,
        offload="auto",
        **known,
        **given,
    )


def _written(result: Result, file: Path) -> Sequence[Image]:
    """The new picture, or frames, as a file of that kind has them: a JPEG or a film keeps less than was drawn."""
    from sfumato.video.read import read_clip

    suffix = file.suffix.lower()
    if not result.clips and suffix not in (".jpg", ".jpeg"):
        return result.images
    if result.clips and suffix in ("", ".webp"):
        return result.clips[0].frames
    with tempfile.TemporaryDirectory() as place:
        again = result.save(Path(place) / f"again{suffix}")[0]
        return read_clip(again).frames if result.clips else [parse.picture("picture", again)]


def _tell(
    before: Sequence[Image],
    now: Sequence[Image],
    found: Difference | None,
    verdict: str,
    others: list[Changed],
    as_json: bool,
) -> None:
    if as_json:
        told = {**({} if found is None else found.to_dict()), "verdict": verdict}
        ingredients = [{"name": each.name, "before": each.before, "now": each.now} for each in others]
        clip = {"frames": len(now)} if len(now) > 1 else {}
        show.answer({**told, "size": list(now[0].size), **clip, "changed": ingredients})
        return
    if found is None:
        show.line(f"different: {_shape(before)} then, {_shape(now)} now")
    elif verdict == "identical":
        show.line(f"identical: every value of {_shape(now)} pixels")
    else:
        show.line(
            f"{verdict}: {found.share:.2%} of the values differ, by at most {found.most} of 255 ("
            f"{found.psnr:.1f} dB)"
        )
    for each in others:
        show.line(f"changed: {each.describe()}")


def _shape(frames: Sequence[Image]) -> str:
    width, height = frames[0].size
    return f"{width}x{height}" if len(frames) == 1 else f"{len(frames)} frames of {width}x{height}"
