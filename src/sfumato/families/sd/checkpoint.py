"""A Stable Diffusion checkpoint, whatever it lies in, as parts under our names: nothing is read but headers and JSON.

A whole single file, a diffusers folder, or one network alone in either layout. What it is follows from names and shapes
of its tensors; what its tensors cannot say is taken from the JSON beside them, or from the caller.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato.checkpoint.detect import Match, identify
from sfumato.checkpoint.layout import find_parts
from sfumato.checkpoint.rules import KeyMap, View, shapes
from sfumato.checkpoint.source import Weights, open_folder, open_weights
from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd import keys
from sfumato.families.sd.folder import WEIGHTS
from sfumato.families.sd.shapes import SYSTEMS, VAE, System
from sfumato.families.sd.signatures import TEXTS, predicts_v, signatures

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' words to ours


@dataclass(frozen=True)
class Checkpoint:
    """Parts of a model, their tensors under our names, and what is known of it.

    kind: a key of `SYSTEMS`; or "f8c4", "clip-l", "openclip-h", "openclip-bigg" of a VAE or a text encoder alone, which
    several systems share: then `system` is None. parts: name of the part ("unet", "vae", "text_encoder",
    "text_encoder_2") to its tensors, read when asked for. alone: it is one network. prediction: what the U-Net gives,
    "epsilon" or "v". zero_snr: the last step of its training was pure noise. configs: part to its JSON, where there is
    any. folder: where it lies, if in one. metadata: what the writer of a single file noted. dropped: names that were
    left there, with the reason.
    """

    kind: str
    system: System | None
    parts: Mapping[str, View]
    alone: bool = False
    prediction: str = "epsilon"
    zero_snr: bool = False
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    kind: str | None = None,
    prediction: str | None = None,
    systems: Mapping[str, System] = SYSTEMS,
) -> Checkpoint:
    """The checkpoint at `path`: a .safetensors file, a diffusers folder, or the folder of one part.

    variant: of a folder's files, such as "fp16"; None is the plain one or the only one. kind: which of the `systems` a
    VAE or a text encoder alone belongs to; of others it must agree with what the tensors say. prediction: "epsilon" or
    "v", over what the checkpoint says or seems to say.

    `CheckpointError` when it is damaged, incomplete, or of a kind that is not read here, which it names; `InputError`
    when an argument does not fit it.
    """
    if prediction not in (None, *PREDICTIONS.values()):
        raise InputError(f"prediction must be epsilon or v, not {prediction!r}", argument="prediction")
    if kind is not None and kind not in systems:
        raise InputError(f"kind must be one of {', '.join(systems)}, not {kind!r}", argument="kind")
    path = Path(path)
    found = _from_folder(path, variant, systems) if path.is_dir() else _from_file(path, systems)
    if kind is not None:
        found = _of_kind(found, str(path), kind, systems[kind])
    if prediction is not None:
        return replace(found, prediction=prediction)
    unsaid = found.prediction == "epsilon" and "scheduler" not in found.configs
    if found.kind == "sd2" and unsaid and "unet" in found.parts and found.system is not None:
        v = predicts_v(found.parts["unet"], found.system.unet)
        return replace(found, prediction="v" if v else "epsilon")
    return found


def _from_file(path: Path, systems: Mapping[str, System]) -> Checkpoint:
    weights = open_weights(path)
    match = identify(shapes(weights), signatures(systems), str(path))
    if match.part != "checkpoint":
        return replace(_network(weights, match, str(path), systems), metadata=weights.metadata)
    system = systems[match.kind]
    places = keys.prefixes(system, weights)
    ours = keys.file_map(system, places).to_ours(weights, str(path))
    return Checkpoint(
        match.kind,
        system,
        {part: ours.under(f"{part}.") for part in places},
        prediction=match.traits.get("prediction", "epsilon"),
        zero_snr=match.traits.get("zero_snr", False),
        metadata=weights.metadata,
        dropped=ours.report.dropped,
    )


def _from_folder(folder: Path, variant: str | None, systems: Mapping[str, System]) -> Checkpoint:
    layout = find_parts(folder)
    if "model" in layout.parts:  # the folder is one part
        part = layout.parts["model"]
        weights = open_folder(folder, part.stem or WEIGHTS["unet"], variant)
        found = _network(
            weights, identify(shapes(weights), signatures(systems), str(folder)), str(folder), systems
        )
        return replace(found, configs={name: part.config for name in found.parts}, folder=folder)
    if "unet" not in layout.parts:
        raise CheckpointError(f"{folder} holds a {layout.kind} without a U-Net, which is of no known kind")

    def weights_of(name: str) -> Weights:
        return open_folder(folder / name, layout.parts[name].stem or WEIGHTS[name], variant)

    weights = weights_of("unet")
    match = identify(shapes(weights), signatures(systems), str(folder / "unet"))
    if (match.part, match.layout) != ("unet", "diffusers"):
        raise CheckpointError(
            f"{folder / 'unet'} holds {match.title} where a U-Net in diffusers names is right"
        )
    system = systems[match.kind]
    parts: dict[str, View] = {}
    dropped: dict[str, str] = {}
    for name, part_map in keys.folder_maps(system).items():
        if name in layout.parts:
            parts[name] = part_map.to_ours(weights_of(name), str(folder / name))
            dropped |= {f"{name}/{left}": reason for left, reason in parts[name].report.dropped.items()}
    for name, part in layout.parts.items():
        if part.stem and name not in parts:
            dropped[f"{name}/*"] = "a part that is not used here"
    configs = {name: part.config for name, part in layout.parts.items() if part.config}
    said = configs.get("scheduler", {})
    prediction = said.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise CheckpointError(
            f"{folder / 'scheduler'} asks for the prediction {prediction!r}; epsilon and v_prediction are known"
        )
    return Checkpoint(
        match.kind,
        system,
        parts,
        prediction=PREDICTIONS[prediction],
        zero_snr=said.get("rescale_betas_zero_snr") is True,
        configs=configs,
        folder=folder,
        dropped=dropped,
    )


def _network(weights: Weights, match: Match, source: str, systems: Mapping[str, System]) -> Checkpoint:
    """One network alone, in either layout."""
    original = match.layout == "original"
    if match.part == "unet":
        shape = systems[match.kind].unet
        part_map = keys.unet_map(shape) if original else KeyMap(keys.same(keys.unet_map(shape).ours))
    elif match.part == "vae":
        part_map = (keys.vae_map(VAE) if original else keys.vae_folder_map(VAE)).within(match.prefix, "")
    else:
        part_map = keys.clip_map(TEXTS[match.kind])
    ours = (part_map | KeyMap((), keys.EXTRAS)).to_ours(weights, source)
    return Checkpoint(
        match.kind,
        systems.get(match.kind),
        {match.part: ours},
        alone=True,
        prediction=match.traits.get("prediction", "epsilon"),
        zero_snr=match.traits.get("zero_snr", False),
        dropped=ours.report.dropped,
    )


def _of_kind(found: Checkpoint, source: str, kind: str, system: System) -> Checkpoint:
    """The checkpoint as one of `kind`, if its tensors allow it; a text encoder gets the name of its place there."""
    name = next(iter(found.parts))
    if found.kind == kind:
        return found
    if found.alone and name == "vae":  # all have the same tensors
        return replace(found, kind=kind, system=system)
    if found.alone and found.kind in TEXTS:
        place = next((part.name for part in system.text if part.config == TEXTS[found.kind]), None)
        if place is not None:
            configs = {place: found.configs[name]} if name in found.configs else {}
            return replace(found, kind=kind, system=system, parts={place: found.parts[name]}, configs=configs)
    raise InputError(f"{source} is of {found.kind}, not of {kind}", argument="kind")


def completed(
    found: Checkpoint,
    source: str,
    others: Iterable[str | os.PathLike[str]],
    systems: Mapping[str, System] = SYSTEMS,
) -> Checkpoint:
    """A U-Net's checkpoint with the parts that it lacks taken from `others`: whole checkpoints, or single networks.

    `InputError` when it lacks nothing, or when one of the others is of a kind whose parts are different ones.
    """
    if found.system is None or "unet" not in found.parts:
        raise InputError(f"parts goes with a U-Net; {source} is {found.kind} alone", argument="parts")
    wanted = ["vae", *(part.name for part in found.system.text)]
    if all(name in found.parts for name in wanted):
        raise InputError(f"{source} is whole; parts is for a U-Net alone", argument="parts")
    parts, configs, folder = dict(found.parts), dict(found.configs), found.folder
    for path in others:
        other = open_checkpoint(path, systems=systems)
        if other.system is None:
            other = _of_kind(other, str(path), found.kind, found.system)
        elif (other.system.text, other.system.vae) != (found.system.text, found.system.vae):
            raise InputError(
                f"{path} is of {other.kind}, whose parts do not go with {source}, of {found.kind}",
                argument="parts",
            )
        for name in wanted:
            if name in other.parts and name not in parts:
                parts[name] = other.parts[name]
                if name in other.configs:
                    configs[name] = other.configs[name]
                if name != "vae":  # its tokenizer lies beside it
                    folder = other.folder
    return replace(found, parts=parts, configs=configs, folder=folder, alone=False)
