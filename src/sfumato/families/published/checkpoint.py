"""A published checkpoint, whatever it lies in, as parts under our names: nothing is read but headers and JSON.

A whole single file, a diffusers folder, or one network alone in either layout. What it is, and of which family, names
and shapes of its tensors tell; what they cannot tell is taken from the JSON beside them, or from the caller.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato.checkpoint.detect import Signature, identify
from sfumato.checkpoint.layout import Layout, find_parts
from sfumato.checkpoint.rules import KeyMap, View, shapes
from sfumato.checkpoint.source import Weights, open_folder, open_weights
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published import keys
from sfumato.families.published.folder import WEIGHTS
from sfumato.families.published.kinds import Family, Kind, TextPart
from sfumato.families.published.signatures import TEXTS, VAES, shared_signatures, text_kind

Families = Sequence[Family]


@dataclass(frozen=True)
class Checkpoint:
    """Parts of a model, their tensors under our names, and what is known of it.

    kind: of one of its family's systems; or a key of `VAES` or `TEXTS` for a VAE or a text encoder alone, which several
    systems share: then `system` and `family` are None. parts: name of the part ("vae", "text_encoder", what the family
    calls its denoiser …) to its tensors, read when asked for. alone: it is one network. prediction: what the denoiser
    gives, "epsilon", "v" or "flow". zero_snr: the last step of its training was pure noise. configs: part to its JSON,
    where there is any. folder: where it lies, if in one; file: the single file, if it is one. metadata: what the writer
    of a single file noted. dropped: names that were left there, with the reason.
    """

    kind: str
    system: Any
    parts: Mapping[str, View]
    alone: bool = False
    prediction: str = "epsilon"
    zero_snr: bool = False
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folder: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    family: Family | None = None
    file: Path | None = None

    @property
    def draws(self) -> bool:
        """Whether it holds the network that draws."""
        return self.family is not None and self.family.denoiser in self.parts


def open_checkpoint(
    path: str | os.PathLike[str],
    families: Families,
    *,
    variant: str | None = None,
    kind: str | None = None,
    prediction: str | None = None,
) -> Checkpoint:
    """The checkpoint at `path`: a .safetensors file, a diffusers folder, or the folder of one part.

    variant: of a folder's files, such as "fp16"; None is the plain one or the only one. kind: which of the families'
    kinds a VAE or a text encoder alone belongs to; of others it must agree with what the tensors say. prediction: one
    of those of its family, over what the checkpoint says or seems to say.

    `CheckpointError` when it is damaged, incomplete, or of a kind that is not read here, which it names; `InputError`
    when an argument does not fit it.
    """
    known = [p for family in families if len(family.predictions) > 1 for p in family.predictions]
    if prediction not in (None, *known):
        raise InputError(
            f"prediction must be {' or '.join(known)}, not {prediction!r}", argument="prediction"
        )
    kinds = [kind for family in families for kind in family.systems]
    if kind is not None and kind not in kinds:
        raise InputError(f"kind must be one of {', '.join(kinds)}, not {kind!r}", argument="kind")
    path = Path(path)
    found = _from_folder(path, variant, families) if path.is_dir() else _from_file(path, families)
    if found.family is not None:
        found = found.family.settled(found, str(path))
    if kind is not None:
        family = next(family for family in families if kind in family.systems)
        found = _of_kind(found, str(path), kind, family)
    if prediction is not None:
        if found.family is not None and prediction not in found.family.predictions:
            right = " or ".join(found.family.predictions)
            raise InputError(
                f"{path} is of {found.kind}, which predicts {right}, not {prediction}", argument="prediction"
            )
        return replace(found, prediction=prediction)
    return found


def all_signatures(families: Families) -> Iterator[Signature]:
    """Of everything that is opened or refused by name."""
    for family in families:
        yield from family.signatures(family.systems)
    yield from shared_signatures()


def _family_of(kind: str, families: Families) -> Family | None:
    return next((family for family in families if kind in family.systems), None)


def _from_file(path: Path, families: Families) -> Checkpoint:
    weights = open_weights(path)
    match = identify(shapes(weights), all_signatures(families), str(path))
    family = _family_of(match.kind, families)
    if match.part != "checkpoint" or family is None:
        found = _network(weights, match, str(path), family)
        return replace(found, metadata=weights.metadata, file=path)
    system = family.systems[match.kind]
    places = family.prefixes(system, weights)
    ours = family.file_map(system, places, weights.names()).to_ours(weights, str(path))
    return Checkpoint(
        match.kind,
        system,
        {part: ours.under(f"{part}.") for part in places},
        prediction=match.traits.get("prediction", family.predictions[0]),
        zero_snr=match.traits.get("zero_snr", False),
        metadata=weights.metadata,
        dropped=ours.report.dropped,
        family=family,
        file=path,
    )


def _from_folder(folder: Path, variant: str | None, families: Families) -> Checkpoint:
    layout = find_parts(folder)
    if "model" in layout.parts:  # the folder is one part
        part = layout.parts["model"]
        weights = open_folder(folder, part.stem or WEIGHTS["vae"], variant)
        match = identify(shapes(weights), all_signatures(families), str(folder))
        found = _network(weights, match, str(folder), _family_of(match.kind, families))
        return replace(found, configs={name: part.config for name in found.parts}, folder=folder)

    def weights_of(name: str) -> Weights:
        return open_folder(folder / name, layout.parts[name].stem or WEIGHTS[name], variant)

    family, weights, match = _denoiser_of(layout, folder, families, weights_of)
    system = family.systems[match.kind]
    parts: dict[str, View] = {}
    dropped: dict[str, str] = {}
    for name in (family.denoiser, "vae", *(part.name for part in system.text)):
        if name in layout.parts:
            tensors = weights if name == family.denoiser else weights_of(name)
            table = family.folder_map(system, name, tensors.names())
            parts[name] = table.to_ours(tensors, str(folder / name))
            dropped |= {f"{name}/{left}": reason for left, reason in parts[name].report.dropped.items()}
    for name, part in layout.parts.items():
        if part.stem and name not in parts:
            dropped[f"{name}/*"] = "a part that is not used here"
    configs = {name: part.config for name, part in layout.parts.items() if part.config}
    return Checkpoint(
        match.kind,
        system,
        parts,
        prediction=family.predictions[0],
        configs=configs,
        folder=folder,
        dropped=dropped,
        family=family,
    )


def _denoiser_of(
    layout: Layout, folder: Path, families: Families, weights_of: Any
) -> tuple[Family, Weights, Signature]:
    """The family of a diffusers folder, with the tensors of the network that draws and what they are."""
    there = [family for family in families if family.denoiser in layout.parts]
    if not there:
        wanted = " and without ".join(family.called for family in families)
        raise CheckpointError(f"{folder} holds a {layout.kind} without {wanted}, which is of no known kind")
    name, called = there[0].denoiser, there[0].called
    weights = weights_of(name)
    match = identify(shapes(weights), all_signatures(families), str(folder / name))
    family = _family_of(match.kind, families)
    if family is None or (match.part, match.layout) != (name, "diffusers"):
        raise CheckpointError(
            f"{folder / name} holds {match.title} where {called} in diffusers names is right"
        )
    return family, weights, match


def _network(weights: Weights, match: Signature, source: str, family: Family | None) -> Checkpoint:
    """One network alone, in either layout."""
    original = match.layout == "original"
    system, drops = None, ()
    if family is not None:
        system = family.systems[match.kind]
        table = family.denoiser_map(system.denoiser)
        table = table if original else KeyMap(keys.same(table.ours))
        drops = family.extras
    elif match.part == "vae":
        vae = VAES[match.kind]
        table = (keys.vae_map(vae) if original else keys.vae_folder_map(vae)).within(match.prefix, "")
    else:
        alone = TextPart(match.part, TEXTS[match.kind], ("",))
        table = keys.text_folder_map(alone, weights.names())
    ours = KeyMap(table.rules, table.drops + drops).to_ours(weights, source)
    return Checkpoint(
        match.kind,
        system,
        {match.part: ours},
        alone=True,
        prediction=match.traits.get("prediction", "epsilon" if family is None else family.predictions[0]),
        zero_snr=match.traits.get("zero_snr", False),
        dropped=ours.report.dropped,
        family=family,
    )


def _of_kind(found: Checkpoint, source: str, kind: str, family: Family) -> Checkpoint:
    """The checkpoint as one of `kind`, if its tensors allow it; a text encoder gets the name of its place there."""
    name, system = next(iter(found.parts)), family.systems[kind]
    if found.kind == kind:
        return found
    if found.family is family and family.same_tensors.get(kind, kind) == family.same_tensors.get(
        found.kind, found.kind
    ):
        return replace(found, kind=kind, system=system)
    if found.kind in VAES and found.system is None and same_vae(found.kind, system):
        return replace(found, kind=kind, system=system, family=family)
    if found.kind in TEXTS and found.system is None:
        place = next((part for part in system.text if text_kind(part.config) == found.kind), None)
        if place is not None:
            configs = {place.name: found.configs[name]} if name in found.configs else {}
            raw = found.parts[name].weights
            tensors = keys.text_folder_map(place, list(raw)).to_ours(raw, source)
            parts = {place.name: tensors}
            return replace(found, kind=kind, system=system, parts=parts, configs=configs, family=family)
    raise InputError(f"{source} is of {found.kind}, not of {kind}", argument="kind")


def same_vae(kind: str, system: Kind) -> bool:
    """Whether a VAE of that kind, alone, has the tensors of the system's."""
    return same_latents(kind, system) and VAES[kind].temporal == system.vae.temporal


def same_latents(kind: str, system: Kind) -> bool:
    """Whether a VAE of that kind, alone, may make the latents of the system's."""
    theirs, ours = VAES[kind], system.vae
    return (theirs.latent_channels, theirs.use_quant_conv) == (ours.latent_channels, ours.use_quant_conv)


def completed(
    found: Checkpoint, source: str, others: Iterable[str | os.PathLike[str]], families: Families
) -> Checkpoint:
    """A denoiser's checkpoint with the parts that it lacks taken from `others`: whole checkpoints, or single networks.

    `InputError` when it lacks nothing, or when one of the others is of a kind whose parts are different ones.
    """
    family = found.family
    if family is None or not found.draws:
        called = " or ".join(each.called for each in families)
        raise InputError(f"parts goes with {called}; {source} is {found.kind} alone", argument="parts")
    wanted = ["vae", *(part.name for part in found.system.text)]
    if all(name in found.parts for name in wanted):
        raise InputError(f"{source} is whole; parts is for {family.called} alone", argument="parts")
    parts, configs, folder = dict(found.parts), dict(found.configs), found.folder
    for path in others:
        other = open_checkpoint(path, families)
        if other.system is None:
            other = _of_kind(other, str(path), found.kind, family)
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
