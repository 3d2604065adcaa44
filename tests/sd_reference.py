"""What parity tests take from the references: their networks, tokenizers and schedulers, and whole pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.families.sd import folder
from sfumato.families.sd.shapes import System
from sfumato.generate import Model
from sfumato.nn.controlnet import ControlNetConfig
from sfumato.sampling import SeededNoise, Step
from sfumato.text.clip import ClipConfig
from sfumato.text.clip_tokens import MERGES, bundled
from sfumato.text.windows import LENGTH
from sfumato.types import Request
from small_sd import SIDE

EULER = {**folder.BETAS, "timestep_spacing": "trailing", "steps_offset": 1}


def tokenizer(pad: str) -> CLIPTokenizer:
    """transformers' own, of the vocabulary that comes with the package."""
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").split("\n")[1:] if line]
    vocabulary = bundled()._tokenizer.get_vocab()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=LENGTH)


def text_module(config: ClipConfig) -> torch.nn.Module:
    settings = folder.text_config(config)
    settings.pop("architectures")
    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    return kind(CLIPTextConfig(**settings)).eval()


def part_of(system: System, name: str, size: int = SIDE) -> torch.nn.Module:
    """One network of a kind with random weights, as diffusers and transformers make it. size: pixels per side."""
    if name == "unet":
        made = UNet2DConditionModel.from_config(folder.unet_config(system.unet, size // system.vae.factor))
    elif name == "vae":
        made = AutoencoderKL.from_config(folder.vae_config(system.vae, size))
    else:
        made = text_module(next(part.config for part in system.text if part.name == name))
    return made.eval()


def control_reference(config: ControlNetConfig) -> torch.nn.Module:
    """diffusers' ControlNet of that shape."""
    unet = config.unet
    extra: dict[str, Any] = {}
    if unet.vector:
        each = 256 if unet.vector > 1000 else 8
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": each,
            "projection_class_embeddings_input_dim": unet.vector,
        }
    return ControlNetModel(
        in_channels=unet.in_channels,
        block_out_channels=unet.channels,
        layers_per_block=unet.resnets,
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in unet.depths),
        transformer_layers_per_block=(*(d or 1 for d in unet.depths[:-1]), unet.mid_depth),
        attention_head_dim=unet.heads,
        cross_attention_dim=unet.context,
        use_linear_projection=unet.linear,
        norm_num_groups=unet.groups,
        conditioning_embedding_out_channels=config.hint_channels,
        global_pool_conditions=config.pooled,
        controlnet_conditioning_channel_order="bgr" if config.bgr else "rgb",
        **extra,
    ).eval()


def names_of(system: System) -> tuple[str, ...]:
    return ("unet", "vae", *(part.name for part in system.text))


def write_jsons(place: Path, kind: str, system: System, prediction: str = "epsilon") -> None:
    """What a diffusers folder holds beside its networks."""
    scheduler = folder.scheduler_config(kind, prediction)
    (place / "scheduler").mkdir()
    (place / folder.SCHEDULER).write_text(json.dumps(scheduler))
    index = folder.model_index(kind, system, scheduler["_class_name"])
    (place / folder.INDEX).write_text(json.dumps(index))


def euler(prediction: str = "epsilon") -> EulerDiscreteScheduler:
    kind = "v_prediction" if prediction == "v" else "epsilon"
    return EulerDiscreteScheduler(**EULER, prediction_type=kind)


def drawn(
    model: Model, request: Request, steps: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(initial noise, latents, pixels) of ours; the latents after each step are added to `steps`."""
    request = model.complete(request)
    shape = model.system.autoencoder.latent_shape(1, request.size[1], request.size[0])
    noise = SeededNoise(request.seeds(), shape).initial()

    def keep(step: Step) -> None:
        if steps is not None:
            steps.append(step.x[:, :, 0].clone())

    latent = model.sample(model.condition(request), request.seeds(), request, on_step=keep)
    return noise[:, :, 0], latent[:, :, 0], model.decode_pixels(latent)[:, :, 0]


def theirs_drawn(
    pipeline, request: Request, noise: torch.Tensor, **more
) -> tuple[torch.Tensor, torch.Tensor]:
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        request.prompt,
        negative_prompt=request.negative,
        width=request.size[0],
        height=request.size[1],
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        latents=noise.clone(),
        output_type="latent",
        **more,
    ).images
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    return latents, pixels
