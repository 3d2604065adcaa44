"""LoRAs against diffusers' `load_lora_weights` on small random models, as a picture's latents after some steps.

Where diffusers is wrong about alpha, `tests/unit/test_adapters_lora.py` holds ours to the formula.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.sampling import SeededNoise
from sfumato.types import Request
from small_sd import SIDE, SMALL, write

pytest.importorskip("peft", reason="diffusers loads no LoRAs without peft")

RANK, ALPHA, WEIGHT, BOUND = 4, 2.0, 0.8, 1e-5
REQUEST = Request("a small red fox", negative="blurry", seed=3, steps=2, guidance=4.0, sampler="euler",
                  schedule="trailing", size=(SIDE, SIDE))  # fmt: skip
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request, tmp_path_factory):
    """(kind, its folder, ours opened)."""
    place = write(request.param, tmp_path_factory.mktemp(request.param) / "model", timestep_spacing="trailing",
                  steps_offset=1, _class_name="EulerDiscreteScheduler")  # fmt: skip
    system = open_system(place, torch.device("cpu"), torch.float32, systems=SMALL)
    return request.param, place, Model(system, torch.device("cpu"), request.param)


def adapter(model: Model, form: str) -> dict[str, Tensor]:
    """Random factors for the attentions, projections and feed-forwards, under a format's names, alike in each."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(11)
    for name, part in model.system.parts.items():
        if name == "vae":
            continue
        targets = TARGETS if name == "unet" else TEXT_TARGETS
        for module in (key.removesuffix(".weight") for key in part if key.endswith(".weight")):
            if not module.endswith(tuple(f".{target}" for target in targets)):
                continue
            rows, columns, *kernel = part.info(f"{module}.weight")[1]
            up = torch.randn(rows, RANK, *kernel, generator=generator) * 0.2
            down = torch.randn(RANK, columns, *kernel, generator=generator) * 0.2
            if form == "kohya":
                both = len(model.system.shapes.text) > 1
                prefix = {
                    "unet": "lora_unet",
                    "text_encoder": "lora_te1" if both else "lora_te",
                    "text_encoder_2": "lora_te2",
                }
                key = f"{prefix[name]}_{module.replace('.', '_')}"
                tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
                tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
            else:
                tensors |= {
                    f"{name}.{module}.lora_B.weight": up * ALPHA / RANK,
                    f"{name}.{module}.lora_A.weight": down,
                }
    return tensors


def drawn(model: Model) -> tuple[Tensor, Tensor]:
    """(initial noise, latents after the steps)."""
    request = model.complete(REQUEST)
    noise = SeededNoise(request.seeds(), model.system.latent_shape(1, SIDE, SIDE)).initial()[:, :, 0]
    return noise, model.sample(model.condition(request), request.seeds(), request)[:, :, 0]


@pytest.mark.parametrize("form", ["kohya", "PEFT"])
def test_a_picture_with_a_lora(agrees, model, tmp_path, form):
    kind, place, ours = model
    save_file(adapter(ours, form), tmp_path / "ink.safetensors")
    noise, plain = drawn(ours)
    ours.attach(tmp_path / "ink.safetensors", WEIGHT)
    _, latents = drawn(ours)
    ours.detach()
    assert torch.equal(drawn(ours)[1], plain)

    pipeline_class = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    options = {} if kind == "sdxl" else {"safety_checker": None}
    pipeline = pipeline_class.from_pretrained(place, **options)
    pipeline.load_lora_weights(tmp_path, weight_name="ink.safetensors", adapter_name="ink")
    pipeline.set_adapters(["ink"], [WEIGHT])
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        REQUEST.prompt,
        negative_prompt=REQUEST.negative,
        width=SIDE,
        height=SIDE,
        num_inference_steps=REQUEST.steps,
        guidance_scale=REQUEST.guidance,
        latents=noise.clone(),
        output_type="latent",
    ).images
    assert (latents - plain).norm() > 0.01 * plain.norm()  # the LoRA does something
    agrees(
        "LoRA, latents after 2 steps",
        f"{kind}, {form}",
        latents,
        theirs,
        BOUND,
        "diffusers load_lora_weights, peft",
    )
