"""Small ControlNets for the small Stable Diffusions of `small_sd`, with random weights none of which is zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato.families.sd.controlnet import PREFIX, control_map
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.storage import save_tensors, write_json
from small_sd import UNETS

HINT = (8, 16, 32)  # the small autoencoders have a factor of 4


def config_of(kind: str, **changes) -> ControlNetConfig:
    return replace(ControlNetConfig(replace(UNETS[kind], in_channels=4, time_cond=0), HINT), **changes)


def network(kind: str, seed: int = 9) -> ControlNet:
    torch.manual_seed(seed)
    return ControlNet(config_of(kind)).eval().requires_grad_(False)


def tensors(kind: str, layout: str = "diffusers", seed: int = 9) -> dict[str, Tensor]:
    """Of one file. layout: diffusers, original, or prefixed, which is the original behind `control_model.`"""
    state = network(kind, seed).state_dict()
    if layout == "diffusers":
        return state
    table = control_map(config_of(kind)).within(PREFIX if layout == "prefixed" else "", "")
    return dict(table.to_theirs(state))


def file(
    place: Path, kind: str, layout: str = "diffusers", dtype: torch.dtype | None = None, seed: int = 9
) -> Path:
    made = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors(kind, layout, seed).items()}
    save_tensors(place, made)
    return place


def folder(place: Path, kind: str, seed: int = 9, **said) -> Path:
    """As diffusers writes one: config.json and weights."""
    save_tensors(place / "diffusion_pytorch_model.safetensors", network(kind, seed).state_dict())
    write_json(place / "config.json", {"_class_name": "ControlNetModel", **said})
    return place
