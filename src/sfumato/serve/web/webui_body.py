"""A body of the web UI's as a request of ours.

Field names and defaults are those of modules/api/models.py there. A field that asks for what is not done here is
refused by name; one with the value that asks for nothing is passed over.
"""

from __future__ import annotations

import io
import re
import secrets
from typing import Any

from sfumato import checks, pictures
from sfumato.errors import DataError, InputError
from sfumato.receipts import webui
from sfumato.serve.refusals import Refused, bad
from sfumato.serve.web.body import unbase64
from sfumato.wording import worded

FREE = {  # may have any value: they are about files of that program's machine, or about its windows
    "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards", "force_task_id", "sampler_index",
    "image_cfg_scale", "save_images", "send_images", "comments", "restore_faces_model",
    "s_tmax",  # until which noise is churned, and s_churn must be 0
}  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that ask for nothing
    "restore_faces": (False,), "tiling": (False,), "styles": ([],), "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1), "s_churn": (0,), "s_tmin": (0,), "s_noise": (1,), "s_min_uncond": (0,),
    "script_name": ("",), "script_args": ([],), "firstphase_width": (0,), "firstphase_height": (0,),
    "hr_resize_x": (0,), "hr_resize_y": (0,), "hr_prompt": ("",), "hr_negative_prompt": ("",),
    "hr_checkpoint_name": ("", "Use same checkpoint"), "refiner_checkpoint": ("", "None"),
    "refiner_switch_at": (0, 0.8),
    "disable_extra_networks": (False,), "initial_noise_multiplier": (1,), "inpainting_fill": (0, 1),
    "include_init_images": (False,), "mask_blur_x": (4,), "mask_blur_y": (4,), "mask_round": (True,),
}  # fmt: skip
FITS = {0: "stretch", 1: "cover", 2: "contain"}  # resize_mode
THEIRS = {  # our names → the web UI's field
    "guidance": "cfg_scale", "size": "width", "count": "batch_size", "negative": "negative_prompt",
    "strength": "denoising_strength", "sampler": "sampler_name", "schedule": "scheduler", "image": "init_images",
    "controls": "alwayson_scripts", "control": "alwayson_scripts", "loras": "prompt", "fit": "resize_mode",
    "clip_skip": "CLIP_stop_at_last_layers", "variation": "subseed", "variation.seed": "subseed",
    "variation.strength": "subseed_strength", "hires": "enable_hr", "hires.scale": "hr_scale",
    "hires.strength": "denoising_strength", "hires.steps": "hr_second_pass_steps", "hires.upscaler": "hr_upscaler",
    "inpaint.blur": "mask_blur", "inpaint.padding": "inpaint_full_res_padding", "model": "sd_model_checkpoint",
}  # fmt: skip
WORDS = {"width": "width x height", "batch_size": "batch_size x n_iter"}  # where ours is two of these fields
CONTROL_FITS = {"just resize": "stretch", "crop and resize": "cover", "resize and fill": "contain"}


def facts_of(models: list[dict[str, Any]], name: Any) -> dict[str, Any]:
    """What is known of the model of that name. `Refused` if there is none."""
    for facts in models:
        if facts["name"] == name:
            return facts
    raise Refused(
        404, "model_not_found", f"there is no model {checks.shown(name)}", param="sd_model_checkpoint"
    )


def in_their_words(error: Refused | InputError) -> Refused:
    """An error of ours by the names that the web UI's fields have."""
    ours, text = error.param if isinstance(error, Refused) else error.argument, str(error)
    ours = (ours or "").partition("[")[0] or None
    if side := re.match(r"size's (width|height) ", text):
        ours, text = side[1], text.removeprefix("size's ")
    text = worded(
        text, ours, lambda field: None if (named := THEIRS.get(field)) is None else WORDS.get(named, named)
    )
    ours = THEIRS.get(ours or "", ours)
    if isinstance(error, InputError):
        return Refused(400, error.code, text, param=ours)
    return Refused(error.status, error.code, text, param=ours, retry_after=error.retry_after)


class Body:
    """A body of the web UI's, field by field: `request` leaves `pictures` to keep, and `controls` without theirs."""

    def __init__(self, models: list[dict[str, Any]], body: dict[str, Any], model: str):
        self.models, self.given = models, body
        self.left = {name: value for name, value in body.items() if value is not None and name not in FREE}
        self.model = model
        self.pictures: dict[str, bytes] = {}
        self.controls: list[dict[str, Any]] = []
        self.fit: str | None = None

    def plain(self) -> dict[str, Any]:
        """What was sent, without pictures."""
        return {
            name: value
            for name, value in self.given.items()
            if name not in ("init_images", "mask", "alwayson_scripts")
        }

    def request(self, pictures: bool) -> tuple[dict[str, Any], str]:
        """Our request, without pictures, and the model."""
        self._settings()
        facts = facts_of(self.models, self.model)
        prompt, uses = self._loras(self._text("prompt"))
        found: dict[str, Any] = {"prompt": prompt}
        if uses:
            found["loras"] = uses
        if negative := self._text("negative_prompt"):
            found["negative"] = negative
        seed = self._take("seed", -1)
        found["seed"] = secrets.randbelow(2**32) if seed in (-1, "") else seed
        found["count"] = self._whole("batch_size", 1) * self._whole("n_iter", 1)
        for name, ours in (("steps", "steps"), ("cfg_scale", "guidance")):
            if name in self.left:
                found[ours] = self.left.pop(name)
        if "width" in self.left or "height" in self.left:
            usual = facts["preset"]["size"]
            found["size"] = [self._take("width", usual[0]), self._take("height", usual[1])]
        found |= self._sampling(facts)
        if (eta := self._take("eta", None)) is not None and found.get("sampler") in facts["eta_samplers"]:
            found["eta"] = eta
        strength, second = self._take("subseed_strength", 0), self._take("subseed", -1)
        if strength:
            second = secrets.randbelow(2**32) if second in (-1, "") else second
            found["variation"] = {"seed": second, "strength": strength}
        if self.clip_skip is not None and self.clip_skip != 1:
            found["clip_skip"] = self.clip_skip
        found |= self._from_picture() if pictures else self._larger()
        self._scripts()
        if self.fit is not None:
            found["fit"] = self.fit
        self._rest()
        return found, self.model

    def _settings(self) -> None:
        """What `override_settings` says: the model, and the layer of a CLIP text encoder."""
        self.clip_skip: Any = None
        settings = self._take("override_settings", {})
        if not isinstance(settings, dict):
            raise bad("override_settings must be an object", "override_settings")
        for name, value in settings.items():
            if name == "sd_model_checkpoint":
                self.model = facts_of(self.models, value)["name"]
            elif name == "CLIP_stop_at_last_layers":
                self.clip_skip = value
            elif name != "samples_format" or value != "png":
                raise bad(f"the setting {checks.shown(name)} cannot be overridden here", "override_settings")

    def _sampling(self, facts: dict[str, Any]) -> dict[str, Any]:
        sampler, schedule = (
            self._take("sampler_name", self.given.get("sampler_index")),
            self._take("scheduler", None),
        )
        for name, value in (("sampler_name", sampler), ("scheduler", schedule)):
            if value is not None and not isinstance(value, str):
                raise bad(f"{name} must be a name", name)
        if not sampler and not schedule:
            return {}
        try:
            return webui.sampling(sampler or None, schedule or None, (), facts["schedules"])
        except InputError as error:
            what, value, name = "sampler", sampler, "sampler_name"
            if error.argument == "schedule":
                what, value, name = "scheduler", schedule, "scheduler"
            elif not self.given.get(name):
                name = "sampler_index"
            raise bad(f"there is no {what} {checks.shown(value)} here; see /sdapi/v1/{what}s", name) from None

    def _loras(self, prompt: str) -> tuple[str, list[dict[str, Any]]]:
        try:
            rest, uses = webui.loras(prompt)
        except InputError as error:
            raise bad(str(error), "prompt") from None
        if (start := rest.find("<lora:")) >= 0:
            raise bad(f"a LoRA is <lora:NAME:WEIGHT>, not {checks.shown(rest[start : start + 40])}", "prompt")
        return rest, uses

    def _larger(self) -> dict[str, Any]:
        """The second pass, if there is one. Its fields mean nothing without it."""
        values = {
            name: self._take(name, default)
            for name, default in (
                ("denoising_strength", 0.7), ("hr_scale", 2.0), ("hr_upscaler", "Latent"), ("hr_second_pass_steps", 0),
            )
        }  # fmt: skip
        same = {
            name: self._take(name, None)
            in (None, "", f"Use same {first.partition('_')[0]}", self.given.get(first))
            for name, first in (("hr_sampler_name", "sampler_name"), ("hr_scheduler", "scheduler"))
        }
        if not self._take("enable_hr", False):
            return {}
        for name, so in same.items():
            if not so:
                raise bad(f"{name} must be that of the first pass", name)
        known = {label: name for name, label in webui.UPSCALERS.items()} | {
            "Latent (nearest)": "latent-nearest"
        }
        upscaler = values["hr_upscaler"]
        if not isinstance(upscaler, str) or upscaler not in known:
            raise bad(
                f"hr_upscaler must be one of {', '.join(known)}, not {checks.shown(upscaler)}", "hr_upscaler"
            )
        hires = {
            "scale": values["hr_scale"],
            "strength": values["denoising_strength"],
            "upscaler": known[upscaler],
        }
        if values["hr_second_pass_steps"]:
            hires["steps"] = values["hr_second_pass_steps"]
        return {"hires": hires}

    def _from_picture(self) -> dict[str, Any]:
        images = self._take("init_images", None)
        if not isinstance(images, list) or len(images) != 1:
            raise bad("init_images must hold one picture, as base64", "init_images")
        self.pictures["image"] = unbase64(images[0], "init_images")
        mode = self._take("resize_mode", 0)
        if mode not in tuple(FITS):
            raise bad(f"resize_mode must be 0, 1 or 2, not {checks.shown(mode)}", "resize_mode")
        self.fit = FITS[mode]
        found: dict[str, Any] = {"strength": self._take("denoising_strength", 0.75)}
        blur, whole = self._take("mask_blur", 4), self._take("inpaint_full_res", True)
        padding, invert = self._take("inpaint_full_res_padding", 0), self._take("inpainting_mask_invert", 0)
        mask = self._take("mask", None)
        if mask is None:
            return found
        data = unbase64(mask, "mask")
        self.pictures["mask"] = _inverted(data) if invert else data
        found["inpaint"] = {"blur": blur, **({"padding": padding} if whole else {})}
        return found

    def _scripts(self) -> None:
        """ControlNet's units; other scripts must be off."""
        scripts = self._take("alwayson_scripts", {})
        if not isinstance(scripts, dict):
            raise bad("alwayson_scripts must be an object", "alwayson_scripts")
        for name, script in scripts.items():
            units = script.get("args", []) if isinstance(script, dict) else None
            if not isinstance(units, list):
                raise bad(f"the script {checks.shown(name)} must have args, a list", "alwayson_scripts")
            if name.lower() != "controlnet":
                if any(unit not in (False, None, "", {}, []) for unit in units):
                    raise bad(f"the script {checks.shown(name)} is not here", "alwayson_scripts")
                continue
            for unit in units:
                if isinstance(unit, dict) and unit.get("enabled", True):
                    self._control(unit)

    def _control(self, unit: dict[str, Any]) -> None:
        image = unit.get("image") or unit.get("input_image")
        if isinstance(image, dict):
            image = image.get("image")
        module, mode = (
            str(unit.get("module", "none")).lower(),
            str(unit.get("control_mode", "Balanced")).lower(),
        )
        if mode not in ("balanced", "0", "controlnet is more important", "2"):
            raise bad(
                f"control_mode {checks.shown(mode)} is not here; it is Balanced or ControlNet is more important",
                "alwayson_scripts",
            )
        number = len(self.controls)
        self.pictures[f"control {number}"] = unbase64(
            image, "alwayson_scripts", f"the image of ControlNet's unit {number}"
        )
        name = unit.get("model")
        values = {
            "name": name.partition(" [")[0] if isinstance(name, str) else name,
            "weight": unit.get("weight", 1.0),
            "start": unit.get("guidance_start", 0.0),
            "end": unit.get("guidance_end", 1.0),
            "guess": mode in ("controlnet is more important", "2"),
        }
        if module not in ("none", ""):
            values["prepare"] = module
        self.controls.append(values)
        fit = CONTROL_FITS.get(str(unit.get("resize_mode", "")).lower())
        self.fit = self.fit or fit

    def _rest(self) -> None:
        """Nothing that asks for something may be left."""
        for name, value in self.left.items():
            if name not in NEUTRAL:
                raise bad(f"unknown field {checks.shown(name)}", name)
            if not any(type(value) in (type(ok), int, float) and value == ok for ok in NEUTRAL[name]):
                raise bad(f"{name} cannot be {checks.shown(value)} here", name)

    def _take(self, name: str, default: Any) -> Any:
        return self.left.pop(name, default)

    def _text(self, name: str) -> str:
        value = self._take(name, "")
        if not isinstance(value, str):
            raise bad(f"{name} must be text", name)
        return value

    def _whole(self, name: str, default: int) -> int:
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
            raise bad(f"{name} must be between 1 and 64, not {checks.shown(value)}", name)
        return value


def _inverted(data: bytes) -> bytes:
    """A mask with black and white exchanged, as PNG."""
    from PIL import ImageOps

    try:
        mask = pictures.decode_mask(data)
    except DataError as error:
        raise bad(str(error), "mask") from None
    stream = io.BytesIO()
    ImageOps.invert(mask).save(stream, "PNG")
    return stream.getvalue()
