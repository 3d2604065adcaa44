"""Small Stable Diffusions with random weights, in folders that ours, diffusers and transformers open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.families.sd import folder
from sfumato.families.sd.condition import plan_of
from sfumato.families.sd.shapes import SYSTEMS, System
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.storage import save_tensors, write_json
from sfumato.text.clip import ClipConfig, ClipTextEncoder
from sfumato.text.clip_tokens import bundled, save_folder

SIDE = 64  # pixels; the small autoencoders have a factor of 4
NARROW, WIDE = ClipConfig(32, 2, 2, "quick_gelu"), ClipConfig(48, 2, 3, "gelu")
UNETS = {
    "sd1": UNetConfig(4, (32, 64), (1, 0), 1, (4, 4), context=32),
    "sd1-inpaint": UNetConfig(9, (32, 64), (1, 0), 1, (4, 4), context=32),
    "sd1-lcm": UNetConfig(4, (32, 64), (1, 0), 1, (4, 4), context=32, time_cond=32),
    "sd2": UNetConfig(4, (32, 64), (1, 0), 1, (2, 4), context=48, linear=True),
    "sdxl": UNetConfig(4, (32, 64), (0, 2), 2, (2, 4), context=80, linear=True, vector=48 + 6 * 256),
    "sdxl-refiner": UNetConfig(
        4, (64, 64, 96), (0, 2, 0), 2, (4, 4, 6), context=48, linear=True, vector=48 + 5 * 256
    ),
}


def small(kind: str) -> System:
    system = SYSTEMS[kind]
    text = tuple(
        replace(
            part,
            config=replace(WIDE, projection=48)
            if part.config.projection
            else (WIDE if part.open_clip else NARROW),
        )
        for part in system.text
    )
    return replace(system, unet=UNETS[kind], vae=replace(system.vae, widths=(32, 64, 64)), text=text)


SMALL = {kind: small(kind) for kind in UNETS}


def write(kind: str, place: Path, prediction: str = "epsilon", seed: int = 5, **scheduler) -> Path:
    """A diffusers folder of the small kind. seed: of its weights; `scheduler`: more of its scheduler's JSON."""
    system = SMALL[kind]
    torch.manual_seed(seed)
    networks = {"unet": UNet(system.unet), "vae": AutoencoderKL(system.vae)}
    networks |= {part.name: ClipTextEncoder(part.config) for part in system.text}
    configs = {
        "unet": folder.unet_config(system.unet, SIDE // 4),
        "vae": folder.vae_config(system.vae, SIDE),
    } | {part.name: folder.text_config(part.config) for part in system.text}
    for name, network in networks.items():
        save_tensors(place / name / f"{folder.WEIGHTS[name]}.safetensors", network.state_dict())
        write_json(place / name / folder.CONFIG, configs[name])
    for reader in plan_of(kind).readers:
        save_folder(bundled(reader.pad), place / folder.tokenizer_folder(reader.part))
    config = folder.scheduler_config(kind, prediction) | scheduler
    write_json(place / folder.SCHEDULER, config)
    write_json(place / folder.INDEX, folder.model_index(kind, system, config["_class_name"]))
    return place


def stand_for_the_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small ones are what every kind of Stable Diffusion is, for one test."""
    for kind, system in SMALL.items():
        monkeypatch.setitem(SYSTEMS, kind, system)


def places_in(make: Callable[[str], Path]) -> Callable[..., str]:
    """kind, seed → the folder of a small model with random weights, written once. make: gives a folder for a name."""
    known: dict[tuple[str, int], Path] = {}

    def place(kind: str, seed: int = 5) -> str:
        if (kind, seed) not in known:
            known[kind, seed] = write(kind, make(kind) / "model", seed=seed)
        return str(known[kind, seed])

    return place
