"""In which precision a CPU multiplies numbers that are kept in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.runtime import bfloat16_is_fast

NARROW = (torch.bfloat16, torch.float16)


def products_are_fast(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that multiplies it faster than float32, with oneDNN to do it."""
    return (
        x.device.type == "cpu" and x.dtype == torch.bfloat16 and onednn_is_available() and bfloat16_is_fast()
    )


def products_are_widened(x: Tensor) -> bool:
    """Whether x has 16 bits, on a CPU that does better to multiply it as float32: its memory, float32's speed."""
    return x.device.type == "cpu" and x.dtype in NARROW and not products_are_fast(x)


def onednn_is_available() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
