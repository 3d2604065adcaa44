"""transformers' CLIP in small, with random weights, and ours with the same: shared by the tests of parity.

The fixtures that need them stand in `parity/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato.families.sd.keys import clip_map
from sfumato.families.sd.openers import text_encoder
from sfumato.text.clip import ClipConfig, ClipTextEncoder

SMALL_L = ClipConfig(32, 5, 4, "quick_gelu", inner=37)
SMALL_H = ClipConfig(32, 4, 4, "gelu")
SMALL_G = ClipConfig(48, 6, 3, "gelu", projection=40)
PROMPTS = ["a photo of a cat", "An astronaut, riding a (green) horse: 4k", ""]
TIGHT = {"atol": 1e-5, "rtol": 1e-5}
CLOSE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖
KINDS = {"sd1": [SMALL_L], "sd2": [SMALL_H], "sdxl": [SMALL_L, SMALL_G], "sdxl-refiner": [SMALL_G]}


def small_encoder(
    config: ClipConfig,
    theirs: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    name: str = "text encoder",
) -> ClipTextEncoder:
    """Our encoder with tensors in a folder's names, by the tables that a checkpoint is opened with."""
    return text_encoder(config, clip_map(config).to_ours(theirs, name), name, dtype=dtype)
