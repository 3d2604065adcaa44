"""The autoencoder of a model alone: what pixels go through and come back from, without opening what draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.autoencoder.kl import KLConfig
from sfumato.autoencoder.model import Autoencoder
from sfumato.autoencoder.safe import encode_safe
from sfumato.errors import CheckpointError, InputError
from sfumato.families import checkpoint_families, family_of, is_checkpoint, located, model_folder
from sfumato.families.published.checkpoint import Checkpoint, open_checkpoint, same_latents
from sfumato.families.published.networks import part_hash
from sfumato.families.published.openers import autoencoder as filled
from sfumato.families.published.openers import kept_dtype
from sfumato.families.published.signatures import VAES
from sfumato.families.published.system import decoded
from sfumato.runtime import autocast
from sfumato.storage import tensors_hash


@dataclass(frozen=True)
class Opened:
    """An autoencoder ready to use. roundtrip: pixels (B, 3, T, H, W) in [-1, 1] → the same shape, not clamped, with H
    and W multiples of `factor`. encode: such pixels → normalised latents (B, C, T, H/f, W/f), float32. digest: SHA-256
    of its weights. dtype: what it works in. folder: of the model, if it lies in one. whole: takes a picture of any size
    in bounded memory.
    """

    factor: int
    channels: int
    roundtrip: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    digest: str
    dtype: torch.dtype
    folder: Path | None = None
    whole: bool = False


def open_autoencoder(
    model: str | Path, device: torch.device, dtype: torch.dtype, *, vae: str | Path | None = None
) -> Opened:
    """The autoencoder of whatever `generate.load` opens, or of a file or folder that holds nothing else.

    vae: another one in its place, as `load` takes it. `CheckpointError` when there is none in it or it is damaged;
    `InputError` when `vae` is given for a model of our own, or is of other latents.
    """
    path = located(model)
    if is_checkpoint(path):
        return _published(path, device, dtype, vae)
    family = family_of(path)
    if vae is not None:
        raise InputError(f"vae is for checkpoints; {str(model)!r} is whole as it is", argument="vae")
    folder = model_folder(path)
    return of_our_own(family.open_autoencoder(folder, device), dtype, folder)


def of_our_own(model: Autoencoder, dtype: torch.dtype, folder: Path | None = None) -> Opened:
    """An autoencoder in memory, at work as a model of our own has it: under autocast."""
    dtype = torch.float32 if dtype == torch.int8 else dtype

    def roundtrip(pixels: Tensor) -> Tensor:
        with autocast(pixels.device, dtype):
            return model.decode(model.encode(pixels).mode()).float()

    def encode(pixels: Tensor) -> Tensor:
        with autocast(pixels.device, dtype):
            return model.encode_normalized(pixels).float()

    config, digest = model.config, tensors_hash(model.state_dict())
    return Opened(config.factor, config.channels, roundtrip, encode, digest, dtype, folder)


def _published(path: Path, device: torch.device, dtype: torch.dtype, vae: str | Path | None) -> Opened:
    families = checkpoint_families()
    found = open_checkpoint(path, families)
    source, kind = str(path), found.system
    if vae is not None:
        other = open_checkpoint(vae, families)
        if "vae" not in other.parts:
            raise InputError(f"{vae} holds no autoencoder", argument="vae")
        if kind is not None and other.kind in VAES and not same_latents(other.kind, kind):
            raise InputError(
                f"{vae} is {other.kind}, an autoencoder of other latents than {path} has", argument="vae"
            )
        found, source = other, str(vae)
    if "vae" not in found.parts:
        advice = "" if vae is not None else "; give a whole checkpoint, or the autoencoder with --vae"
        raise CheckpointError(f"{source} is {found.kind} without an autoencoder{advice}")
    model = filled(_config(found), found.parts["vae"], f"{source} (vae)", kept_dtype(device, dtype), device)

    def roundtrip(pixels: Tensor) -> Tensor:
        return decoded(model, encode_safe(model, pixels).mode()).float()

    def encode(pixels: Tensor) -> Tensor:
        return model.normalize(encode_safe(model, pixels).mode()).float()

    config = model.config
    return Opened(
        config.factor,
        config.channels,
        roundtrip,
        encode,
        part_hash(found.parts["vae"]),
        kept_dtype(device, dtype),
        found.folder,
        whole=True,
    )


def _config(found: Checkpoint) -> KLConfig:
    """A folder's own numbers where it has them, else those of its kind."""
    said = found.configs.get("vae", {})
    if said:
        return KLConfig.from_diffusers(dict(said))
    return VAES[found.kind] if found.system is None else found.system.vae
