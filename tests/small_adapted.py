"""A small Stable Diffusion with a LoRA and a ControlNet beside it, as files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import small_control
import small_sd

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
RANK, WIDTH = 4, 64


def write(place: Path) -> tuple[Path, Path, Path]:
    """The folder of the checkpoint, the file of the LoRA, and the folder of the ControlNet."""
    generator = torch.Generator().manual_seed(1)
    name = "lora_unet_" + MODULE.replace(".", "_")
    ink = place / "ink.safetensors"
    tensors = {
        f"{name}.lora_up.weight": torch.randn(WIDTH, RANK, generator=generator),
        f"{name}.lora_down.weight": torch.randn(RANK, WIDTH, generator=generator),
        f"{name}.alpha": torch.tensor(float(RANK)),
    }
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, ink)
    return small_sd.write("sd1", place / "sd1"), ink, small_control.folder(place / "canny", "sd1")
