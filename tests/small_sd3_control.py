"""Small ControlNets for the small Stable Diffusions 3 of `small_sd3`, with random weights none of which is zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.families.sd3.controlnet import ENTRANCE, control_map
from sfumato.nn.mmdit_control import MMDiTControl, MMDiTControlConfig
from sfumato.storage import save_tensors, write_json
from small_sd3 import TRANSFORMERS

LARGE = "sd3.5-large"


def joint(kind: str = "sd3-medium", layers: int = 2, **more: Any) -> MMDiTControlConfig:
    """As those of InstantX: with an entrance of its own, the prompt's tokens and no pooled text."""
    base = TRANSFORMERS[kind]
    shape = replace(base, layers=layers, dual=tuple(n for n in base.dual if n < layers))
    return MMDiTControlConfig(shape, **more)


def single(layers: int = 2, **more: Any) -> MMDiTControlConfig:
    """As Stability's for the large model: the picture alone, and the base's entrance."""
    shape = replace(TRANSFORMERS[LARGE], layers=layers, qk_norm=False)
    return MMDiTControlConfig(shape, joint=False, zero_pooled=False, shifted=True, **more)


def network(config: MMDiTControlConfig, seed: int = 9) -> MMDiTControl:
    torch.manual_seed(seed)
    made = MMDiTControl(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if weight.ndim == 1:
            weight.normal_(std=0.1).add_("norm_" in name and name.endswith("weight"))
    made.pos_embed.pos_embed.normal_(std=0.5)
    return made


def tensors(config: MMDiTControlConfig, layout: str = "diffusers", seed: int = 9) -> dict[str, Tensor]:
    """Of one file. layout: diffusers, or original as Stability's."""
    state = network(config, seed).state_dict()
    if layout == "original":
        state = dict(control_map(config).to_theirs(state)) | {
            "control_type": torch.tensor(0, dtype=torch.int32)
        }
    if config.joint:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith(ENTRANCE)}


def file(place: Path, config: MMDiTControlConfig, layout: str = "diffusers", seed: int = 9) -> Path:
    save_tensors(place, {name: t.contiguous() for name, t in tensors(config, layout, seed).items()})
    return place


def json_of(config: MMDiTControlConfig) -> dict[str, Any]:
    """`config.json` of diffusers' SD3ControlNetModel."""
    shape = config.blocks
    return {
        "_class_name": "SD3ControlNetModel",
        "sample_size": 16,
        "patch_size": shape.patch,
        "in_channels": shape.channels,
        "num_layers": shape.layers,
        "attention_head_dim": shape.head_width,
        "num_attention_heads": shape.heads,
        "joint_attention_dim": shape.context if config.joint else None,
        "caption_projection_dim": shape.width,
        "pooled_projection_dim": shape.pooled,
        "out_channels": shape.channels,
        "pos_embed_max_size": shape.positions if config.joint else None,
        "pos_embed_type": "sincos" if config.joint else None,
        "use_pos_embed": config.joint,
        "extra_conditioning_channels": config.extra,
        "dual_attention_layers": list(shape.dual),
        "qk_norm": "rms_norm" if shape.qk_norm else None,
        "force_zeros_for_pooled_projection": config.zero_pooled,
    }


def folder(place: Path, config: MMDiTControlConfig, seed: int = 9, **said: Any) -> Path:
    """As diffusers writes one: config.json and weights."""
    file(place / "diffusion_pytorch_model.safetensors", config, seed=seed)
    write_json(place / "config.json", json_of(config) | said)
    return place
