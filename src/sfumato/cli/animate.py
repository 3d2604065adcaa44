"""`sfumato animate`: a picture set in motion, or a prompt, to files of clips."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from sfumato.cli import fields, options, parse, show, watch
from sfumato.cli.memory import peak, planned, show_plan
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.types import Clip, Request

EXAMPLE = "sfumato animate --image photo.png -m model.safetensors -o out.mp4 --seed 7"
CLIP = "The clip"

Output = Annotated[
    Path,
    Option(
        "-o",
        "--output",
        help="A .mp4, .webm, .gif or .webp file, or a new folder of .png; several become name-0, name-1 …",
    ),
]
Count = Annotated[str, Option("-n", "--count", metavar="N", help="How many clips.")]
Seed = Annotated[str, Option(metavar="N", help="Clip k is the clip of seed + k.")]
Guidance = Annotated[
    str | None,
    Option(
        metavar="[X:]Y",
        help="How strictly to follow the picture or the prompt: from X at the first frame to Y at the last.",
    ),
]
Image = Annotated[
    Path | None, Option(metavar="FILE", rich_help_panel=CLIP, help="A PNG, JPEG or WebP to begin with.")
]
Fit = Annotated[
    str | None,
    Option(
        metavar="HOW",
        rich_help_panel=CLIP,
        help="Bring it to the clip's size: cover (crop what is too long, the default), contain or stretch.",
    ),
]
Frames = Annotated[
    str | None, Option(metavar="N", rich_help_panel=CLIP, help="How many; the model's own by default.")
]
Init = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        rich_help_panel=CLIP,
        help="A clip to begin with instead of noise: mp4, mov, webm, mkv, avi, GIF, WebP, or a folder of pictures.",
    ),
]
Strength = Annotated[
    str | None,
    Option(
        metavar="X",
        rich_help_panel=CLIP,
        help="How much of --init to redraw: 0 keeps it, 1 forgets it. 0.75 by default.",
    ),
]
Fps = Annotated[
    str | None, Option(metavar="X", rich_help_panel=CLIP, help="Frames per second, drawn for and shown at.")
]
Motion = Annotated[
    str | None,
    Option(metavar="N", rich_help_panel=CLIP, help="How much moves, 0 to 255; 127 by default."),
]
Augment = Annotated[
    str | None,
    Option(
        metavar="X",
        rich_help_panel=CLIP,
        help="Noise laid over the picture, which lets the clip part from it; 0.02 by default.",
    ),
]
Like = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Take the settings from a clip of ours. What you give beside it wins; its picture is given by --image.",
    ),
]


def animate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to draw, for models that read a prompt.")] = None,
    output: Output = Path("out.mp4"),
    count: Count = "1",
    seed: Seed = "0",
    steps: options.Steps = None,
    guidance: Guidance = None,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    size: options.Size = None,
    negative: options.Negative = None,
    model: options.Model = None,
    like: Like = None,
    image: Image = None,
    fit: Fit = None,
    init: Init = None,
    strength: Strength = None,
    frames: Frames = None,
    fps: Fps = None,
    motion: Motion = None,
    augment: Augment = None,
    eta: options.Eta = None,
    parts: options.Parts = None,
    vae: options.Vae = None,
    dtype: options.Dtype = None,
    variant: options.Variant = None,
    device: options.Device = None,
    plan: options.Plan = False,
    memory: options.Memory = None,
    offload: options.Offload = None,
    preview: options.Preview = False,
    deterministic: options.Deterministic = False,
    as_json: options.AsJson = False,
    lora: Annotated[list[str] | None, Option(hidden=True)] = None,
    controlnet: Annotated[list[str] | None, Option(hidden=True)] = None,
    control: Annotated[list[str] | None, Option(hidden=True)] = None,
) -> None:
    """Draw clips: set a picture in motion, or draw from a prompt. Each file carries its recipe."""
    from sfumato.receipts.clips import check_output
    from sfumato.types import Request
    from sfumato.video.formats import format_of

    for name, value in (("lora", lora), ("controlnet", controlnet), ("control", control)):
        if value:
            raise InputError(
                f"--{name} is for pictures (sfumato generate): no model of clips takes one; leave it out",
                argument=name,
            )
    given = fields.given(context, without=("guidance",))
    if guidance is not None:
        given |= parse.guidance(guidance)
    if image is not None:
        given["image"] = parse.picture("image", image)
    if init is not None:
        given["clip"] = _clip(init, given.get("frames"), given.get("fps"))
    elif strength is not None:
        raise InputError("strength goes with a `clip` to begin with", argument="strength")
    said = {} if like is None else _said(like, given)
    request = Request.from_dict(parse.merged(given, {"prompt": "", **said}))
    check_output(output, request.count)
    if preview:
        watch.check_preview(output)

    started = time.perf_counter()
    if deterministic:
        from sfumato.runtime import deterministic as ask

        ask()
    from sfumato.drawing.clips import as_clip
    from sfumato.generate import DEFAULT_MODEL, load

    limit = None if memory is None else parse.size_in_bytes("memory", memory)
    loaded = load(
        DEFAULT_MODEL if model is None else model,
        device=device,
        dtype=None if dtype is None else parse.dtype(dtype, parse.DRAWN),
        vae=vae,
        variant=variant,
        parts=parts or None,
        offload="auto",
    )
    request = as_clip(loaded, request)
    _check_shape(loaded, request, output)
    loaded, found = planned(loaded, request, offload, limit, told=plan, kind=format_of(output))
    if plan:
        show_plan(found, request, as_json)
        return
    _note_picture(loaded, request, image)
    result = watch.drawn(loaded, request, output if preview else None)
    files = result.save(output)
    if as_json:
        show.answer(
            {
                "files": [str(file) for file in files],
                "seeds": request.seeds(),
                "frames": len(result.clips[0].frames),
                "fps": result.clips[0].fps,
                "seconds": round(time.perf_counter() - started, 3),
                "recipe": result.recipe,
                **({} if found is None else {"memory": {"planned": found.peak, "peak": peak(loaded.device)}}),
            }
        )
    else:
        for file in files:
            show.line(str(file))


def _said(like: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of the request that the clip `like` was drawn by. Its picture is not in it."""
    from sfumato.receipts.clips import read_recipe

    said = read_recipe(like, "like").get("request")
    if not isinstance(said, dict):
        raise InputError(f"{like} carries a recipe without a request", argument="like")
    for field, option, what in (("image", "image", "picture"), ("clip", "init", "clip")):
        if field in said and field not in given:
            raise InputError(
                f"{like} began with a {what}; give that one, or a new one, by --{option}", argument=option
            )
    return said


def _clip(file: Path, frames: object, fps: object) -> Clip:
    """The clip to begin with. frames: how many of its beginning are wanted; fps: of a folder, which does not say it."""
    from sfumato.types import MAX_FRAMES
    from sfumato.video.read import read_clip

    most = min(max(frames, 1), MAX_FRAMES) if isinstance(frames, int) else None
    return read_clip(file, argument="init", frames=most, fps=fps if isinstance(fps, float) else None)


def _check_shape(loaded: Model, request: Request, output: Path) -> None:
    """`InputError`, before anything is drawn, if the output could not hold the clip."""
    from sfumato.video.formats import format_of
    from sfumato.video.write import check_shape

    complete = loaded.complete(request)
    assert complete.frames is not None and complete.size is not None
    check_shape(format_of(output), complete.frames, complete.size)


def _note_picture(loaded: Model, request: Request, image: Path | None) -> None:
    """Say where a picture is cropped, which was not asked for."""
    if request.fit is not None:
        return
    complete = loaded.complete(request)
    shown_first = request.image or complete.image
    size = complete.size
    if shown_first is None or size is None:
        return
    (width, height), shown = shown_first.size, f"{size[0]}x{size[1]}"
    if abs(width * size[1] - height * size[0]) > 0.02 * width * size[1]:
        show.note(
            f"{image or 'the clip'} is {width}x{height} and is cropped to the shape of {shown}; --size asks for "
            "another size, and --fit contain or stretch for another way"
        )
