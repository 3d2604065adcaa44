"""CLIP's text encoders in small, which several tests of parity share; `parity/conftest.py` has the fixtures."""

from __future__ import annotations

from sfumato.families.published.keys import clip_map
from sfumato.families.published.text import open_clip
from sfumato.text.clip import ClipConfig

SMALL_L = ClipConfig(32, 5, 4, "quick_gelu", inner=37)
SMALL_H = ClipConfig(32, 4, 4, "gelu")
SMALL_G = ClipConfig(48, 6, 3, "gelu", projection=40)
PROMPTS = ["a photo of a cat", "An astronaut, riding a (green) horse: 4k", ""]
TIGHT = {"atol": 1e-5, "rtol": 1e-5}
CLOSE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖
KINDS = {"sd1": [SMALL_L], "sd2": [SMALL_H], "sdxl": [SMALL_L, SMALL_G], "sdxl-refiner": [SMALL_G]}


def opened(config, state, dtype=None, name="text encoder"):
    """Our encoder with the weights of a file under transformers' names."""
    return open_clip(config, clip_map(config).to_ours(state, name), name, dtype)
