"""Whole pictures against diffusers' pipelines: small random models of every kind, from one folder, step by step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from helpers import relative_error
from sd_reference import EULER, drawn, euler, names_of, part_of, theirs_drawn, tokenizer, write_jsons
from sfumato.diffusion.schedules import sigmas_for
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.types import Request
from small_sd import SIDE, SMALL

STEPS = 20
PICTURE, NETWORK = 1e-4, 1e-5  # bounds of 20 steps, and of one call


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind, prediction → (diffusers' parts, our model of the folder they were saved in)."""
    known: dict[tuple[str, str], tuple[dict[str, torch.nn.Module], Model]] = {}

    def make(kind: str, prediction: str = "epsilon"):
        if (kind, prediction) not in known:
            place = tmp_path_factory.mktemp(kind)
            torch.manual_seed(5)
            parts = {name: part_of(SMALL[kind], name) for name in names_of(SMALL[kind])}
            for name, part in parts.items():
                part.save_pretrained(place / name)
            write_jsons(place, kind, SMALL[kind], prediction)
            system = open_system(place, torch.device("cpu"), torch.float32, systems=SMALL)
            known[kind, prediction] = parts, Model(system, torch.device("cpu"), kind)
        return known[kind, prediction]

    return make


REQUEST = Request("a (small) red fox, 4k", negative="blurry", seed=3, steps=STEPS, guidance=6.0, sampler="euler",
                  schedule="trailing", size=(SIDE, SIDE + 32))  # fmt: skip
# brackets are text to diffusers, so its prompt goes without the weight that they give in ours
PLAIN = replace(REQUEST, prompt="a small red fox, 4k")


@pytest.mark.parametrize(("kind", "prediction"), [("sd1", "epsilon"), ("sd2", "epsilon"), ("sd2", "v")])
def test_a_picture_of_sd_1_and_2(agrees, made, kind, prediction):
    parts, model = made(kind, prediction)
    noise, latents, pixels = drawn(model, PLAIN)
    pad = "!" if kind == "sd2" else "<|endoftext|>"
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer(pad),
        scheduler=euler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    their_latents, their_pixels = theirs_drawn(pipeline, PLAIN, noise)
    case = f"{kind}, {prediction}"
    agrees(
        "pipeline, latents after 20 steps",
        case,
        latents,
        their_latents,
        PICTURE,
        "diffusers StableDiffusionPipeline",
    )
    agrees("pipeline, pixels", case, pixels, their_pixels, PICTURE, "diffusers StableDiffusionPipeline")


@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_a_picture_of_sdxl(agrees, made, negative):
    """Its sizes and crops, pooled text, the second encoder, and what no negative prompt is."""
    parts, model = made("sdxl")
    request = replace(PLAIN, negative=negative)
    noise, latents, pixels = drawn(model, request)
    pipeline = StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer("<|endoftext|>"),
        tokenizer_2=tokenizer("!"),
        scheduler=euler(),
        add_watermarker=False,
    )
    their_latents, their_pixels = theirs_drawn(pipeline, request, noise)
    case = f"sdxl, negative {negative!r}"
    agrees(
        "pipeline, latents after 20 steps",
        case,
        latents,
        their_latents,
        PICTURE,
        "diffusers StableDiffusionXLPipeline",
    )
    agrees("pipeline, pixels", case, pixels, their_pixels, PICTURE, "diffusers StableDiffusionXLPipeline")


def test_ddim_steps_of_sd_1(agrees, made):
    parts, model = made("sd1")
    request = replace(PLAIN, sampler="ddim")
    noise, latents, _ = drawn(model, request)
    scheduler = DDIMScheduler(
        **{k: v for k, v in EULER.items() if k != "steps_offset"},
        clip_sample=False,
        set_alpha_to_one=True,
    )
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer("<|endoftext|>"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # VP and VE differ by a factor: noise of deviation 1 there is sigma_max here
    top = float(model.system.levels.sigmas[-1])
    scaled = noise * top / (1 + top**2) ** 0.5
    their_latents, _ = theirs_drawn(pipeline, request, scaled)
    agrees("pipeline, latents after 20 steps", "sd1, ddim", latents, their_latents, PICTURE,
           "diffusers StableDiffusionPipeline")  # fmt: skip


def test_an_inpainting_network_sees_mask_and_masked_picture(agrees, made):
    """The nine channels, against diffusers' pipeline; outside the mask the pixels are the input's own."""
    from PIL import Image

    parts, model = made("sd1-inpaint")
    random = np.random.default_rng(0)
    size = (SIDE, SIDE)
    picture = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    mask = Image.new("L", size, 0)
    mask.paste(255, (16, 8, 48, 40))
    request = replace(PLAIN, size=size, image=picture, mask=mask, strength=1.0)
    result = model.generate(request)
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(result.images[0])[outside], np.asarray(picture)[outside])

    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    holes = torch.from_numpy(outside == 0)[None, None, None].float()
    channels = model.system.inpaint_channels(pixels * (1 - holes), holes)[:, :, 0]
    pipeline = StableDiffusionInpaintPipeline(
        **parts,
        tokenizer=tokenizer("<|endoftext|>"),
        scheduler=euler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    their_mask, _ = pipeline.prepare_mask_latents(
        holes[:, :, 0], (pixels * (1 - holes))[:, :, 0], 1, SIDE, SIDE, torch.float32, torch.device("cpu"),
        torch.Generator().manual_seed(0), False,
    )  # fmt: skip
    with torch.no_grad():
        posterior = parts["vae"].encode((pixels * (1 - holes))[:, :, 0]).latent_dist
    expected = torch.cat([their_mask, posterior.mode() * parts["vae"].config.scaling_factor], dim=1)
    agrees("channels of inpainting", "sd1-inpaint", channels, expected, NETWORK,
           "diffusers StableDiffusionInpaintPipeline")  # fmt: skip


def test_one_step_of_the_refiner(agrees, made):
    """Its five numbers with the aesthetic scores, against diffusers' own conditioning and U-Net."""
    parts, model = made("sdxl-refiner")
    request = model.complete(PLAIN)
    cond = model.condition(request)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        **parts,
        text_encoder=None,
        tokenizer=None,
        tokenizer_2=tokenizer("!"),
        scheduler=euler(),
        add_watermarker=False,
        requires_aesthetics_score=True,
    )
    with torch.no_grad():
        wanted, unwanted, pooled, unpooled = pipeline.encode_prompt(
            request.prompt, negative_prompt=request.negative, do_classifier_free_guidance=True
        )
        size = (request.size[1], request.size[0])
        ids, negative_ids = pipeline._get_add_time_ids(
            size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, torch.float32,
            text_encoder_projection_dim=48,
        )  # fmt: skip
        x = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
        told = {"text_embeds": torch.cat([pooled, unpooled]), "time_ids": torch.cat([ids, negative_ids])}
        theirs = parts["unet"](x, 333.0, torch.cat([wanted, unwanted]), added_cond_kwargs=told).sample
        ours = model.system.network(x[:, :, None], torch.tensor(333.0), cond)[:, :, 0]
    agrees("conditioning and U-Net, one step", "sdxl-refiner", ours, theirs, NETWORK,
           "diffusers StableDiffusionXLImg2ImgPipeline")  # fmt: skip


def test_every_other_step_of_sd_1_takes_deep_features(agrees, made):
    """The loop of DeepCache by hand: whole steps are those of diffusers' U-Net, which also gives the features."""
    parts, model = made("sd1")
    request = model.complete(replace(PLAIN, steps=6, reuse=2))
    unet, system = parts["unet"], model.system
    kept: list[torch.Tensor] = []
    resnet = unet.up_blocks[-1].resnets[-2]  # takes the features joined to a skip of the finest level
    width = unet.config.block_out_channels[0]
    handle = resnet.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, :-width]))
    noise, latents, _ = drawn(model, request)
    cond = model.condition(request)
    sigmas = sigmas_for(request.schedule, request.steps, system.levels)
    x = noise * float(sigmas[0])
    with torch.no_grad():
        for step, (sigma, following) in enumerate(pairwise(map(float, sigmas))):
            time = system.levels.time(torch.tensor([sigma], dtype=torch.float64)).float()
            given = torch.cat([x, x]) / (1 + sigma**2) ** 0.5
            if step % 2 == 0:
                eps = unet(given, time, cond.tokens).sample
            else:
                eps, _ = system.denoiser.forward_with_deep(given, time, cond.tokens, deep=kept[-1])
            wanted, unwanted = eps.chunk(2)
            x = x + (following - sigma) * (unwanted + request.guidance * (wanted - unwanted))
    handle.remove()
    assert len(kept) == 3
    agrees(
        "pipeline, every other step reused",
        "sd1, 6 steps",
        latents,
        x,
        PICTURE,
        "diffusers UNet2DConditionModel",
    )
    _, exact, _ = drawn(model, replace(request, reuse=None))
    assert relative_error(exact, latents) > 1e-3
