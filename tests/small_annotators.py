"""Tiny networks of transformers that tell depth and poses, with random weights, in folders as it writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)

from sfumato.storage import write_json

SIDE = 32


def dpt(place: Path, seed: int = 0) -> Path:
    config = DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=SIDE, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, is_hybrid=False,
    )  # fmt: skip
    return _saved(DPTForDepthEstimation, config, place, seed)


def depth_anything(place: Path, **more) -> Path:
    """With a processor's file as the published ones have it, but smaller."""
    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8, **more,
    )  # fmt: skip
    _saved(DepthAnythingForDepthEstimation, config, place)
    said = {"size": {"height": 56, "width": 56}, "keep_aspect_ratio": True, "ensure_multiple_of": 14,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}  # fmt: skip
    write_json(place / "preprocessor_config.json", said)
    return place


def vitpose(place: Path) -> Path:
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        out_features=["stage2"],
    )  # fmt: skip
    config = VitPoseConfig(backbone_config=backbone, use_simple_decoder=True, num_labels=17)
    return _saved(VitPoseForPoseEstimation, config, place)


def _saved(kind, config, place: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    kind(config).eval().save_pretrained(place)
    return place
