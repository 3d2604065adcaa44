"""A Stable Diffusion checkpoint written again: as a single file, as a diffusers folder, in another precision.

Tensors pass one by one from where they lie to where they go, so memory holds one of them. What a diffusers folder and a
single file both hold goes there and back unchanged; what only one of them can say is refused or reported.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.checkpoint.rules import Joined
from sfumato.checkpoint.writer import write_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd import folder, keys
from sfumato.families.sd.checkpoint import Checkpoint
from sfumato.families.sd.condition import plan_of
from sfumato.families.sd.shapes import VAE
from sfumato.families.sd.signatures import TEXTS
from sfumato.nn.unet import UNet
from sfumato.storage import atomic_directory, write_json
from sfumato.text.clip import ClipTextEncoder
from sfumato.text.clip_tokens import bundled, save_folder

COPIED = ("tokenizer", "tokenizer_2", "feature_extractor")  # folders of plain data, taken over as they are
COPIED_SUFFIXES = {".json", ".txt"}
COPIED_LIMIT = 64 * 2**20  # bytes; the largest vocabulary is a fiftieth of it


@dataclass(frozen=True)
class Written:
    """What a conversion wrote. tensors: how many of each part. size: their bytes. dropped: names left, and why."""

    kind: str
    layout: str
    tensors: Mapping[str, int]
    size: int
    dropped: Mapping[str, str]


def write_file(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a single file under the original names, whole or not at all.

    A system has them as training code wrote them, without what is dropped on reading; SD 2's text encoder has the 23
    blocks that are used, which readers of such files accept. V-prediction is marked by the names `v_pred` and
    `ztsnr`. A VAE alone has no prefix, a text encoder alone the names of transformers.

    dtype: of all floating-point tensors, None keeps them. `on_progress` hears how many tensors are written, and of how
    many; it may raise to cancel. `CheckpointError` when something of a folder cannot be said by a single file, or a
    tensor does not fit `dtype`.
    """
    _check_shapes(checkpoint)
    _check_sayable(checkpoint)
    theirs = _original(checkpoint)
    told = _counter(len(theirs), on_progress)
    size = write_tensors(path, theirs, dtype=dtype, metadata=_metadata(checkpoint), on_tensor=told)
    return _written(checkpoint, "single", size)


def write_folder(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a diffusers folder, whole or not at all: weights and JSON of each part, the scheduler's and the index.

    JSON and tokenizers of a source that is a folder are taken over; what is missing is the family's and CLIP's own, so
    that diffusers opens the folder as it stands. One network alone becomes the folder of one part. `InputError` when a
    VAE alone does not say whose it is; other errors as `write_file`.
    """
    _check_shapes(checkpoint)
    configs = {name: _config(checkpoint, name) for name in checkpoint.parts}
    told = _counter(sum(len(tensors) for tensors in checkpoint.parts.values()), on_progress)
    size = 0
    with atomic_directory(path) as staging:
        for name, tensors in checkpoint.parts.items():
            place = staging if checkpoint.alone else staging / name
            write_json(place / folder.CONFIG, configs[name])
            file = place / f"{folder.WEIGHTS[name]}.safetensors"
            size += write_tensors(file, tensors, dtype=dtype, on_tensor=told)
        if not checkpoint.alone and checkpoint.system is not None:
            scheduler = _scheduler(checkpoint)
            index = folder.model_index(checkpoint.kind, checkpoint.system, scheduler["_class_name"])
            write_json(staging / folder.SCHEDULER, scheduler)
            write_json(staging / folder.INDEX, index)
            if checkpoint.folder is not None:
                _copy_data(checkpoint.folder, staging)
            for reader in plan_of(checkpoint.kind).readers:
                place = staging / folder.tokenizer_folder(reader.part)
                if reader.part in checkpoint.parts and not place.exists():
                    save_folder(bundled(reader.pad), place)
    return _written(checkpoint, "folder", size)


def _original(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The checkpoint's tensors under the names of a single file, and its markers."""
    if "unet" not in checkpoint.parts:
        [(name, tensors)] = checkpoint.parts.items()
        return keys.vae_map(VAE).to_theirs(tensors) if name == "vae" else tensors
    if checkpoint.system is None:
        raise ValueError("a U-Net always has its system")
    places = keys.prefixes(checkpoint.system)
    whole = keys.file_map(checkpoint.system, {part: places[part] for part in checkpoint.parts})
    ours = Joined(*((f"{part}.", tensors) for part, tensors in checkpoint.parts.items()))
    return Joined(("", whole.to_theirs(ours)), ("", _markers(checkpoint)))


def _markers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Empty tensors whose names say that the U-Net was trained to predict v, and how."""
    if checkpoint.prediction != "v":
        return {}
    names = ("v_pred", "ztsnr") if checkpoint.zero_snr else ("v_pred",)
    return {name: torch.zeros(0) for name in names}


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the writer of a single file noted of the model; hashes of its tensors no longer hold."""
    return {key: text for key, text in checkpoint.metadata.items() if "hash" not in key}


def _check_shapes(checkpoint: Checkpoint) -> None:
    """`CheckpointError` unless every tensor has the shape that its network needs: what is written can be loaded."""
    system = checkpoint.system
    text = {part.name: part.config for part in system.text} if system is not None else {}
    for name, tensors in checkpoint.parts.items():
        with torch.device("meta"):
            if name == "unet" and system is not None:
                module: nn.Module = UNet(system.unet)
            elif name == "vae":
                module = AutoencoderKL(VAE if system is None else system.vae)
            else:
                module = ClipTextEncoder(text.get(name) or TEXTS[checkpoint.kind])
        needed = module.state_dict()
        for tensor in tensors:
            found, right = tensors.info(tensor)[1], tuple(needed[tensor].shape)
            if found != right:
                raise CheckpointError(f"tensor {tensor!r} of the {name} is {found} where {right} is right")


def _check_sayable(checkpoint: Checkpoint) -> None:
    """`CheckpointError` when a folder says what readers of a single file would not know."""
    if "unet" in checkpoint.parts and checkpoint.system is not None and checkpoint.system.unet.time_cond:
        raise CheckpointError(
            "its U-Net is told the guidance scale, for which single files have no name; keep it as a folder"
        )
    said = checkpoint.configs.get("vae")
    if not said or checkpoint.system is None:
        return
    usual = folder.vae_config(checkpoint.system.vae, checkpoint.system.size)
    scale = said.get("scaling_factor", VAE.scaling_factor)
    if scale != usual["scaling_factor"] or any(
        said.get(n) for n in ("shift_factor", "latents_mean", "latents_std")
    ):
        raise CheckpointError(
            f"its VAE scales latents in its own way (scaling_factor {scale}), which a single file of {checkpoint.kind} "
            "cannot say; keep it as a folder"
        )


def _config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON of a part: the source's own, or the family's."""
    if found := checkpoint.configs.get(name):
        return dict(found)
    system = checkpoint.system
    if system is None:
        raise InputError(
            f"{checkpoint.kind} alone does not say which system it belongs to; give its kind",
            argument="kind",
        )
    if name == "unet":
        v_of_sd2 = checkpoint.kind == "sd2" and checkpoint.prediction == "v"
        size = 512 if checkpoint.kind == "sd2" and not v_of_sd2 else system.size
        return folder.unet_config(system.unet, size // system.vae.factor, upcast=v_of_sd2)
    if name == "vae":
        return folder.vae_config(system.vae, system.size)
    parts = {part.name: part.config for part in system.text}
    return folder.text_config(parts[name])


def _scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's JSON: the source's own with the prediction that holds, or the family's."""
    usual = folder.scheduler_config(checkpoint.kind, checkpoint.prediction, checkpoint.zero_snr)
    found = checkpoint.configs.get("scheduler")
    if not found:
        return usual
    prediction = usual["prediction_type"]
    return {"_class_name": usual["_class_name"], **found, "prediction_type": prediction}


def _counter(total: int, on_progress: Callable[[int, int], None] | None) -> Callable[[str], None] | None:
    """What `write_tensors` tells of each tensor, as a count."""
    if on_progress is None:
        return None
    done = itertools.count(1)
    return lambda name: on_progress(next(done), total)


def _copy_data(source: Path, target: Path) -> None:
    """Tokenizers and the like: small plain files, directly in their folders."""
    for name in COPIED:
        for file in sorted((source / name).glob("*")) if (source / name).is_dir() else ():
            if file.is_file() and file.suffix in COPIED_SUFFIXES and file.stat().st_size <= COPIED_LIMIT:
                (target / name).mkdir(exist_ok=True)
                shutil.copyfile(file, target / name / file.name)


def _written(checkpoint: Checkpoint, layout: str, size: int) -> Written:
    counts = {name: len(tensors) for name, tensors in checkpoint.parts.items()}
    return Written(checkpoint.kind, layout, counts, size, checkpoint.dropped)
