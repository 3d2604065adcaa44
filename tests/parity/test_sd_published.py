"""Pictures of the published sizes against diffusers' pipelines, step by step, from one folder of random weights.

The weights are in float16 and both sides compute in float32, one after the other, so that the largest,
SDXL, needs 14 GB of memory.
"""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from helpers import CPU
from sd_reference import drawn, euler, names_of, part_of, theirs_drawn, tokenizer, write_jsons
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.types import Request

pytestmark = pytest.mark.full
SIDE = 256
PICTURE, NETWORK = 1e-4, 1e-5  # bounds of 20 steps, and of one network
REQUEST = Request("a small red fox, 4k", negative="blurry", seed=3, steps=20, guidance=6.0, sampler="euler",
                  schedule="trailing", size=(SIDE, SIDE))  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """kind, prediction → a diffusers folder of the published sizes, gone after the test."""

    def write(kind: str, prediction: str):
        torch.manual_seed(5)
        for name in names_of(SYSTEMS[kind]):
            part_of(SYSTEMS[kind], name, SIDE).half().save_pretrained(tmp_path / name)
        write_jsons(tmp_path, kind, SYSTEMS[kind], prediction)
        return tmp_path

    yield write
    shutil.rmtree(tmp_path)


def pipeline_of(kind: str, prediction: str, place):
    """diffusers' pipeline of the folder in float32."""
    form = {"torch_dtype": torch.float32}
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(place / "unet", **form),
        "vae": AutoencoderKL.from_pretrained(place / "vae", **form),
    }
    for part in SYSTEMS[kind].text:
        made = CLIPTextModelWithProjection if part.config.projection else CLIPTextModel
        parts[part.name] = made.from_pretrained(place / part.name, dtype=torch.float32)
    if kind == "sdxl":
        words = {"tokenizer": tokenizer("<|endoftext|>"), "tokenizer_2": tokenizer("!")}
        return StableDiffusionXLPipeline(**parts, **words, scheduler=euler(), add_watermarker=False)
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer("!" if kind == "sd2" else "<|endoftext|>"),
        scheduler=euler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
@pytest.mark.parametrize(("kind", "prediction"), [("sd1", "epsilon"), ("sd2", "v"), ("sdxl", "epsilon")])
def test_a_picture_of_the_published_size(agrees, written, kind, prediction):
    place = written(kind, prediction)
    model = Model(open_system(place, CPU, torch.float32), CPU, kind)
    steps: list[torch.Tensor] = []
    noise, _, pixels = drawn(model, REQUEST, steps)
    cond = model.condition(model.complete(REQUEST))
    del model
    gc.collect()

    pipeline = pipeline_of(kind, prediction, place)
    their_steps: list[torch.Tensor] = []

    def keep(pipeline, index, time, values):
        their_steps.append(values["latents"].clone())
        return values

    _, their_pixels = theirs_drawn(pipeline, REQUEST, noise, callback_on_step_end=keep)
    texts = pipeline.encode_prompt(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative,
        device=CPU,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )
    case = f"{kind}, {prediction}, {SIDE}×{SIDE}"
    reference = f"diffusers {type(pipeline).__name__}"
    agrees("text conditioning", case, cond.tokens, torch.cat(texts[:2]), NETWORK, reference)
    assert len(steps) == len(their_steps) == REQUEST.steps
    for ours, theirs in zip(steps, their_steps, strict=True):
        agrees("pipeline, latents after each of 20 steps", case, ours, theirs, PICTURE, reference)
    agrees("pipeline, pixels", case, pixels, their_pixels, PICTURE, reference)
