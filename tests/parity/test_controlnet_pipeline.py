"""Whole pictures under ControlNets against diffusers' pipelines: small random models, the same noise, 20 steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

import small_control  # noqa: E402
from helpers import noise, relative_error  # noqa: E402
from sd_reference import (  # noqa: E402
    control_reference,
    drawn,
    euler,
    names_of,
    part_of,
    theirs_drawn,
    tokenizer,
    write_jsons,
)
from sfumato.families.sd.system import open_system  # noqa: E402
from sfumato.generate import Model  # noqa: E402
from sfumato.types import Control, Request  # noqa: E402
from small_sd import SIDE, SMALL  # noqa: E402

PICTURE = 1e-4
SIZE = (SIDE, SIDE + 32)
REQUEST = Request("a small red fox, 4k", negative="blurry", seed=3, steps=20, guidance=6.0, sampler="euler",
                  schedule="trailing", size=SIZE)  # fmt: skip
FIRST, SECOND = noise(*SIZE, seed=1), noise(*SIZE, seed=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind → (diffusers' parts and two ControlNets, our model of the same files)."""
    known = {}

    def make(kind: str):
        if kind not in known:
            place = tmp_path_factory.mktemp(kind)
            torch.manual_seed(5)
            parts = {name: part_of(SMALL[kind], name) for name in names_of(SMALL[kind])}
            for name, part in parts.items():
                part.save_pretrained(place / name)
            write_jsons(place, kind, SMALL[kind])
            controls, files = [], {}
            for name, seed in (("canny", 9), ("depth", 10)):
                theirs = control_reference(small_control.config_of(kind))
                theirs.load_state_dict(small_control.network(kind, seed).state_dict())
                theirs.save_pretrained(place / name)
                controls.append(theirs)
                files[name] = place / name
            system = open_system(place, torch.device("cpu"), torch.float32, systems=SMALL)
            known[kind] = (
                parts,
                controls,
                Model(system.with_controls(files, SMALL), torch.device("cpu"), kind),
            )
        return known[kind]

    return make


def pipeline(kind: str, parts: dict, controls: list):
    if kind == "sdxl":
        return diffusers.StableDiffusionXLControlNetPipeline(
            **parts,
            controlnet=controls if len(controls) > 1 else controls[0],
            tokenizer=tokenizer("<|endoftext|>"),
            tokenizer_2=tokenizer("!"),
            scheduler=euler(),
            add_watermarker=False,
        )
    return diffusers.StableDiffusionControlNetPipeline(
        **parts,
        controlnet=controls if len(controls) > 1 else controls[0],
        tokenizer=tokenizer("!" if kind == "sd2" else "<|endoftext|>"),
        scheduler=euler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


CASES = {
    "one": ((Control("canny", FIRST),), {}),
    "weighed, of some steps": (
        (Control("canny", FIRST, weight=0.6, start=0.1, end=0.7),),
        {"controlnet_conditioning_scale": 0.6, "control_guidance_start": 0.1, "control_guidance_end": 0.7},
    ),
    "two": (
        (Control("canny", FIRST, weight=0.7, end=0.5), Control("depth", SECOND, weight=1.2, start=0.25)),
        {
            "controlnet_conditioning_scale": [0.7, 1.2],
            "control_guidance_start": [0.0, 0.25],
            "control_guidance_end": [0.5, 1.0],
        },
    ),
    "guessing": (
        (Control("canny", FIRST, guess=True),),
        {"guess_mode": True, "controlnet_conditioning_scale": 1.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=pytest.mark.full), "sdxl"])
def test_a_controlled_picture(agrees, made, kind, case):
    parts, nets, model = made(kind)
    controls, more = CASES[case]
    request = replace(REQUEST, controls=controls)
    start, latents, pixels = drawn(model, request)
    theirs = pipeline(kind, parts, nets[: len(controls)])
    shown = [FIRST, SECOND][: len(controls)] if len(controls) > 1 else FIRST
    given = {"controlnet_conditioning_scale": 1.0} | more
    their_latents, their_pixels = theirs_drawn(theirs, request, start, image=shown, **given)
    of = f"diffusers {type(theirs).__name__}"
    agrees(
        "ControlNet pipeline, latents after 20 steps", f"{kind}, {case}", latents, their_latents, PICTURE, of
    )
    agrees("ControlNet pipeline, pixels", f"{kind}, {case}", pixels, their_pixels, PICTURE, of)
    _, bare, _ = drawn(model, REQUEST)
    assert relative_error(bare, latents) > 1e-3


def test_a_picture_of_another_size_is_scaled_as_theirs(agrees, made):
    parts, nets, model = made("sd1")
    large = Image.fromarray(np.asarray(FIRST)).resize((2 * SIZE[0], 2 * SIZE[1]), Image.Resampling.BICUBIC)
    request = replace(REQUEST, controls=(Control("canny", large),))
    start, latents, _ = drawn(model, request)
    theirs = pipeline("sd1", parts, nets[:1])
    their_latents, _ = theirs_drawn(theirs, request, start, image=large, controlnet_conditioning_scale=1.0)
    agrees("ControlNet pipeline, latents after 20 steps", "sd1, larger picture", latents, their_latents, PICTURE,
           "diffusers StableDiffusionControlNetPipeline")  # fmt: skip
