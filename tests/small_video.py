"""A tiny model of pictures that draws clips too, with random weights throughout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from helpers import TINY
from sfumato.autoencoder import AutoencoderConfig
from sfumato.autoencoder.causal import CausalConfig
from sfumato.families import PACKAGED
from sfumato.families.pocket import System, VideoConfig, build, fresh_video, save_folder
from sfumato.families.pocket.config import DenoiserConfig, Preset
from sfumato.storage import read_json

VIDEO = VideoConfig(
    temporal=CausalConfig(channels=4, width=16, encoder_blocks=1, decoder_blocks=2),
    words=("rolls", "slides"),
    frames=9,
    fps=8.0,
    window=3,
    context=1,
    shared=0.5,
)


def picture_system() -> System:
    """Without the parts for clips; it knows the words of scenes."""
    words = tuple(read_json(PACKAGED["pocket"] / "model.json")["words"])
    config = replace(
        TINY,
        autoencoder=AutoencoderConfig(
            factor=8, latent_channels=4, encoder_width=32, decoder_width=32, max_width=64
        ),
        denoiser=DenoiserConfig(64, 1, 1, text_width=64, text_depth=1),
        words=words,
        preset=Preset(steps=3, size=(32, 32)),
    )
    torch.manual_seed(0)
    system = build(config)
    for parameter in system.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return system


def video_system(video: VideoConfig = VIDEO) -> System:
    system = fresh_video(picture_system(), video)
    assert system.video is not None
    for module in (system.video.temporal, system.video.animator):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    for module in (system.autoencoder, system.denoiser, system.video.temporal, system.video.animator):
        module.eval().requires_grad_(False)
    return system


def write_video(place: Path) -> Path:
    save_folder(video_system(), place)
    return place
