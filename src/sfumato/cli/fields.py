"""Options of the command line as fields of a request: one table for the verbs that draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sfumato.cli import parse
from sfumato.cli.options import left_open
from sfumato.wording import worded

if TYPE_CHECKING:
    from typer import Context

NONE = "none"  # of an option that a picture to be like has given: not this one
Read = Callable[[str, Any], Any]  # (the option, what it was given) → the field's value


def _as_it_is(option: str, given: Any) -> Any:
    return given


# the field, some of them inner ones: the option, and how what it is given is read
FIELDS: dict[str, tuple[str, Read]] = {
    "prompt": ("prompt", _as_it_is),
    "negative": ("negative", _as_it_is),
    "count": ("count", parse.whole),
    "seed": ("seed", parse.whole),
    "steps": ("steps", parse.whole),
    "guidance": ("guidance", parse.number),
    "sampler": ("sampler", _as_it_is),
    "schedule": ("schedule", _as_it_is),
    "size": ("size", lambda option, given: parse.size(given, option)),
    "strength": ("strength", parse.number),
    "fit": ("fit", _as_it_is),
    "frames": ("frames", parse.whole),
    "fps": ("fps", parse.number),
    "motion.bucket": ("motion", parse.whole),
    "motion.augment": ("augment", parse.number),
    "outpaint": ("outpaint", parse.sides),
    "inpaint.blur": ("mask-blur", parse.whole),
    "inpaint.padding": ("only-masked", parse.whole),
    "inpaint.paste": ("paste", _as_it_is),
    "hires.scale": ("hires", parse.number),
    "hires.strength": ("hires-strength", parse.number),
    "hires.steps": ("hires-steps", parse.whole),
    "hires.upscaler": ("upscaler", _as_it_is),
    "reuse": ("reuse", parse.whole),
    "guidance_interval": ("guidance-interval", parse.interval),
    "variation": ("variation", lambda option, given: parse.variation(given)),
    "eta": ("eta", parse.number),
    "clip_skip": ("clip-skip", parse.whole),
    "prompt_rules": ("prompt-rules", _as_it_is),
    "weighting": ("weighting", _as_it_is),
    "text_length": ("text-length", parse.whole),
    "skip_layers.layers": ("skip-layers", parse.wholes),
    "skip_layers.scale": ("skip-scale", parse.number),
    "skip_layers.interval": ("skip-interval", parse.interval),
}
OTHERS = {  # fields, and arguments of `sfumato.load`, that an option of another name gives, or gives with another
    "guidance_first": "guidance", "loras": "lora", "controls": "control", "clip": "init", "refine_at": "refiner",
    "inpaint": "mask-blur", "controlnets": "controlnet", "annotators": "annotator", "embeddings": "embedding",
    "partial": "lora-partial",
}  # fmt: skip
MAY_DROP = ("hires.scale", "guidance_interval", "variation", "skip_layers.layers")


def given(context: Context, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields that the command line gives, to be laid over others by `parse.merged`.

    Options that the verb does not have are not asked for, and those left open or dropped by "none" are not there.
    without: fields that the verb reads in another way.
    """
    found = {}
    for field, (option, read) in FIELDS.items():
        name = option.replace("-", "_")
        value = context.params.get(name)
        if field in without or value is None or left_open(context, name) or _dropped(field, value):
            continue
        found[field] = read(option, value)
    return _labels(found)


def _labels(found: dict[str, Any]) -> dict[str, Any]:
    """With our names of a sampler and a schedule that are written as web UIs label them: "DPM++ 2M Karras".

    What nobody knows stays as it is, for who checks it to say so.
    """
    from sfumato.receipts.webui import sampler_named, schedule_named

    if (sampler := found.get("sampler")) is not None:
        own, schedule = sampler_named(sampler)
        found["sampler"] = own or sampler
        if schedule is not None and "schedule" not in found:
            found["schedule"] = schedule
    if (given := found.get("schedule")) is not None:
        found["schedule"] = schedule_named(given) or given
    return found


def option_of(field: str, options: Mapping[str, str]) -> str | None:
    """What the command line calls a field of a request, or another argument; None if a verb has no option for it.

    options: of the verb, how they are written by their parameters' names.
    """
    outer, _, inner = field.partition(".")
    whole = OTHERS.get(field) or FIELDS.get(field, (field,))[0]
    for name, more in ((whole, ""), (OTHERS.get(outer, outer), f" {inner.replace('_', '-')}")):
        if (written := options.get(name.replace("-", "_"))) is not None:
            return written + (" FIRST:LAST" if field == "guidance_first" else more)
    return None


def in_words(note: str, context: Context) -> str:
    """What the library says of a request, with the verb's options in place of fields."""
    options = options_of(context.command)
    return worded(note, None, lambda field: option_of(field, options))


def options_of(command: Any) -> dict[str, str]:
    """How a verb's options are written, by their parameters' names."""
    written = ((each.name, [text for text in each.opts if text.startswith("--")]) for each in command.params)
    return {name: texts[0] for name, texts in written if texts}


def dropped(context: Context) -> set[str]:
    """The fields of a picture to be like that the command line leaves out, by "none"."""
    told = {field: context.params.get(FIELDS[field][0].replace("-", "_")) for field in MAY_DROP}
    return {field.partition(".")[0] for field, value in told.items() if value == NONE}


def _dropped(field: str, value: Any) -> bool:
    return field in MAY_DROP and value == NONE
