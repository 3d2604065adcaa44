"""A request in the form that AUTOMATIC1111's web UI writes into pictures, and back.

    a castle on a hill
    Negative prompt: fog
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b", …

The form is that of AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py and modules/processing.py: a value
that holds a comma, a colon or a newline is quoted as JSON. Its samplers and schedules go by their labels; savers for
ComfyUI write that program's names instead, or append the schedule to the sampler, as the web UI did before version 1.9.
All of these are read. What other programs add is kept apart, so that a caller can say what was not taken over.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from sfumato import checks
from sfumato.errors import InputError

SAMPLERS = {  # ours → label
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "lms": "LMS",
    "lcm": "LCM",
}
SCHEDULES = {  # ours → label; the others have none there
    "normal": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "leading": "DDIM",
    "ays": "Align Your Steps",
}
UPSCALERS = {  # ours → label
    "latent-bilinear": "Latent",
    "latent-bicubic": "Latent (bicubic)",
    "latent-nearest": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
}
EMPHASIS = {  # label → our rules of prompts and weighting; of other pairs the web UI knows nothing
    "No norm": (None, "a1111_no_norm"),
    "Ignore": (None, "none"),
    "None": ("none", None),
}
MICRO = {  # ours → how we write it; no other program writes sizes and crops
    "original": "SDXL original",
    "crop": "SDXL crop",
    "target": "SDXL target",
    "aesthetic": "SDXL aesthetic",
    "negative_original": "SDXL negative original",
    "negative_crop": "SDXL negative crop",
    "negative_target": "SDXL negative target",
    "negative_aesthetic": "SDXL negative aesthetic",
}
_SAMPLER_ALIASES = {  # ComfyUI's names, and k-diffusion's
    "euler_ancestral": "euler_a",
    "dpm_2": "dpm2",
    "dpmpp_2s_ancestral": "dpmpp_2s_a",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
}
_SCHEDULE_ALIASES = {
    "ddim_uniform": "leading",
    "uniform": "normal",
    "align_your_steps": "ays",
    "sgmuniform": "sgm_uniform",
}
_AUTOMATIC = {  # what `Automatic` is for a sampler (modules/sd_samplers_kdiffusion.py); Uniform for the others
    "dpmpp_2m": "karras",
    "dpmpp_sde": "karras",
    "dpmpp_2s_a": "karras",
    "dpm2": "karras",
    "dpmpp_2m_sde": "exponential",
}
SHORT = 10  # digits of a model's hash
_KEY = re.compile(r"\w[\w \-/]{1,59}")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"')
_LORA = re.compile(r" ?<(?:lora|lyco):([^:<>]{1,200})((?::[^:<>]{0,40}){0,4})>")
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})")
_SILENT = {  # says where a picture comes from, or what is so here anyway
    "app", "batch pos", "batch size", "created date", "hashes", "init image hash", "lora hashes", "model", "model hash",
    "parser", "rng", "ti hashes", "vae", "vae hash", "version",
}  # fmt: skip


def write(recipe: Mapping[str, Any], tool: str) -> str:
    """The recipe in this form: prompt, negative prompt, then one line of settings. tool: goes under Version."""
    request = recipe.get("request", {})
    weights = recipe.get("weights")
    sampler, schedule, size = request.get("sampler"), request.get("schedule"), request.get("size")
    hires, inpaint = request.get("hires") or {}, request.get("inpaint") or {}
    variation = request.get("variation") or {}
    padding = inpaint.get("padding")
    reading = request.get("prompt_rules"), request.get("weighting")
    emphasis = {pair: label for label, pair in EMPHASIS.items()}.get(reading)
    embeddings = recipe.get("embeddings") or {}
    adapters = recipe.get("loras") or {}
    micro = request.get("micro") or {}
    settings = {
        "Steps": request.get("steps"),
        "Sampler": SAMPLERS.get(sampler, sampler),
        "Schedule type": SCHEDULES.get(schedule, schedule),
        "CFG scale": request.get("guidance"),
        "Seed": request.get("seed"),
        "Size": _pair(size) if size else None,
        "Model hash": model_hash(weights)[:SHORT] if weights else None,
        "Model": recipe.get("model"),
        "Variation seed": variation.get("seed"),
        "Variation seed strength": variation.get("strength"),
        "Denoising strength": request.get("strength", hires.get("strength")),
        "Clip skip": request.get("clip_skip") if request.get("clip_skip") != 1 else None,
        "Refiner": (recipe.get("refiner") or {}).get("model"),
        "Refiner switch at": request.get("refine_at"),
        "Emphasis": emphasis,
        "Prompt rules": None if emphasis else reading[0],
        "Weighting": None if emphasis else reading[1],
        **{MICRO[name]: _pair(value) for name, value in micro.items()},
        "Eta": request.get("eta"),
        "Mask blur": inpaint.get("blur"),
        "Inpaint area": None if padding is None else "Only masked",
        "Masked area padding": padding,
        "Hires upscale": hires.get("scale"),
        "Hires steps": hires.get("steps"),
        "Hires upscaler": UPSCALERS.get(hires.get("upscaler", ""), hires.get("upscaler")),
        "TI hashes": ", ".join(f"{name}: {digest[:12]}" for name, digest in embeddings.items()) or None,
        "Lora hashes": ", ".join(f"{name}: {digest[:12]}" for name, digest in adapters.items()) or None,
        "Version": tool,
    }
    lines = [request.get("prompt", "") + "".join(f" {_tag(use)}" for use in request.get("loras") or ())]
    if request.get("negative"):
        lines.append(f"Negative prompt: {request['negative']}")
    lines.append(", ".join(f"{key}: {_plain(value)}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def model_hash(weights: Mapping[str, str]) -> str:
    """A model's hash, of which the web UI shows `SHORT` digits. weights: hashes of its parts, as a recipe has them."""
    return hashlib.sha256("".join(weights.values()).encode()).hexdigest()


def _tag(use: Mapping[str, Any]) -> str:
    """`<lora:name:0.8>`; where texts have a factor of their own, their weight and then the U-Net's."""
    weight, factor = use.get("weight", 1.0), (use.get("blocks") or {}).get("text", 1.0)
    own = f"{_plain(float(weight * factor))}:" if factor != 1.0 else ""
    return f"<lora:{use['name']}:{own}{_plain(float(weight))}>"


def _use(tag: re.Match[str]) -> dict[str, Any]:
    """A LoRA of a request from `<lora:name:text:unet>`, in which the second weight is the first by default.

    modules/extra_networks.py and extensions-builtin/Lora/extra_networks_lora.py; `te=` and `unet=` name them.
    """
    named: dict[str, float] = {}
    places = iter(("te", "unet"))
    for part in tag[2].split(":")[1:]:
        key, equals, value = part.rpartition("=")
        key = key.strip() if equals else next(places, "dyn")
        try:
            named[key] = float(value)
        except ValueError:
            raise InputError(
                f"its LoRA {checks.shown(tag[1])} has the weight {checks.shown(value[:40])}, which is no number"
            ) from None
    text = named.get("te", 1.0)
    weight = named.get("unet", text)
    use: dict[str, Any] = {"name": tag[1], "weight": weight}
    return use if weight == text or not weight else use | {"blocks": {"text": text / weight}}


def hashes(text: str) -> dict[str, str]:
    """Names and beginnings of hashes from a setting such as `TI hashes: "cat: 0123456789ab, hat: …"`."""
    pairs = (part.rpartition(":") for part in text.split(","))
    return {name.strip(): digest.strip() for name, _, digest in pairs if name.strip()}


def split(text: str) -> tuple[str, str, dict[str, str]]:
    """(prompt, negative prompt, settings as they stand there).

    The last line holds the settings if at least three can be read from it; else all is prompt. Where a prompt says
    `Negative prompt:` at the start of a line it is cut there: the form knows no better.
    """
    *lines, last = text.strip().replace("\r\n", "\n").split("\n")
    settings = _settings(last)
    if len(settings) < 3:
        lines, settings = [*lines, last], {}
    prompts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:").strip()
        prompts[negative].append(line)
    return "\n".join(prompts[0]), "\n".join(prompts[1]), settings


def _settings(line: str) -> dict[str, str]:
    """`key: value, key: "quoted, value"` to a dictionary, in one walk; what is neither key nor value is left out."""
    found: dict[str, str] = {}
    at, colon = 0, -1
    while at < len(line):
        if colon < at:
            colon = line.find(":", at)
            colon = len(line) if colon < 0 else colon
        comma = line.find(",", at)
        end = len(line) if comma < 0 else comma
        if colon < end:
            key, start = line[at:colon].strip(), colon + 1
            while start < end and line[start].isspace():
                start += 1
            quoted = _QUOTED.match(line, start)
            if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
                end = quoted.end()
            if _KEY.fullmatch(key):
                found[key] = _unquoted(line[start:end].strip())
        at = end + 1
    return found


def read(text: str, skip: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """(fields of a request, names of the settings that were not taken over) from text in this form.

    skip: fields the caller sets otherwise, such as `sampler` or `hires.upscaler`; what stands under them does not
    matter. Raises `InputError` for a text without settings, a value that is none, and a sampler, schedule or upscaler
    that we do not have.
    """
    prompt, negative, settings = split(text)
    if not settings:
        raise InputError("its text holds no settings, such as Steps: 20, Sampler: Euler, Seed: 1")
    take = _Taker(settings)
    request: dict[str, Any] = {"negative": negative}
    request["prompt"], uses = loras(prompt)
    request["loras"] = uses or None
    request["steps"] = take.whole("Steps")
    request["guidance"] = take.number("CFG scale")
    request["seed"] = take.whole("Seed")
    request["size"] = take.size("Size")
    request["clip_skip"] = take.whole("Clip skip")
    request["eta"] = take.number("Eta", "Eta DDIM")
    request["refine_at"] = take.number("Refiner switch at") if take.text("Refiner") else None
    rules, weighting = EMPHASIS.get(take.text("Emphasis") or "", (None, None))
    request["prompt_rules"] = take.text("Prompt rules") or rules
    request["weighting"] = take.text("Weighting") or weighting
    request["micro"] = {
        name: value for name, key in MICRO.items() if (value := take.told(key)) is not None
    } or None
    sampler, schedule = take.text("Sampler"), take.text("Schedule type")
    if not {"sampler", "schedule"} <= set(skip):
        request.update(sampling(sampler, schedule, skip))
    variation = {"seed": take.whole("Variation seed"), "strength": take.number("Variation seed strength")}
    if variation["strength"] and variation["seed"] is not None:
        request["variation"] = variation
    strength = take.number("Denoising strength")
    hires = _hires(take, request["size"], skip)
    if hires is None:
        # 1 is text to image, as savers for ComfyUI write it; 0 is what the web UI's HTTP interface leaves there
        request["strength"] = strength if strength not in (0, 1) else None
    else:
        request["hires"] = hires | ({} if strength is None else {"strength": strength})
    blur, area, padding = (
        take.whole("Mask blur"),
        take.text("Inpaint area"),
        take.whole("Masked area padding"),
    )
    if blur is not None:
        request["inpaint"] = {"blur": blur}
        if area == "Only masked":
            request["inpaint"]["padding"] = 32 if padding is None else padding
    request = {name: value for name, value in request.items() if value is not None and name not in skip}
    return request, [name for name in settings if name.lower() not in take.taken | _SILENT]


def loras(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """The prompt without its tags `<lora:name:weight>`, and what they ask for, as a request has it."""
    return _LORA.sub("", prompt).strip(), [_use(match) for match in _LORA.finditer(prompt)]


def sampling(
    sampler: str | None,
    schedule: str | None,
    skip: Collection[str] = (),
    schedules: Collection[str] | None = None,
) -> dict[str, str]:
    """Our names of a sampler and a schedule, whichever way they are written. `InputError` for those that are not here.

    skip: "sampler" or "schedule", not to be looked at. schedules: ours; None looks them up, which needs torch.
    """
    found: dict[str, str] = {}
    own, suffix = (None, None) if sampler is None else sampler_named(sampler)
    if sampler is not None and "sampler" not in skip:
        if own is None:
            raise InputError(
                f"it was drawn with the sampler {sampler!r}, which is not here; choose one of {', '.join(SAMPLERS)}",
                argument="sampler",
            )
        found["sampler"] = own
    if "schedule" in skip:
        return found
    wanted = schedule if schedule is not None else suffix
    if wanted is None:  # who writes no schedule had one way of spacing, or names any other
        return found | ({"schedule": "normal"} if own else {})
    if _key(wanted) == "automatic":
        return found | {"schedule": _AUTOMATIC.get(own or "", "normal")}
    name = schedule_named(wanted, schedules)
    if name is None:
        raise InputError(
            f"it was drawn with the schedule {wanted!r}, which is not here; choose another",
            argument="schedule",
        )
    return found | {"schedule": name}


def sampler_named(text: str) -> tuple[str | None, str | None]:
    """(our name or None, the schedule named behind it or None): `DPM++ 2M Karras`, `euler_ancestral_karras`."""
    known = {_key(label): name for name, label in SAMPLERS.items()}
    known |= {_key(name): name for name in SAMPLERS} | {_key(k): v for k, v in _SAMPLER_ALIASES.items()}
    key = _key(text)
    if key in known:
        return known[key], None
    schedules = {*map(_key, SCHEDULES), *map(_key, SCHEDULES.values()), *_SCHEDULE_ALIASES}
    for schedule in sorted(schedules, key=len, reverse=True):
        start = key.removesuffix("_" + schedule)
        if start != key and start in known:
            return known[start], schedule
    return None, None


def schedule_named(text: str, ours: Collection[str] | None = None) -> str | None:
    """Our name of a schedule, or None. ours: the names; None looks them up, which needs torch."""
    if ours is None:
        from sfumato.diffusion.schedules import SCHEDULES as OURS

        ours = OURS.keys()
    known = {_key(label): name for name, label in SCHEDULES.items()} | {name: name for name in ours}
    return (known | _SCHEDULE_ALIASES).get(_key(text))


def _key(text: str) -> str:
    """Labels and names in one form: `DPM++ 2M` and `dpm++_2m`, `SGM Uniform` and `sgm_uniform`."""
    return re.sub(r"[\s_]+", "_", text.strip().lower())


def _hires(take: _Taker, size: tuple[int, int] | None, skip: Collection[str]) -> dict[str, Any] | None:
    scale, resize = take.number("Hires upscale"), take.size("Hires resize")
    upscaler, steps = take.text("Hires upscaler"), take.whole("Hires steps")
    if scale is None and resize is None and upscaler is None:
        return None
    if "hires" in skip:
        return {}
    found: dict[str, Any] = {"scale": 2.0 if scale is None else scale}
    if scale is None and resize is not None and size is not None and "hires.scale" not in skip:
        found["scale"] = resize[0] / size[0]
        if round(size[1] * found["scale"]) != resize[1]:
            raise InputError(
                f"its second pass changes the shape from {size[0]}x{size[1]} to {resize[0]}x{resize[1]}, which is not "
                "done here; choose a scale",
                argument="hires.scale",
            )
    if steps:
        found["steps"] = steps
    if upscaler is not None and "hires.upscaler" not in skip:
        known = {label: name for name, label in UPSCALERS.items()} | {"Latent (nearest)": "latent-nearest"}
        if upscaler not in known:
            raise InputError(
                f"its second pass used the upscaler {upscaler!r}, which is not here; choose one of "
                f"{', '.join(UPSCALERS)}",
                argument="hires.upscaler",
            )
        found["upscaler"] = known[upscaler]
    return found


class _Taker:
    """Settings by name, in whatever case, and type; remembers which were asked for."""

    def __init__(self, settings: dict[str, str]):
        self.settings = {name.lower(): value for name, value in settings.items()}
        self.taken: set[str] = set()

    def text(self, *names: str) -> str | None:
        lower = [name.lower() for name in names]
        self.taken.update(lower)
        return next((self.settings[name] for name in lower if self.settings.get(name)), None)

    def whole(self, *names: str) -> int | None:
        text = self.text(*names)
        if text is None:
            return None
        if not re.fullmatch(r"[+-]?\d{1,40}", text):
            raise InputError(f"its {names[0]} is {text[:60]!r}, which is no whole number")
        return int(text)

    def number(self, *names: str) -> float | None:
        text = self.text(*names)
        if text is None:
            return None
        try:
            return float(text)
        except ValueError:
            raise InputError(f"its {names[0]} is {text[:60]!r}, which is no number") from None

    def size(self, *names: str) -> tuple[int, int] | None:
        text = self.text(*names)
        if text is None:
            return None
        match = _SIZE.fullmatch(text)
        if match is None or "0" in match.groups():
            raise InputError(f"its {names[0]} is {text[:60]!r}, which is no size")
        return int(match[1]), int(match[2])

    def told(self, name: str) -> tuple[int, int] | float | None:
        """A pair such as 0x64 where the name is that of a size or a crop, else a number."""
        text = self.text(name)
        if text is None or name.endswith("aesthetic"):
            return self.number(name)
        match = _SIZE.fullmatch(text)
        if match is None:
            raise InputError(f"its {name} is {text[:60]!r}, which is no pair such as 0x64")
        return int(match[1]), int(match[2])


def _pair(value: Any) -> Any:
    """A pair of numbers as sizes are written; anything else as it is."""
    return "x".join(str(number) for number in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> str:
    """A value as the settings hold it: numbers without a needless .0, text quoted where it would be misread."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value)
    risky = any(mark in text for mark in ",:\n") or text != text.strip() or text.startswith('"')
    return json.dumps(text, ensure_ascii=False) if risky else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
