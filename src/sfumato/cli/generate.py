"""`sfumato generate`: a prompt, and perhaps a picture, to picture files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import parse, show
from sfumato.cli.memory import peak, planned, show_plan
from sfumato.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from sfumato.receipts.provenance import Like

EXAMPLE = 'sfumato generate "a red metal sphere behind a small blue cube" -o out.png --seed 7'
PICTURE, MASK, LARGER, TUNING, WEIGHTS = (
    "Beginning with a picture",
    "Painting a part of it",
    "Drawing it larger",
    "For those who know",
    "Opening a Stable Diffusion checkpoint",
)


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw; may be empty.")] = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="A .png, .jpg or .webp file; several become name-0, name-1 …"),
    ] = Path("out.png"),
    count: Annotated[str, typer.Option("-n", "--count", metavar="N", help="How many pictures.")] = "1",
    seed: Annotated[str, typer.Option(metavar="N", help="Picture k is the picture of seed + k.")] = "0",
    steps: Annotated[str | None, typer.Option(metavar="N", help="Sampling steps.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="X", help="How strictly to follow the prompt.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="See `sfumato models`.")] = None,
    schedule: Annotated[str | None, typer.Option(metavar="NAME", help="See `sfumato models`.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels: 128 or 128x96.")] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What to stay away from.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="Name, folder, .safetensors file, or org/name.",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take prompt and settings from a picture that says how it was made, by sfumato or by a web UI. "
            "What you give beside it wins.",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=PICTURE,
            help="A PNG, JPEG or WebP to begin with instead of noise. The result has its size.",
        ),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            rich_help_panel=PICTURE,
            help="How much of the picture to redraw: 0 keeps it, 1 forgets it. 0.75 by default, 1 in a mask.",
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            rich_help_panel=PICTURE,
            help="Bring it to --size: cover (crop what is too long), contain (extend its edges) or stretch.",
        ),
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            rich_help_panel=PICTURE,
            help="Draw on beyond its borders: 64 on every side, or LEFT,TOP,RIGHT,BOTTOM such as 0,0,128,0.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=MASK,
            help="A picture of the same size, white where to paint. The rest comes back untouched "
            "(in a .png or .webp).",
        ),
    ] = None,
    mask_blur: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            rich_help_panel=MASK,
            help="How softly the painted part begins, inside the mask; 4 by default.",
        ),
    ] = None,
    only_masked: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS",
            rich_help_panel=MASK,
            help="Draw only the mask and this many pixels around it, at full --size, and put them back: "
            "for details of a large picture.",
        ),
    ] = None,
    paste: Annotated[
        bool | None,
        typer.Option(
            "--paste/--no-paste",
            show_default=False,
            rich_help_panel=MASK,
            help="Whether what lies outside the mask is taken from your picture; it is by default.",
        ),
    ] = None,
    hires: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            rich_help_panel=LARGER,
            help="Draw, enlarge by this factor, and draw over it: more detail than drawing large at once. "
            "`none` takes it out of --like.",
        ),
    ] = None,
    hires_strength: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            rich_help_panel=LARGER,
            help="How much the second pass redraws; 0 only enlarges. 0.5 by default.",
        ),
    ] = None,
    hires_steps: Annotated[
        str | None,
        typer.Option(metavar="N", rich_help_panel=LARGER, help="Its steps; as many as --steps by default."),
    ] = None,
    upscaler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=LARGER,
            help="lanczos enlarges the picture; latent-bilinear, latent-bicubic, latent-nearest the latent, "
            "which wants a strength above 0.5.",
        ),
    ] = None,
    variation: Annotated[
        str | None,
        typer.Option(
            metavar="SEED:X",
            rich_help_panel=TUNING,
            help="Pictures like that of --seed: mix in the noise of a second seed, 0 not at all, 1 altogether. "
            "With -n the second seed counts up. `none` takes it out of --like.",
        ),
    ] = None,
    eta: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            rich_help_panel=TUNING,
            help="Fresh noise in samplers that have it (ddim, euler_a …), from 0 to 1.",
        ),
    ] = None,
    clip_skip: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            rich_help_panel=TUNING,
            help="Layer of a CLIP text encoder, counted from the last, which is 1.",
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WEIGHTS, help="Another autoencoder for a checkpoint: a file or a folder."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=WEIGHTS, help="Of a checkpoint's weights: fp32, bf16 or fp16."
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=WEIGHTS, help="epsilon or v, where a checkpoint does not say it."
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=WEIGHTS, help="Of a folder's files, such as fp16."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; the faster one by default.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            rich_help_panel=WEIGHTS,
            help="Say what memory the drawing would need, and draw nothing.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=WEIGHTS,
            help="Memory that drawing may take, such as 6GB; what the machine has free by default.",
        ),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=WEIGHTS,
            help="What stays in memory: none (all networks do), model (the one at work), sequential (of the U-Net one "
            "layer, read at each step). The first that fits by default. Pictures are the same.",
        ),
    ] = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Show the picture forming; beside the output if this is no terminal."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Draw pictures from a prompt, or from a prompt and a picture. Each file carries its recipe."""
    from sfumato.receipts.provenance import check_output
    from sfumato.types import Request

    given: dict[str, Any] = {
        "prompt": prompt,
        "negative": negative,
        "count": parse.whole("count", count),
        "seed": parse.whole("seed", seed),
        "steps": None if steps is None else parse.whole("steps", steps),
        "guidance": None if guidance is None else parse.number("guidance", guidance),
        "sampler": sampler,
        "schedule": schedule,
        "size": None if size is None else parse.size(size),
        "strength": None if strength is None else parse.number("strength", strength),
        "fit": fit,
        "outpaint": None if outpaint is None else parse.sides("outpaint", outpaint),
        "inpaint.blur": None if mask_blur is None else parse.whole("mask-blur", mask_blur),
        "inpaint.padding": None if only_masked is None else parse.whole("only-masked", only_masked),
        "inpaint.paste": paste,
        "hires.scale": None if hires in (None, "none") else parse.number("hires", hires),
        "hires.strength": None if hires_strength is None else parse.number("hires-strength", hires_strength),
        "hires.steps": None if hires_steps is None else parse.whole("hires-steps", hires_steps),
        "hires.upscaler": upscaler,
        "variation": None if variation in (None, "none") else parse.variation(variation),
        "eta": None if eta is None else parse.number("eta", eta),
        "clip_skip": None if clip_skip is None else parse.whole("clip-skip", clip_skip),
    }
    default = {name for name in given if _left_open(context, name)}
    given = {name: value for name, value in given.items() if value is not None and name not in default}
    if image is not None:
        given["image"] = parse.picture("image", image)
    if mask is not None:
        given["mask"] = parse.picture("mask", mask, mask=True)
    dropped = {name for name, text in (("hires", hires), ("variation", variation)) if text == "none"}
    said = None if like is None else _said(like, given, dropped)
    request = Request.from_dict(_merged(given, {} if said is None else said.request))
    check_output(output, request.count, request)

    started = time.perf_counter()
    from sfumato.generate import DEFAULT_MODEL, MODELS, load

    if model is None:
        # a stranger's picture may name any file or place; only a name that we know is followed
        model = said.model if said is not None and said.model in MODELS else DEFAULT_MODEL
    limit = None if memory is None else parse.size_in_bytes("memory", memory)
    loaded = load(
        model,
        device=device,
        dtype=None if dtype is None else parse.dtype(dtype),
        vae=vae,
        prediction=prediction,
        variant=variant,
        offload="auto",
    )
    loaded, found = planned(loaded, request, offload, limit, told=plan)
    if plan:
        show_plan(found, request, as_json)
        return
    if said is not None:
        _note_differences(like, said, loaded)
    with show.progress() as bar:
        watch, clean = _watcher(bar, loaded, output if preview else None)
        try:
            result = loaded.generate(request, on_step=watch)
        finally:
            clean()
    files = result.save(output)
    seconds = time.perf_counter() - started
    if as_json:
        show.answer(
            {
                "files": [str(file) for file in files],
                "seeds": request.seeds(),
                "seconds": round(seconds, 3),
                "recipe": result.recipe,
                **({} if found is None else {"memory": {"planned": found.peak, "peak": peak(loaded.device)}}),
            }
        )
    else:
        for file in files:
            show.line(str(file))


def _left_open(context: typer.Context, name: str) -> bool:
    """Whether the option has its value by default, so that a picture to be like may give another."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


def _said(like: Path, given: dict[str, Any], dropped: set[str]) -> Like:
    """What the picture `like` says of its making, without what was `dropped`. The pictures that it began with must be
    among those `given`."""
    from dataclasses import replace

    from sfumato.receipts.provenance import read_like

    said = read_like(like, {*given, *dropped})
    fields = said.request
    began_with_one = {"image", "strength", "mask", "inpaint", "outpaint"} & fields.keys()
    if began_with_one and "image" not in given:
        raise InputError(
            f"{like} began with another picture; give that one, or a new one, by --image", argument="image"
        )
    painted = "mask" in fields or ("inpaint" in fields and "outpaint" not in fields)
    if painted and "mask" not in given:
        raise InputError(
            f"{like} was painted inside a mask; give it, or a new one, by --mask", argument="mask"
        )
    return replace(said, request={name: value for name, value in fields.items() if name not in dropped})


def _merged(given: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request from those `given`, some of them inner ones such as `hires.scale`, laid over those `said`."""
    values = dict(said)
    for name, value in given.items():
        outer, dot, inner = name.partition(".")
        if dot:
            values[outer] = {**(values.get(outer) or {}), inner: value}
        else:
            values[outer] = value
    if "prompt" not in values:
        raise InputError(
            "give a prompt (it may be empty), or a picture to take it from by --like", argument="prompt"
        )
    if "scale" not in (values.get("hires") or {"scale": 1}):
        raise InputError(
            "--hires-strength, --hires-steps and --upscaler go with --hires SCALE", argument="hires"
        )
    return values


def _note_differences(like: Path | None, said: Like, loaded: Any) -> None:
    """Say on standard error what stands between the new picture and the one it is to be like."""
    if said.weights is not None and said.weights != loaded.hashes:
        _note(f"{like} was drawn by other weights, of the model {said.model!r}; choose the model by -m")
    elif said.weights is None and said.model is not None:
        _note(f"{like} was drawn by the model {said.model!r}; this one is {loaded.name!r}")
    if said.ignored:
        _note(f"not taken over from {like}: {', '.join(said.ignored)}")


def _note(message: str) -> None:
    line = " ".join(message.split())
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write("note: " + line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _watcher(
    bar: Progress, model: Any, preview: Path | None
) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """(on_step, clean up): moves the bar, and shows the forming picture in the terminal or in `name-preview.png`."""
    task = bar.add_task("drawing", total=None)
    file = None if preview is None else preview.with_name(f"{preview.stem}-preview.png")
    live = None
    if preview is not None and bar.console.is_terminal:
        from rich.live import Live

        live = Live(console=bar.console, transient=True, auto_refresh=False)
        bar.stop()
        live.start()

    def watch(step: Any) -> None:
        bar.update(task, total=step.total, completed=step.index + 1)
        if preview is None:
            return
        picture = model.preview(step.denoised[:1])
        if live is not None:
            from rich.console import Group

            live.update(Group(show.half_blocks(picture), bar.get_renderable()), refresh=True)
        elif file is not None:
            from sfumato.storage import atomic_file

            with atomic_file(file) as temporary:
                picture.save(temporary, format="PNG")

    def clean() -> None:
        if live is not None:
            live.stop()
        elif file is not None:
            file.unlink(missing_ok=True)

    return watch, clean
