"""Pocket: a small latent diffusion model of our own: KL autoencoder, word-and-byte text encoder, single-stream DiT."""

from sfumato.families.pocket.config import DenoiserConfig, PocketConfig, Preset, configure, pixel_twin
from sfumato.families.pocket.system import (
    System,
    TextDenoiser,
    build,
    open_autoencoder,
    open_folder,
    save_folder,
)

__all__ = [
    "DenoiserConfig",
    "PocketConfig",
    "Preset",
    "System",
    "TextDenoiser",
    "build",
    "configure",
    "open_autoencoder",
    "open_folder",
    "pixel_twin",
    "save_folder",
]
