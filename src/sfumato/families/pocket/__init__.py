"""Pocket: a small latent diffusion model of our own: KL autoencoder, word-and-byte text encoder, single-stream DiT."""

from sfumato.families.pocket.config import DenoiserConfig, PocketConfig, Preset, configure, pixel_twin
from sfumato.families.pocket.control import control_title
from sfumato.families.pocket.system import (
    System,
    TextDenoiser,
    build,
    continued_video,
    fresh_video,
    open_autoencoder,
    open_folder,
    save_folder,
)
from sfumato.families.pocket.video import VideoConfig

__all__ = [
    "DenoiserConfig",
    "PocketConfig",
    "Preset",
    "System",
    "TextDenoiser",
    "VideoConfig",
    "build",
    "configure",
    "continued_video",
    "control_title",
    "fresh_video",
    "open_autoencoder",
    "open_folder",
    "pixel_twin",
    "save_folder",
]
