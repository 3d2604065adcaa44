"""Whole clips of Stable Video Diffusion against diffusers' pipeline, which opens the same folder, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as theirs_module
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sfumato.families.published import folder as published
from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.published.networks import Networks
from sfumato.families.published.openers import blank
from sfumato.families.svd import folder
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS
from sfumato.families.svd.system import AUGMENTING, Config, System, noise_levels, open_system, preset_of
from sfumato.generate import Model
from sfumato.sampling import SeededNoise
from sfumato.types import Motion, Request
from small_svd import SIZE, SMALL, picture, write

BOUND, CLOSE = 1e-4, 1e-5  # of a clip, and of one call
STEPS, FRAMES = 20, 5
CPU = torch.device("cpu")
THEIRS = "diffusers StableVideoDiffusionPipeline"
REQUEST = Request(image=picture(), seed=3, steps=STEPS, frames=FRAMES, size=SIZE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(diffusers' pipeline, our model) of one folder."""
    place = write("svd", tmp_path_factory.mktemp("svd"))
    pipeline = StableVideoDiffusionPipeline.from_pretrained(place)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Model(open_system(place, CPU, torch.float32, systems=SMALL), CPU, "svd")


def ours(model: Model, request: Request) -> list[torch.Tensor]:
    """The latent after each step."""
    seen = []
    model.sample(model.condition(request), request.seeds(), request, lambda step: seen.append(step.x.clone()))
    return seen


def theirs(pipeline, model: Model, request: Request, monkeypatch, **more) -> list[torch.Tensor]:
    """diffusers' latents after each step, from our noise: in the latent, and in the picture before it."""
    width, height = request.size
    shape = model.latent_shape(height, width, request.frames)
    initial = SeededNoise(request.seeds(), shape).initial()
    beside = SeededNoise(request.seeds(), (3, 1, height, width)).initial(AUGMENTING)[:, :, 0]
    monkeypatch.setattr(theirs_module, "randn_tensor", lambda *a, **k: beside.clone())
    motion, seen = request.motion or Motion(), []

    def keep(pipe, step, time, tensors):
        seen.append(tensors["latents"].movedim(2, 1).clone())
        return {}

    pipeline(
        request.image, width=width, height=height, num_frames=request.frames, num_inference_steps=request.steps,
        min_guidance_scale=request.guidance_first, max_guidance_scale=request.guidance, fps=request.fps,
        motion_bucket_id=motion.bucket, noise_aug_strength=motion.augment, latents=initial.movedim(2, 1).clone(),
        output_type="latent", callback_on_step_end=keep, **more,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize(
    "name, changes",
    [
        ("as it stands", {}),
        ("other numbers", {"fps": 12, "motion": Motion(40, 0.2), "guidance_first": 2.0, "guidance": 5.0}),
        ("on end, 8 frames", {"size": (40, 64), "image": picture((40, 64)), "frames": 8, "steps": 6}),
        ("a size that does not halve evenly", {"size": (56, 40), "image": picture((56, 40)), "steps": 6}),
    ],
)
def test_a_clip_is_that_of_the_pipeline_at_every_step(agrees, made, monkeypatch, name, changes):
    pipeline, model = made
    request = model.complete(replace(REQUEST, **changes))
    wanted = theirs(pipeline, model, request, monkeypatch)
    found = ours(model, request)
    assert len(found) == len(wanted) == request.steps
    for number, (mine, other) in enumerate(zip(found, wanted, strict=True), 1):
        if number in (1, request.steps // 2, request.steps):
            agrees(f"pipeline of clips, latents after {number} of {request.steps} steps", f"svd, {name}", mine,
                   other, BOUND, THEIRS)  # fmt: skip
    with torch.no_grad():
        pixels = pipeline.decode_latents(wanted[-1].movedim(1, 2), request.frames, request.frames).clamp(
            -1, 1
        )
    agrees("pipeline of clips, pixels", f"svd, {name}", model.decode_pixels(found[-1]), pixels, BOUND, THEIRS)


def test_what_the_network_is_told_of_the_picture(agrees, made, monkeypatch):
    pipeline, model = made
    request = model.complete(replace(REQUEST, motion=Motion(9, 0.1)))
    cond = model.condition(request)
    with torch.no_grad():
        embedding = pipeline._encode_image(request.image, CPU, 1, True)
    agrees("picture's embedding", "svd", cond.tokens, embedding.flip(0), CLOSE, THEIRS)
    pixels = pipeline.video_processor.preprocess(request.image, height=SIZE[1], width=SIZE[0])
    noise = SeededNoise(request.seeds(), (3, 1, SIZE[1], SIZE[0])).initial(AUGMENTING)[:, :, 0]
    with torch.no_grad():
        latent = pipeline._encode_vae_image(pixels + 0.1 * noise, CPU, 1, True)
    agrees("picture's latent", "svd", cond.channels[:, :, 0], latent.flip(0), CLOSE, THEIRS)
    told = pipeline._get_add_time_ids(request.fps - 1, 9, 0.1, torch.float32, 1, 1, True)
    assert torch.equal(cond.vector, told)


def test_each_clip_of_a_request_is_the_clip_alone(made):
    """To the bit, noise in the picture and all."""
    _, model = made
    request = replace(REQUEST, steps=2, frames=3, count=2)
    together = model.generate(request)
    alone = model.generate(request.part(1))
    assert [f.tobytes() for f in together.clips[1].frames] == [f.tobytes() for f in alone.clips[0].frames]
    assert together.clips[0].frames[0].tobytes() != together.clips[1].frames[0].tobytes()
    assert together.images == () and together.clips[0].fps == 7 and together.clips[0].size == SIZE


@pytest.mark.full
def test_a_clip_of_the_published_size(agrees, monkeypatch):
    """4 frames of 128×128 in three steps: 2.3 billion numbers, which both sides share, 9 GB of them."""
    system = SYSTEMS["svd"]
    torch.manual_seed(0)
    config = published.text_config(system.text[0].config)
    config = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    parts = {
        "unet": UNetSpatioTemporalConditionModel.from_config(folder.unet_config(system.unet, 96, 14)).eval(),
        "vae": AutoencoderKLTemporalDecoder.from_config(published.vae_config(system.vae, 768)).eval(),
        IMAGE_ENCODER: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).eval(),
    }
    processor = published.processor_config(system.text[0].config)
    pipeline = StableVideoDiffusionPipeline(
        **parts,
        scheduler=EulerDiscreteScheduler.from_config(folder.scheduler_config()),
        feature_extractor=CLIPImageProcessor(**processor),
    )
    pipeline.set_progress_bar_config(disable=True)
    networks = {}
    for name, shape in (("unet", system.unet), ("vae", system.vae), (IMAGE_ENCODER, system.text[0].config)):
        networks[name] = blank(shape).eval()
        networks[name].load_state_dict(parts[name].state_dict(), assign=True)
    preset = preset_of(Checkpoint("svd", system, {}))
    ours_ = System(
        config=Config("svd", preset), shapes=system, levels=noise_levels(*folder.SIGMAS), dtype=torch.float32,
        device=CPU, parts={name: network.state_dict() for name, network in networks.items()}, sources={},
        networks=Networks({
            IMAGE_ENCODER: lambda: networks[IMAGE_ENCODER], "denoiser": lambda: networks["unet"],
            "autoencoder": lambda: networks["vae"],
        }),
    )  # fmt: skip
    model = Model(ours_, CPU, "svd")
    request = model.complete(Request(image=picture((128, 128)), seed=3, steps=3, frames=4, size=(128, 128)))
    wanted = theirs(pipeline, model, request, monkeypatch)
    found = ours(model, request)
    for number, (mine, other) in enumerate(zip(found, wanted, strict=True), 1):
        agrees(f"pipeline of clips, latents after {number} of 3 steps", "svd, 4 frames, 128×128", mine, other,
               BOUND, THEIRS)  # fmt: skip
    with torch.no_grad():
        pixels = pipeline.decode_latents(wanted[-1].movedim(1, 2), 4, 4).clamp(-1, 1)
    agrees("pipeline of clips, pixels", "svd, 4 frames, 128×128", model.decode_pixels(found[-1]), pixels, BOUND,
           THEIRS)  # fmt: skip
