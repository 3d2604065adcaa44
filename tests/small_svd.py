"""Stable Video Diffusion small, with random weights: whole diffusers folders, and single files with all that lies
there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from sfumato.autoencoder.temporal import build
from sfumato.families.published import folder as published
from sfumato.families.published.openers import blank
from sfumato.families.svd import folder, keys
from sfumato.families.svd.family import FAMILY
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS, System
from sfumato.families.svd.system import open_system
from sfumato.generate import Model
from sfumato.nn.spacetime import SpaceTimeConfig, SpaceTimeUNet
from sfumato.storage import save_tensors, write_json
from sfumato.text.vision import ClipVisionConfig, ClipVisionEncoder
from sfumato.types import Clip, Request

SIZE = (64, 48)  # pixels; the small autoencoder has a factor of 4
VISION = ClipVisionConfig(
    width=32, layers=2, heads=2, inner=64, patch=56, size=224, projection=24, activation="gelu"
)
UNET = SpaceTimeConfig(
    channels=(32, 64, 64), depths=(1, 1, 0), heads=(2, 4, 4), context=24, waves=16, level_eps=1e-6
)


def small(kind: str) -> System:
    system = SYSTEMS[kind]
    text = tuple(replace(part, config=VISION) for part in system.text)
    vae = replace(system.vae, widths=(32, 64, 64))
    return replace(system, unet=UNET, vae=vae, text=text, size=SIZE[0], shape=SIZE)


SMALL = {kind: small(kind) for kind in SYSTEMS}


def shaken(network: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors, of which none is zero or one throughout."""
    for name, weight in network.named_parameters():
        if weight.ndim == 1 and "embedding" not in name:
            weight.data.add_(torch.randn_like(weight) * 0.2)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def tensors_of(seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    """Part to its tensors, random, under the names of a diffusers folder."""
    torch.manual_seed(seed)
    return {
        "unet": shaken(SpaceTimeUNet(UNET)),
        "vae": shaken(build(SMALL["svd"].vae)),
        IMAGE_ENCODER: shaken(ClipVisionEncoder(VISION)),
    }


def write(kind: str, place: Path, seed: int = 5, frames: int | None = None, **scheduler: object) -> Path:
    """A diffusers folder of the small kind. `scheduler`: more of its scheduler's JSON."""
    system = SMALL[kind]
    configs = {
        "unet": folder.unet_config(system.unet, SIZE[0] // 4, frames or SYSTEMS[kind].frames),
        "vae": published.vae_config(system.vae, system.size),
        IMAGE_ENCODER: published.text_config(VISION),
    }
    for name, tensors in tensors_of(seed).items():
        save_tensors(place / name / f"{published.WEIGHTS[name]}.safetensors", tensors)
        write_json(place / name / published.CONFIG, configs[name])
    write_json(place / "feature_extractor" / published.PROCESSOR, published.processor_config(VISION))
    write_json(place / published.SCHEDULER, folder.scheduler_config() | scheduler)
    write_json(place / published.INDEX, folder.model_index(system, folder.SCHEDULER))
    return place


def original(kind: str = "svd", seed: int = 5) -> dict[str, torch.Tensor]:
    """The tensors of a single file as training wrote it: two autoencoders, and what is left of CLIP's texts."""
    system, parts = SMALL[kind], tensors_of(seed)
    ours = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    file = dict(FAMILY.file_map(system).to_theirs(ours))
    torch.manual_seed(seed + 1)
    other = blank(replace(system.vae, temporal=False, use_post_quant_conv=True)).state_dict()
    spare = keys.vae_map(replace(system.vae, temporal=False, use_post_quant_conv=True)).to_theirs(
        {name: torch.randn(tensor.shape) for name, tensor in other.items()}
    )
    for name, tensor in spare.items():
        if name.startswith(("decoder.", "post_quant_conv.")):
            file[f"{keys.CONDITIONER}{name}"] = tensor
        elif name.startswith("encoder."):
            file[f"first_stage_model.{name}"] = tensor
    clip = f"{keys.CLIP}model."
    file |= {
        f"{clip}positional_embedding": torch.randn(77, 16),
        f"{clip}text_projection": torch.randn(16, 16),
        f"{clip}logit_scale": torch.tensor(4.6),
        f"{clip}token_embedding.weight": torch.randn(20, 16),
        f"{clip}ln_final.weight": torch.randn(16),
        f"{clip}ln_final.bias": torch.randn(16),
    }
    return {name: tensor.contiguous() for name, tensor in file.items()}


def picture(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


CPU = torch.device("cpu")
REQUEST = Request(image=picture(), seed=3, steps=2, frames=3)


def opened(path: Path, dtype: torch.dtype = torch.float32, **options) -> Model:
    return Model(open_system(path, CPU, dtype, systems=SMALL, **options), CPU, "small")


def sampled(model: Model, request: Request = REQUEST) -> torch.Tensor:
    request = model.complete(request)
    return model.sample(model.condition(request), request.seeds(), request)


def frames_of(count: int = 3, size: tuple[int, int] = SIZE) -> Clip:
    return Clip(tuple(picture(size, seed) for seed in range(count)), 12.0)
