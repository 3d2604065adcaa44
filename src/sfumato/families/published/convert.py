"""A checkpoint written again: as a single file, as a diffusers folder, in another precision.

Tensors pass one by one from where they lie to where they go, so memory holds one of them. What a diffusers folder and a
single file both hold goes there and back unchanged; what only one of them can say is refused or reported.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.rules import Joined
from sfumato.checkpoint.writer import write_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published import folder, keys
from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.published.openers import blank
from sfumato.families.published.signatures import TEXTS, VAES
from sfumato.storage import atomic_directory, write_json
from sfumato.text.clip_tokens import bundled, save_folder
from sfumato.text.vision import ClipVisionConfig

COPIED = (
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "feature_extractor",
)  # folders of plain data, taken over as they are
COPIED_SUFFIXES = {".json", ".txt", ".model"}
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
        dropped = dict(checkpoint.dropped)
        if not checkpoint.alone and checkpoint.family is not None:
            scheduler = _scheduler(checkpoint)
            index = checkpoint.family.model_index(checkpoint, scheduler["_class_name"])
            write_json(staging / folder.SCHEDULER, scheduler)
            write_json(staging / folder.INDEX, index)
            if checkpoint.folder is not None:
                _copy_data(checkpoint.folder, staging)
            dropped |= _write_tokenizers(checkpoint, staging)
    return replace(_written(checkpoint, "folder", size), dropped=dropped)


def _write_tokenizers(checkpoint: Checkpoint, staging: Path) -> dict[str, str]:
    """Those that come with the package, where the source had none. Returns which are missing then, with the reason."""
    assert checkpoint.family is not None
    pads, missing = checkpoint.family.pads(checkpoint.kind), {}
    for part in checkpoint.system.text:
        place = staging / folder.tokenizer_folder(part.name)
        if part.name not in checkpoint.parts or place.exists():
            continue
        if isinstance(part.config, ClipVisionConfig):
            write_json(place / folder.PROCESSOR, folder.processor_config(part.config))
            continue
        if part.name in pads:
            save_folder(bundled(pads[part.name]), place)
        else:
            missing[f"{place.name}/*"] = (
                "its tokenizer is not in the package and not beside the checkpoint: add it"
            )
    return missing


def _original(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The checkpoint's tensors under the names of a single file, and its markers."""
    family = checkpoint.family
    if family is None or not checkpoint.draws:
        [(name, tensors)] = checkpoint.parts.items()
        return keys.vae_map(_vae(checkpoint)).to_theirs(tensors) if name == "vae" else tensors
    places = family.prefixes(checkpoint.system)
    whole = family.file_map(checkpoint.system, {part: places[part] for part in checkpoint.parts})
    ours = Joined(*((f"{part}.", tensors) for part, tensors in checkpoint.parts.items()))
    return Joined(("", whole.to_theirs(ours)), ("", family.markers(checkpoint)))


def _vae(checkpoint: Checkpoint) -> KLConfig:
    return VAES[checkpoint.kind] if checkpoint.system is None else checkpoint.system.vae


def _config_of(checkpoint: Checkpoint, name: str) -> Any:
    """The configuration of a part's network."""
    if checkpoint.family is not None and name == checkpoint.family.denoiser:
        return checkpoint.system.denoiser
    if name == "vae":
        return _vae(checkpoint)
    texts = () if checkpoint.system is None else checkpoint.system.text
    found = next((part.config for part in texts if part.name == name), None)
    return TEXTS[checkpoint.kind] if found is None else found


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the writer of a single file noted of the model; hashes of its tensors no longer hold."""
    kept = {key: text for key, text in checkpoint.metadata.items() if "hash" not in key}
    notes = {} if checkpoint.family is None or not checkpoint.draws else checkpoint.family.notes(checkpoint)
    return {**kept, **notes}


def _check_shapes(checkpoint: Checkpoint) -> None:
    """`CheckpointError` unless every tensor has the shape that its network needs: what is written can be loaded."""
    for name, tensors in checkpoint.parts.items():
        needed = blank(_config_of(checkpoint, name)).state_dict()
        for tensor in tensors:
            found, right = tensors.info(tensor)[1], tuple(needed[tensor].shape)
            if found != right:
                raise CheckpointError(f"tensor {tensor!r} of the {name} is {found} where {right} is right")


def _check_sayable(checkpoint: Checkpoint) -> None:
    """`CheckpointError` when a folder says what readers of a single file would not know."""
    if (
        checkpoint.draws
        and checkpoint.family is not None
        and (why := checkpoint.family.unsayable(checkpoint))
    ):
        raise CheckpointError(why)
    said = checkpoint.configs.get("vae")
    if not said or checkpoint.system is None:
        return
    usual = folder.vae_config(checkpoint.system.vae, checkpoint.system.size)
    own = {"scaling_factor": usual["scaling_factor"], "shift_factor": usual.get("shift_factor", 0.0)}
    defaults = {"scaling_factor": KLConfig().scaling_factor, "shift_factor": 0.0}
    asked = {name: said.get(name) or defaults[name] for name in own}
    if asked != own or any(said.get(n) for n in ("latents_mean", "latents_std")):
        told = ", ".join(f"{name} {value}" for name, value in asked.items() if value)
        raise CheckpointError(
            f"its VAE scales latents in its own way ({told}), which a single file of {checkpoint.kind} "
            "cannot say; keep it as a folder"
        )


def _config(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON of a part: the source's own, or the family's."""
    if found := checkpoint.configs.get(name):
        return dict(found)
    if checkpoint.system is None or checkpoint.family is None:
        raise InputError(
            f"{checkpoint.kind} alone does not say which system it belongs to; give its kind",
            argument="kind",
        )
    if name == checkpoint.family.denoiser:
        return checkpoint.family.denoiser_config(checkpoint)
    if name == "vae":
        return folder.vae_config(checkpoint.system.vae, checkpoint.system.size)
    return folder.text_config(_config_of(checkpoint, name))


def _scheduler(checkpoint: Checkpoint) -> dict[str, Any]:
    """The scheduler's JSON: the source's own with the prediction that holds, or the family's."""
    assert checkpoint.family is not None
    usual = checkpoint.family.scheduler_config(checkpoint)
    found = checkpoint.configs.get("scheduler")
    if not found:
        return usual
    prediction = {name: usual[name] for name in ("prediction_type",) if name in usual}
    return {"_class_name": usual["_class_name"], **found, **prediction}


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
