"""Pocket: a small latent diffusion model of our own: KL autoencoder, word-and-byte text encoder, single-stream DiT."""

from sfumato.families.pocket.config import PocketConfig, pixel_twin
from sfumato.families.pocket.system import System, TextDenoiser, build, open_folder, save_folder

__all__ = ["PocketConfig", "System", "TextDenoiser", "build", "open_folder", "pixel_twin", "save_folder"]
