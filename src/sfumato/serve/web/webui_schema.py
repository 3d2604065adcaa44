"""Which fields the web UI's bodies may have, as JSON schema: what `webui_body.py` takes, and no more."""

from __future__ import annotations

from typing import Any

from sfumato.receipts import webui
from sfumato.serve.web.webui_body import FITS, FREE, NEUTRAL

TEXT, WHOLE, NUMBER, FLAG = ({"type": name} for name in ("string", "integer", "number", "boolean"))
PICTURE = {"type": "string", "description": "a picture as base64, or a data: URL of it"}
COMMON: dict[str, dict[str, Any]] = {
    "prompt": {**TEXT, "description": "<lora:NAME:WEIGHT> in it asks for a LoRA"},
    "negative_prompt": TEXT,
    "seed": {**WHOLE, "default": -1, "description": "-1 is one by chance"},
    "subseed": {**WHOLE, "default": -1},
    "subseed_strength": {**NUMBER, "minimum": 0, "maximum": 1, "default": 0},
    "steps": {**WHOLE, "minimum": 1},
    "cfg_scale": NUMBER,
    "width": WHOLE,
    "height": WHOLE,
    "batch_size": {**WHOLE, "minimum": 1, "maximum": 64, "default": 1},
    "n_iter": {**WHOLE, "minimum": 1, "maximum": 64, "default": 1},
    "sampler_name": {**TEXT, "description": "of /sdapi/v1/samplers"},
    "scheduler": {**TEXT, "description": "of /sdapi/v1/schedulers"},
    "eta": NUMBER,
    "denoising_strength": {**NUMBER, "minimum": 0, "maximum": 1},
    "override_settings": {
        "type": "object",
        "properties": {
            "sd_model_checkpoint": TEXT,
            "CLIP_stop_at_last_layers": WHOLE,
            "samples_format": {"type": "string", "enum": ["png"]},
        },
        "additionalProperties": False,
    },
    "alwayson_scripts": {"type": "object", "description": "of ControlNet; others must be off"},
}
OPTIONS = {
    "type": "object",
    "properties": {"sd_model_checkpoint": TEXT, "CLIP_stop_at_last_layers": {"enum": [1]}},
    "additionalProperties": False,
}
LARGER: dict[str, dict[str, Any]] = {
    "enable_hr": {**FLAG, "default": False},
    "hr_scale": {**NUMBER, "default": 2},
    "hr_upscaler": {**TEXT, "default": "Latent"},
    "hr_second_pass_steps": {**WHOLE, "default": 0},
    "hr_sampler_name": {**TEXT, "description": "that of the first pass, or Use same sampler"},
    "hr_scheduler": {**TEXT, "description": "that of the first pass, or Use same scheduler"},
}
FROM_PICTURE: dict[str, dict[str, Any]] = {
    "init_images": {"type": "array", "items": PICTURE, "minItems": 1, "maxItems": 1},
    "resize_mode": {"type": "integer", "enum": list(FITS), "default": 0},
    "mask": {**PICTURE, "description": "white where to paint, as base64"},
    "mask_blur": {**WHOLE, "default": 4},
    "inpaint_full_res": {**FLAG, "default": True},
    "inpaint_full_res_padding": {**WHOLE, "default": 0},
    "inpainting_mask_invert": {**WHOLE, "default": 0},
}
GREY = (  # a PNG of 64 x 64 pixels
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAKUlEQVR42u3MQREAAAwCIKMb3RD77SAA6VEEAoFAIBAIBAKBQCAQ"
    "fA8G320AeXC6efoAAAAASUVORK5CYII="
)


def fields(pictures: bool) -> dict[str, Any]:
    """Of a body of txt2img, or with pictures of img2img. Those that ask for nothing are told by their values, and
    those that are passed over are free."""
    neutral = {name: {"enum": list(values)} for name, values in NEUTRAL.items()}
    own = FROM_PICTURE if pictures else LARGER
    found: dict[str, Any] = {**COMMON, **own, **neutral, **{name: {} for name in sorted(FREE)}}
    if not pictures:
        found["hr_upscaler"] = {**TEXT, "enum": [*webui.UPSCALERS.values(), "Latent (nearest)"]}
        found["denoising_strength"] = {**COMMON["denoising_strength"], "description": "of the second pass"}
    nothing = {"type": "null"}
    answer: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: {"anyOf": [each, nothing]} if each else {} for name, each in found.items()},
    }
    if pictures:
        answer["required"] = ["init_images"]
        answer["properties"]["init_images"] = FROM_PICTURE["init_images"]
    return answer
