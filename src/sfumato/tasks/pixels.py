"""Pictures as networks see them: float32 in [-1, 1], channels first, one frame."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image) -> Tensor:
    """A picture → float32 (3, 1, H, W) in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1)[:, None] / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, 1, H, W) in [-1, 1] → a picture."""
    array = (pixels[:, 0].float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
