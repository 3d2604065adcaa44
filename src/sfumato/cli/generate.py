"""`sfumato generate`: a prompt, and perhaps a picture, to picture files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from sfumato.cli import bulk, controls, loras, options, parse, show, watch
from sfumato.cli import like as likeness
from sfumato.cli.memory import peak, planned, show_plan
from sfumato.errors import InputError

MUCH_LARGER = 2.25  # in pixels: 1.5 times the sides
EXAMPLE = 'sfumato generate "a red metal sphere behind a small blue cube" -o out.png --seed 7'


def generate(
    context: typer.Context,
    prompt: options.Prompt = None,
    output: options.Output = Path("out.png"),
    count: options.Count = "1",
    seed: options.Seed = "0",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    size: options.Size = None,
    negative: options.Negative = None,
    model: options.Model = None,
    like: options.Like = None,
    image: options.Image = None,
    strength: options.Strength = None,
    fit: options.Fit = None,
    outpaint: options.Outpaint = None,
    mask: options.Mask = None,
    mask_blur: options.MaskBlur = None,
    only_masked: options.OnlyMasked = None,
    paste: options.Paste = None,
    control: options.Control = None,
    controlnet: options.ControlNet = None,
    annotator: options.Annotator = None,
    control_ready: options.ControlReady = None,
    guess: options.Guess = None,
    hires: options.Hires = None,
    hires_strength: options.HiresStrength = None,
    hires_steps: options.HiresSteps = None,
    upscaler: options.Upscaler = None,
    reuse: options.Reuse = None,
    guidance_interval: options.GuidanceInterval = None,
    clip_skip: options.ClipSkip = None,
    prompt_rules: options.PromptRules = None,
    weighting: options.Weighting = None,
    text_length: options.TextLength = None,
    micro: options.Micro = None,
    embedding: options.Embedding = None,
    lora: options.Lora = None,
    lora_partial: options.LoraPartial = False,
    variation: options.Variation = None,
    eta: options.Eta = None,
    skip_layers: options.SkipLayers = None,
    skip_scale: options.SkipScale = None,
    skip_interval: options.SkipInterval = None,
    refiner: options.Refiner = None,
    parts: options.Parts = None,
    vae: options.Vae = None,
    dtype: options.Dtype = None,
    text_dtype: options.TextDtype = None,
    no_t5: options.NoT5 = False,
    no_clip_l: options.NoClipL = False,
    no_clip_g: options.NoClipG = False,
    tokenizer: options.Tokenizer = None,
    engine: options.Engine = None,
    prediction: options.Prediction = None,
    preset: options.Preset = None,
    variant: options.Variant = None,
    device: options.Device = None,
    plan: options.Plan = False,
    memory: options.Memory = None,
    offload: options.Offload = None,
    preview: options.Preview = False,
    deterministic: options.Deterministic = False,
    sign: options.Sign = None,
    prompts: options.Prompts = None,
    ray: options.Ray = None,
    replicas: options.Replicas = "1",
    as_json: options.AsJson = False,
) -> None:
    """Draw pictures from a prompt, or from a prompt and a picture. Each file carries its recipe."""
    from sfumato.receipts.provenance import check_output
    from sfumato.types import Request

    second, refine_at = (None, None) if refiner in (None, "none") else parse.refiner(refiner)
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
        "reuse": None if reuse is None else parse.whole("reuse", reuse),
        "guidance_interval": None
        if guidance_interval in (None, "none")
        else parse.interval("guidance-interval", guidance_interval),
        "variation": None if variation in (None, "none") else parse.variation(variation),
        "eta": None if eta is None else parse.number("eta", eta),
        "clip_skip": None if clip_skip is None else parse.whole("clip-skip", clip_skip),
        "prompt_rules": prompt_rules,
        "weighting": weighting,
        "text_length": None if text_length is None else parse.whole("text-length", text_length),
        "skip_layers.layers": None
        if skip_layers in (None, "none")
        else parse.wholes("skip-layers", skip_layers),
        "skip_layers.scale": None if skip_scale is None else parse.number("skip-scale", skip_scale),
        "skip_layers.interval": None
        if skip_interval is None
        else parse.interval("skip-interval", skip_interval),
        **({} if micro in (None, ["none"]) else parse.micro(micro)),
        "refine_at": refine_at,
    }
    embeddings = parse.embeddings(embedding or [])
    shown = controls.given([] if control in (None, controls.NONE) else control)
    networks = controls.files(controlnet or [])
    makers = controls.files(annotator or [], "annotator")
    adapters = loras.given([] if lora in (None, loras.NONE) else lora)
    default = {name for name in given if options.left_open(context, name)}
    given = {name: value for name, value in given.items() if value is not None and name not in default}
    if image is not None:
        given["image"] = parse.picture("image", image)
    if mask is not None:
        given["mask"] = parse.picture("mask", mask, mask=True)
    may_drop = {
        "hires": hires,
        "variation": variation,
        "guidance_interval": guidance_interval,
        "skip_layers": skip_layers,
    }
    dropped = {name for name, text in may_drop.items() if text == "none"}
    if micro == ["none"]:
        dropped.add("micro")
    if refiner == "none":
        dropped.add("refine_at")
    said = None if like is None else likeness.read(like, given, dropped, second)
    told = {} if said is None else dict(said.request)
    drop = control == controls.NONE
    pictured = controls.requested(
        shown, control_ready or [], guess, told.pop("controls", None), like, drop, makers
    )
    if pictured is not None:
        given["controls"] = pictured
    given["loras"] = loras.requested(adapters, told.get("loras"), like, lora == loras.NONE)
    lines, signer = None, None
    if prompts is None:
        request = Request.from_dict(_merged(given, told))
        check_output(output, request.count, request)
    else:
        others = {
            "the prompt": prompt,
            "--like": like,
            "--image": image,
            "--control": control,
            "--preview": preview,
            "--sign": sign,
        }
        lines = bulk.lines_of(prompts, given, others, output)
        request = bulk.largest(lines)
    if sign is not None:
        from sfumato.receipts.signing import open_signer

        signer = open_signer(*sign)
    if preview:
        watch.check_preview(output)

    started = time.perf_counter()
    if deterministic:
        from sfumato.runtime import deterministic as ask

        ask()
    from sfumato.generate import DEFAULT_MODEL, MODELS, load

    if model is None:
        # a stranger's picture may name any file or place; only a name that we know is followed
        model = said.model if said is not None and said.model in MODELS else DEFAULT_MODEL
    left_out = {"t5": no_t5, "clip_l": no_clip_l, "clip_g": no_clip_g}
    without = [name for name, asked in left_out.items() if asked]
    limit = None if memory is None else parse.size_in_bytes("memory", memory)
    opening: dict[str, Any] = {
        "device": device,
        "dtype": None if dtype is None else parse.dtype(dtype, parse.DRAWN),
        "engine": engine,
        "vae": vae,
        "prediction": prediction,
        "variant": variant,
        "embeddings": embeddings,
        "parts": parts or None,
        "refiner": second,
        "offload": "auto",
        "preset": preset,
        "without": without,
        "text_dtype": None if text_dtype is None else parse.dtype(text_dtype, parse.READ, "text-dtype"),
        "tokenizer": tokenizer,
        "controlnets": networks,
        "annotators": makers,
    }
    loaded = load(model, **opening)
    if getattr(loaded.system, "animates", False):
        raise InputError(f"{model} draws clips and no pictures; use sfumato animate", argument="model")
    for note in loras.attach(loaded, adapters, request.loras or (), lora_partial):
        show.note(note)
    _note_guess(loaded)
    loaded, found = planned(loaded, request, offload, limit, told=plan)
    if plan:
        show_plan(found, request, as_json)
        return
    if like is not None and said is not None:
        for note in likeness.differences(like, said, loaded, request):
            show.note(note)
    if lines is not None:
        level = None if found is None else found.offload
        write = bulk.writer(
            loaded,
            {"model": model, **opening, "offload": level},
            adapters,
            request.loras or (),
            lora_partial,
            ray,
            replicas,
        )
        bulk.draw(loaded, lines, output, write, as_json)
        return
    _note_size(loaded, request)
    from sfumato.receipts.bill import Meter, billed

    meter = Meter()
    with show.progress() as bar:
        hear, clean = watch.watcher(bar, loaded, output if preview else None)
        try:
            result = loaded.generate(request, on_step=hear)
        finally:
            clean()
    result = billed(loaded, request, result, meter)
    files = result.save(output, signer)
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


def _merged(given: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request from those `given` laid over those `said`, with what cannot stand alone."""
    values = parse.merged(given, said)
    if "prompt" not in values:
        raise InputError(
            "give a prompt (it may be empty), or a picture to take it from by --like", argument="prompt"
        )
    if "scale" not in (values.get("hires") or {"scale": 1}):
        raise InputError(
            "--hires-strength, --hires-steps and --upscaler go with --hires SCALE", argument="hires"
        )
    if "layers" not in (values.get("skip_layers") or {"layers": ()}):
        raise InputError(
            "--skip-scale and --skip-interval go with --skip-layers, such as 7,8,9", argument="skip_layers"
        )
    return values


def _note_size(loaded: Any, request: Any) -> None:
    """Say that a picture is much larger than those the model usually draws, where things begin to repeat."""
    size, usual = loaded.complete(request).size, loaded.preset["size"]
    if size[0] * size[1] > MUCH_LARGER * usual[0] * usual[1]:
        shown, known = (f"{side[0]}x{side[1]}" for side in (size, usual))
        show.note(
            f"{shown} is much larger than the {known} this model is made for, and things may stand there twice; "
            "--hires enlarges a picture of its own size"
        )


def _note_guess(loaded: Any) -> None:
    """Say what a distilled model is drawn as, if that was guessed from what somebody wrote into its file."""
    config = loaded.system.config
    if getattr(config, "guessed", ""):
        calls = f"its file calls it {config.guessed[:80]!r}"
        show.note(f"drawn as {config.distilled}, for {calls}; --preset plain if it is none")
