"""What surrounds a prompt, against diffusers: learnt words, sizes and crops, the refiner, folders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import save_file

from sfumato.families.published.convert import write_file, write_folder
from sfumato.families.sd import folder
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.sampling import SeededNoise
from sfumato.text.clip import EOS
from sfumato.types import Micro, Request
from small_sd import SIDE, SMALL, write

CPU = torch.device("cpu")
SCHEDULER = {**folder.BETAS, "timestep_spacing": "trailing"}
REQUEST = Request("a small red fox, 4k", negative="blurry", seed=3, steps=10, guidance=6.0, sampler="euler",
                  schedule="trailing", size=(SIDE, SIDE + 32))  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """kind → the folder of a small model with random weights."""
    known = {}

    def place(kind: str):
        if kind not in known:
            known[kind] = write(kind, tmp_path_factory.mktemp(kind) / "model")
        return known[kind]

    return place


def ours(place, refiner=None, **options) -> Model:
    second = None if refiner is None else ours(refiner)
    system = open_system(place, CPU, torch.float32, systems=SMALL, **options)
    return Model(system, CPU, str(place), refiner=second)


def theirs(place, **more) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(place, local_files_only=True, **more)
    pipeline.scheduler = EulerDiscreteScheduler(**SCHEDULER, steps_offset=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(model: Model, request: Request) -> torch.Tensor:
    shape = model.system.autoencoder.latent_shape(1, request.size[1], request.size[0])
    return SeededNoise(request.seeds(), shape).initial()[:, :, 0]


def drawn(model: Model, request: Request) -> torch.Tensor:
    request = model.complete(request)
    return model.sample(model.condition(request), request.seeds(), request)[:, :, 0]


def asked(request: Request, **more):
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "output_type": "latent",
        **more,
    }


def sized(request: Request) -> dict[str, int]:
    return {"width": request.size[0], "height": request.size[1]}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- textual inversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_learnt_word_draws_what_it_draws_in_diffusers(places, tmp_path, kind):
    draw = torch.Generator().manual_seed(1)
    narrow, wide = torch.randn(2, 32, generator=draw) * 0.05, torch.randn(2, 48, generator=draw) * 0.05
    pipeline, file = theirs(places(kind)), tmp_path / "any.safetensors"
    if kind == "sd1":
        save_file({"emb_params": narrow}, file)
        pipeline.load_textual_inversion(narrow, token="<fox>")
    else:
        save_file({"clip_l": narrow, "clip_g": wide}, file)
        # by the old end mark of published configs, 2, transformers takes the largest id for the end: the new word
        for module in pipeline.text_encoder_2.modules():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = EOS
        for vectors, end in ((narrow, ""), (wide, "_2")):
            pipeline.load_textual_inversion(
                vectors,
                token="<fox>",
                tokenizer=getattr(pipeline, f"tokenizer{end}"),
                text_encoder=getattr(pipeline, f"text_encoder{end}"),
            )
    request = replace(REQUEST, prompt="a small <fox> on a hill", steps=4)
    model = ours(places(kind), embeddings={"<fox>": file})
    expected = pipeline(**asked(request, **sized(request)), latents=noise_of(model, request)).images
    assert apart(drawn(model, request), expected) < 1e-4
    assert apart(drawn(ours(places(kind)), request), expected) > 1e-3  # without it the word means nothing


# --- sizes and crops -----------------------------------------------------------------------------------------------


def test_sizes_and_crops_of_sdxl(places):
    micro = Micro((4096, 2048), (16, 64), (128, 96), None, (512, 256), (3, 7), (1024, 512))
    request = replace(REQUEST, steps=4, micro=micro)
    model, pipeline = ours(places("sdxl")), theirs(places("sdxl"))
    told = {
        "original_size": (2048, 4096),
        "crops_coords_top_left": (64, 16),
        "target_size": (96, 128),
        "negative_original_size": (256, 512),
        "negative_crops_coords_top_left": (7, 3),
        "negative_target_size": (512, 1024),
    }
    latents = noise_of(model, request)
    expected = pipeline(**asked(request, **sized(request)), **told, latents=latents.clone()).images
    assert apart(drawn(model, request), expected) < 1e-4
    assert apart(drawn(model, replace(request, micro=None)), expected) > 1e-4
    # what only the prompt is told holds for the negative too
    half = replace(request, micro=Micro((4096, 2048), (16, 64), (128, 96)))
    told = {name: value for name, value in told.items() if not name.startswith("negative")}
    expected = pipeline(**asked(half, **sized(half)), **told, latents=latents.clone()).images
    assert apart(drawn(model, half), expected) < 1e-4


# --- base and refiner ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, pytest.param(0.55, marks=pytest.mark.full)])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_refiner_takes_over_as_between_two_pipelines(places, sampler, share):
    """diffusers hands the latent over at `denoising_end`, and its second scheduler remembers nothing of the first."""
    request = replace(REQUEST, sampler=sampler, refine_at=share)
    model = ours(places("sdxl"), places("sdxl-refiner"))
    base, refiner = theirs(places("sdxl")), theirs(places("sdxl-refiner"))
    noise = noise_of(model, request)
    if sampler == "dpmpp_2m":  # on VP, where noise of deviation 1 is sigma_max here
        base.scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
        refiner.scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
        top = model.system.levels.sigma_max
        noise = noise * top / (1 + top**2) ** 0.5
    latents = base(**asked(request, **sized(request)), latents=noise, denoising_end=share).images
    expected = refiner(**asked(request), image=latents, denoising_start=share).images
    heard = []
    request = model.complete(request)
    found = model.sample(
        model.condition(request),
        request.seeds(),
        request,
        lambda step: heard.append((step.index, step.total)),
    )
    assert apart(found[:, :, 0], expected) < 1e-4
    assert heard == [(k, 10) for k in range(10)]
    assert apart(drawn(ours(places("sdxl")), replace(request, refine_at=None)), expected) > 1e-2


def test_the_refiner_s_own_numbers(places):
    """Aesthetic scores and sizes of a refiner that draws all of a picture."""
    micro = Micro((4096, 2048), (16, 64), aesthetic=7.5, negative_aesthetic=1.5)
    request = replace(REQUEST, refine_at=0.0, micro=micro)
    model = ours(places("sdxl"), places("sdxl-refiner"))
    pipeline = theirs(places("sdxl-refiner"))
    noise = noise_of(model, request) * model.system.levels.sigma_max
    expected = pipeline(
        **asked(request), image=noise, denoising_start=1e-4, aesthetic_score=7.5, negative_aesthetic_score=1.5,
        original_size=(2048, 4096), crops_coords_top_left=(64, 16), negative_crops_coords_top_left=(64, 16),
    ).images  # fmt: skip
    assert apart(drawn(model, request), expected) < 1e-4


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_opens_a_converted_folder_and_draws_the_same(places, tmp_path, kind):
    """From a single file, which has no tokenizer: what the folder needs beside the weights is written with it."""
    write_file(open_checkpoint(places(kind), systems=SMALL), tmp_path / "one.safetensors")
    write_folder(open_checkpoint(tmp_path / "one.safetensors", systems=SMALL), tmp_path / "folder")
    pipeline = theirs(tmp_path / "folder")
    assert isinstance(pipeline, StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline)
    request = replace(REQUEST, prompt="a small red fox, 4k, émile's", steps=3)
    model = ours(tmp_path / "folder")
    expected = pipeline(**asked(request, **sized(request)), latents=noise_of(model, request)).images
    assert apart(drawn(model, request), expected) < 1e-4
    assert apart(drawn(ours(tmp_path / "one.safetensors"), request), expected) < 1e-4
