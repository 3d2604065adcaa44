"""Whole pictures of Stable Diffusion 3 against diffusers' pipelines, which open the same folder, step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3 import (
    pipeline_stable_diffusion_3_img2img as of_image,
)
from diffusers.pipelines.stable_diffusion_3 import (
    pipeline_stable_diffusion_3_inpaint as of_mask,
)
from PIL import Image
from transformers import PreTrainedTokenizerFast

from sfumato.drawing.sample import origin_of
from sfumato.families.sd3.system import open_system
from sfumato.generate import Model
from sfumato.sampling import SeededNoise
from sfumato.tasks import canvas as tasks
from sfumato.types import Inpaint, Request, SkipLayers
from small_sd3 import SIDE, SMALL, write

STEPS, BOUND, CLOSE = 20, 1e-4, 1e-5  # bounds of a picture, and of one call
CPU = torch.device("cpu")
KINDS = ["sd3-medium", "sd3.5-medium", "sd3.5-large"]
REQUEST = Request(
    "a red metal sphere behind the small blue cube", negative="blurry low quality", seed=3, steps=STEPS, guidance=5.0,
    size=(SIDE, SIDE + 32), sampler="euler", schedule="flow_match", prompt_rules="none",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind → (diffusers' pipeline, our model) of one folder."""
    known = {}

    def make(kind: str):
        if kind not in known:
            place = write(kind, tmp_path_factory.mktemp(kind))
            t5 = PreTrainedTokenizerFast(
                tokenizer_file=str(place / "tokenizer_3" / "tokenizer.json"),
                pad_token="<pad>",
                eos_token="</s>",
            )
            pipeline = StableDiffusion3Pipeline.from_pretrained(place, tokenizer_3=t5)
            pipeline.set_progress_bar_config(disable=True)
            system = open_system(place, CPU, torch.float32, systems=SMALL)
            known[kind] = pipeline, Model(system, CPU, kind)
        return known[kind]

    return make


def noise_of(model: Model, request: Request) -> torch.Tensor:
    shape = model.system.latent_shape(1, request.size[1], request.size[0])
    return SeededNoise(request.seeds(), shape).initial()[:, :, 0]


def ours(model: Model, request: Request, origin=None) -> list[torch.Tensor]:
    """The latent after each step."""
    seen = []
    cond = model.condition(request)
    model.sample(cond, request.seeds(), request, lambda step: seen.append(step.x[:, :, 0].clone()), origin)
    return seen


def theirs(pipeline, request: Request, noise: torch.Tensor | None, **more) -> list[torch.Tensor]:
    seen = []

    def keep(pipe, step, time, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    latents = {} if noise is None else {"latents": noise.clone()}
    pipeline(
        request.prompt, negative_prompt=request.negative, width=request.size[0], height=request.size[1],
        num_inference_steps=request.steps, guidance_scale=request.guidance, output_type="latent",
        callback_on_step_end=keep, **latents, **more,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_that_of_the_pipeline_at_every_step(agrees, made, kind):
    pipeline, model = made(kind)
    request = model.complete(REQUEST)
    wanted = theirs(pipeline, request, noise_of(model, request))
    found = ours(model, request)
    assert len(found) == len(wanted) == STEPS
    for number, (mine, other) in enumerate(zip(found, wanted, strict=True), 1):
        if number in (1, STEPS // 2, STEPS):
            agrees(
                f"pipeline, latents after {number} of {STEPS} steps", kind, mine, other, BOUND,
                "diffusers StableDiffusion3Pipeline",
            )  # fmt: skip
    vae = pipeline.vae
    with torch.no_grad():
        latents = wanted[-1] / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(latents).sample.clamp(-1, 1)
    mine = model.decode_pixels(found[-1][:, :, None])[:, :, 0]
    agrees("pipeline, pixels", kind, mine, pixels, BOUND, "diffusers StableDiffusion3Pipeline")


def test_a_picture_without_t5_and_with_layers_left_out(agrees, made, tmp_path):
    pipeline, _ = made("sd3.5-medium")
    place = write("sd3.5-medium", tmp_path / "model")
    system = open_system(place, CPU, torch.float32, systems=SMALL, without=("t5",))
    model = Model(system, CPU, "without")
    request = model.complete(replace(REQUEST, skip_layers=SkipLayers((1, 2), 2.0, (0.0, 0.5))))
    kept, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    try:
        wanted = theirs(
            pipeline, request, noise_of(model, request), skip_guidance_layers=[1, 2], skip_layer_guidance_scale=2.0,
            skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5,
        )  # fmt: skip
    finally:
        pipeline.text_encoder_3 = kept
    agrees(
        "pipeline, latents after 20 steps", "sd3.5-medium without T5, layers 1 and 2 skipped", ours(model, request)[-1],
        wanted[-1], BOUND, "diffusers StableDiffusion3Pipeline",
    )  # fmt: skip


def test_the_autoencoder_s_latent_is_moved_and_scaled(agrees, made):
    pipeline, model = made("sd3-medium")
    picture = random_picture((SIDE, SIDE))
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mode = pipeline.vae.encode(pixels).latent_dist.mode()
    wanted = (mode - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    agrees("autoencoder of 16 channels", "encoded", model.encode(picture)[:, :, 0], wanted, CLOSE,
           "diffusers AutoencoderKL")  # fmt: skip


def random_picture(size: tuple[int, int]) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def drawn_as_ours(monkeypatch):
    """Has diffusers' pipelines begin with a given noise, and take the middle of what the autoencoder answers."""

    def draw(noise: torch.Tensor) -> None:
        for module in (of_image, of_mask):
            monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise.clone())
            monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **k: encoded.latent_dist.mode())

    return draw


def components(pipeline) -> dict:
    return {
        name: part
        for name, part in pipeline.components.items()
        if not name.startswith(("image_enc", "feature"))
    }


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_a_picture_from_a_picture(agrees, made, drawn_as_ours, strength):
    pipeline, model = made("sd3-medium")
    picture = random_picture((SIDE, SIDE))
    request = model.complete(replace(REQUEST, size=(SIDE, SIDE), image=picture, strength=strength))
    noise = noise_of(model, request)
    drawn_as_ours(noise)
    other = StableDiffusion3Img2ImgPipeline(**components(pipeline))
    other.set_progress_bar_config(disable=True)
    wanted = theirs(other, request, None, image=picture, strength=strength)
    found = ours(model, request, origin_of(model, tasks.canvas(request), request))
    assert len(found) == len(wanted)
    agrees("image to image, latents", f"sd3-medium, strength {strength}", found[-1], wanted[-1], BOUND,
           "diffusers StableDiffusion3Img2ImgPipeline")  # fmt: skip


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_mask_of_a_model_that_was_not_trained_for_one(agrees, made, drawn_as_ours, strength):
    pipeline, model = made("sd3.5-medium")
    picture = random_picture((SIDE, SIDE))
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (16, 8, 48, 40))
    request = model.complete(
        replace(
            REQUEST, size=(SIDE, SIDE), image=picture, mask=mask, strength=strength, inpaint=Inpaint(blur=0)
        )
    )
    noise = noise_of(model, request)
    drawn_as_ours(noise)
    other = StableDiffusion3InpaintPipeline(**components(pipeline))
    other.set_progress_bar_config(disable=True)
    wanted = theirs(other, request, None, image=picture, mask_image=mask, strength=strength)
    found = ours(model, request, origin_of(model, tasks.canvas(request), request))
    agrees("inpainting, latents", f"sd3.5-medium, strength {strength}", found[-1], wanted[-1], BOUND,
           "diffusers StableDiffusion3InpaintPipeline")  # fmt: skip
    result = model.generate(request)
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(result.images[0])[outside], np.asarray(picture)[outside])
    assert (np.asarray(result.images[0]) != np.asarray(picture)).any()
