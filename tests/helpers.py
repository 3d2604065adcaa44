"""What several test files need: a tiny model, made pictures, how far two things are apart, an interrupted process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.autoencoder import AutoencoderConfig
from sfumato.families.pocket import PocketConfig, System, build, save_folder
from sfumato.families.pocket.config import DenoiserConfig, Preset

CPU = torch.device("cpu")
PROMPT = "a red cube"
TINY = PocketConfig(
    autoencoder=AutoencoderConfig(4, 4, encoder_width=32, decoder_width=32, max_width=32),
    denoiser=DenoiserConfig(64, 2, 1, text_width=64, text_depth=1, max_tokens=64),
    words=("a", "red", "blue", "cube", "sphere"),
    preset=Preset(steps=4, guidance=3.0, sampler="dpmpp_2m", schedule="linear", size=(32, 32)),
)


def tiny_system(config: PocketConfig = TINY) -> System:
    """Random weights, always the same, that let the prompt, the noise and the picture show."""
    torch.manual_seed(0)
    made = build(config)
    for parameter in made.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    for module in (made.autoencoder, made.denoiser):
        module.eval().requires_grad_(False)
    return made


def tiny_folder(place: Path) -> Path:
    """A model folder of a few thousand untrained weights; sides are multiples of 8, and 32 by default."""
    config = replace(
        TINY,
        autoencoder=AutoencoderConfig(factor=8, latent_channels=4),
        denoiser=DenoiserConfig(64, 1, 1, text_width=64, text_depth=1),
        preset=Preset(steps=2, size=(32, 32)),
    )
    torch.manual_seed(0)
    system = build(config)
    for parameter in system.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_folder(system, place)
    return place


# --- pictures ------------------------------------------------------------------------------------------------------


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def white(width: int, height: int, *box: int) -> Image.Image:
    """A black mask with one white box (left, top, right, bottom)."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


def array(picture: Image.Image) -> np.ndarray:
    """Its values as integers that can be subtracted."""
    return np.asarray(picture).astype(int)


def apart(one: Image.Image, two: Image.Image) -> int:
    """The largest difference of two pictures of one size, in steps of 255."""
    assert one.size == two.size
    return int(np.abs(array(one) - array(two)).max())


# --- numbers -------------------------------------------------------------------------------------------------------


def plain(value: object) -> str:
    """A name for a test that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


def spread(tensor: torch.Tensor, counts: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """What a tensor holds along `dim`, each as often as it counts."""
    return tensor.repeat_interleave(counts.long(), dim=dim)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖, in float64."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-300))


def spelled(options: dict) -> str:
    """Options of a sampler as a table can name them."""
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "as it stands"


# --- files -----------------------------------------------------------------------------------------------------------


def hollow(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """A file with the header of the real size, before a hole in place of numbers; extents and places are checked."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


# --- processes -----------------------------------------------------------------------------------------------------


def interrupted(arguments: list[str], sign: Path) -> tuple[int, str]:
    """Exit status and standard error of `sfumato ARGUMENTS`, sent SIGINT once `sign` is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sfumato.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # a shell in the background ignores it, and its children would
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not sign.exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, err
