"""A picture of Stable Diffusion 3 Medium's published size against diffusers' pipeline, from a folder of random weights.

The weights are in float16 and both sides compute in float32, one after the other; diffusers' pipeline takes 12 GB. T5
is left out: its encoder alone would take 19 GB.
"""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from helpers import CPU
from sfumato.families.published import folder as published
from sfumato.families.published.openers import blank
from sfumato.families.sd3 import folder
from sfumato.families.sd3.condition import READERS
from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.families.sd3.system import open_system
from sfumato.generate import Model
from sfumato.sampling import SeededNoise
from sfumato.storage import save_tensors, write_json
from sfumato.text.clip_tokens import bundled, save_folder
from sfumato.types import Request
from small_sd3 import one_by_one

pytestmark = pytest.mark.full
KIND, SIDE, STEPS = "sd3-medium", 256, 4
PICTURE, TEXT = 1e-4, 1e-5  # bounds of the steps, and of the text encoders
REQUEST = Request(
    "a small red fox, 4k", negative="blurry", seed=3, steps=STEPS, guidance=5.0, size=(SIDE, SIDE), sampler="euler",
    schedule="flow_match", prompt_rules="none",
)  # fmt: skip
REFERENCE = "diffusers StableDiffusion3Pipeline"


def random_tensors(config: object, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Of one network, in float16, of a size at which its activations stay near 1."""
    made = {}
    for name, tensor in blank(config).state_dict().items():
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        if "embedding" in name or name.endswith("pos_embed.pos_embed"):
            scale = 0.02 if "embedding" in name else 0.5
        values = torch.randn(tensor.shape, generator=generator).mul_(scale)
        gain = tensor.ndim == 1 and name.endswith("weight")
        made[name] = values.add_(1.0 if gain else 0.0).half()
    return made


@pytest.fixture
def place(tmp_path):
    """A diffusers folder without T5, gone after the test."""
    system, generator = SYSTEMS[KIND], torch.Generator().manual_seed(5)
    configs = {"transformer": system.transformer, "vae": system.vae}
    configs |= {part.name: part.config for part in system.text[:2]}
    jsons = {
        "transformer": folder.transformer_config(system.transformer, SIDE // 8),
        "vae": published.vae_config(system.vae, SIDE),
    } | {part.name: published.text_config(part.config) for part in system.text[:2]}
    for name, config in configs.items():
        file = tmp_path / name / f"{published.WEIGHTS[name]}.safetensors"
        save_tensors(file, random_tensors(config, generator))
        write_json(tmp_path / name / published.CONFIG, jsons[name])
    for reader in READERS[:2]:
        save_folder(bundled(reader.pad), tmp_path / published.tokenizer_folder(reader.part))
    write_json(tmp_path / published.SCHEDULER, folder.scheduler_config())
    write_json(tmp_path / published.INDEX, folder.model_index(system, folder.SCHEDULER, configs))
    yield tmp_path
    shutil.rmtree(tmp_path)


@torch.no_grad()
def test_a_picture_of_the_published_size(agrees, place):
    system = open_system(place, CPU, torch.float32, offload="model", without=("t5",))
    model = Model(system, CPU, KIND)
    request = model.complete(REQUEST)
    noise = SeededNoise(request.seeds(), system.latent_shape(1, SIDE, SIDE)).initial()
    cond = model.condition(request)
    steps: list[torch.Tensor] = []
    keep = steps.append
    latent = model.sample(cond, request.seeds(), request, lambda step: keep(step.x[:, :, 0].clone()))
    pixels = model.decode_pixels(latent)[:, :, 0]
    del model, system
    gc.collect()

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        place, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = pipeline.encode_prompt(REQUEST.prompt, None, None, negative_prompt=REQUEST.negative)
    case = f"{KIND} without T5, {SIDE}×{SIDE}"
    agrees("text conditioning", case, one_by_one(cond), torch.cat(texts[:2]), TEXT, REFERENCE)
    agrees("text conditioning, pooled", case, cond.vector, torch.cat(texts[2:]), TEXT, REFERENCE)
    their_steps: list[torch.Tensor] = []

    def kept(pipeline, index, time, values):
        their_steps.append(values["latents"].clone())
        return values

    theirs = pipeline(
        REQUEST.prompt, negative_prompt=REQUEST.negative, width=SIDE, height=SIDE, num_inference_steps=STEPS,
        guidance_scale=REQUEST.guidance, latents=noise[:, :, 0].clone(), output_type="latent",
        callback_on_step_end=kept,
    ).images  # fmt: skip
    assert len(steps) == len(their_steps) == STEPS
    for ours, other in zip(steps, their_steps, strict=True):
        agrees(f"pipeline, latents after each of {STEPS} steps", case, ours, other, PICTURE, REFERENCE)
    vae = pipeline.vae
    wanted = vae.decode(theirs / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
    agrees("pipeline, pixels", case, pixels, wanted, PICTURE, REFERENCE)
