"""`sfumato generate`: a prompt, and perhaps a picture, to picture files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sfumato.cli import bulk, controls, fields, loras, options, parse, show, watch
from sfumato.cli import like as likeness
from sfumato.cli.memory import peak, planned, show_plan
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.receipts.signing import Signer
    from sfumato.types import Request

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
    without: options.Without = None,
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

    second, refine_at = (None, None) if refiner in (None, fields.NONE) else parse.refiner(refiner)
    given, dropped = fields.given(context), fields.dropped(context)
    if micro == [fields.NONE]:
        dropped.add("micro")
    elif micro is not None:
        given |= parse.micro(micro)
    if refiner == fields.NONE:
        dropped.add("refine_at")
    elif refine_at is not None:
        given["refine_at"] = refine_at
    if image is not None:
        given["image"] = parse.picture("image", image)
    if mask is not None:
        given["mask"] = parse.picture("mask", mask, mask=True)
    embeddings = parse.embeddings(embedding or [])
    networks = controls.files(controlnet or [])
    makers = controls.files(annotator or [], "annotator")
    shown = controls.given([] if control in (None, controls.NONE) else control)
    adapters = loras.given([] if lora in (None, loras.NONE) else lora)
    said = None if like is None else likeness.read(like, given, dropped, second)
    told = {} if said is None else dict(said.request)
    drop = control == controls.NONE
    pictured = controls.requested(
        shown, control_ready or [], guess, told.pop("controls", None), like, drop, makers
    )
    if pictured is not None:
        given["controls"] = pictured
    if lora_partial and not adapters:
        raise InputError("--lora-partial goes with --lora FILE", argument="lora-partial")
    given["loras"] = loras.requested(adapters, told.get("loras"), like, lora == loras.NONE)
    lines = None
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
    signer = None if sign is None else _signer(sign)
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
        "without": without or (),
        "text_dtype": None if text_dtype is None else parse.dtype(text_dtype, parse.READ, "text-dtype"),
        "tokenizer": tokenizer,
        "controlnets": networks,
        "annotators": makers,
    }
    loaded = load(model, **opening)
    if loaded.system.only_clips:
        raise InputError(f"{model} draws clips and no pictures; use sfumato animate", argument="model")
    for note in loras.attach(loaded, adapters, request.loras or (), lora_partial):
        show.note(fields.in_words(note, context))
    for note in [] if loaded.system.adapters is None else loaded.system.adapters.notes(request):
        show.note(fields.in_words(note, context))
    for note in controls.idle(loaded, request, networks):
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
        opening |= {"model": model, "offload": None if found is None else found.offload}
        uses = request.loras or ()
        write = bulk.writer(loaded, opening, adapters, uses, lora_partial, ray, replicas)
        bulk.draw(loaded, lines, output, write, as_json)
        return
    _note_size(loaded, request)
    result = watch.drawn(loaded, request, output if preview else None)
    files = result.save(output, signer)
    seconds = time.perf_counter() - started
    if not as_json:
        for file in files:
            show.line(str(file))
        return
    show.answer(
        {
            "files": [str(file) for file in files],
            "seeds": request.seeds(),
            "seconds": round(seconds, 3),
            "recipe": result.recipe,
            **({} if found is None else {"memory": {"planned": found.peak, "peak": peak(loaded.device)}}),
        }
    )


def _signer(sign: tuple[Path, Path]) -> Signer:
    """What seals files, of a chain of certificates and a key."""
    from sfumato.receipts.signing import open_signer

    return open_signer(*sign)


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


def _note_size(loaded: Model, request: Request) -> None:
    """Say that a picture is much larger than those the model usually draws, where things begin to repeat."""
    size, usual = loaded.complete(request).size, loaded.preset["size"]
    assert size is not None
    if size[0] * size[1] > MUCH_LARGER * usual[0] * usual[1]:
        shown, known = (f"{side[0]}x{side[1]}" for side in (size, usual))
        show.note(
            f"{shown} is much larger than the {known} this model is made for, and things may stand there twice; "
            "--hires enlarges a picture of its own size"
        )


def _note_guess(loaded: Model) -> None:
    """Say what a distilled model is drawn as, if that was guessed from what stands in or on its files."""
    config = loaded.system.config
    if getattr(config, "guessed", ""):
        show.note(
            f"drawn as {config.distilled}, guessed from {config.guessed[:80]!r}; --preset plain if it is none"
        )
