"""How a model lies in a folder, in the layout of diffusers: which files hold a part's weights, and which parts it has.

    model_index.json                                     the parts, each with its library and class
    unet/config.json
    unet/diffusion_pytorch_model.fp16.safetensors        stem and variant
    text_encoder/model-00001-of-00002.safetensors        shards, and their index
    text_encoder/model.safetensors.index.json

Names decide, and JSON is read as plain data: a folder that asks for code is refused, and nothing that it names is ever
imported. Nothing here needs torch. Source of the layout: diffusers 0.42, utils/hub_utils.py and
pipelines/pipeline_loading_utils.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.checkpoint.header import shown
from sfumato.errors import CheckpointError
from sfumato.storage import PICKLED, read_json, shard_path

INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' networks, and of transformers'
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
LIBRARIES = {"diffusers", "transformers", "stable_diffusion"}  # the last holds diffusers' safety checker
JSON_LIMIT = 64 * 2**20  # bytes; the largest index of shards is a thousandth of it
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one part's weights: one, or shards in order with their index (tensor name to file)."""

    folder: Path
    files: tuple[str, ...]
    variant: str | None = None
    index: Mapping[str, str] | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.folder / file for file in self.files)


@dataclass(frozen=True)
class Part:
    """One part of a model. library and kind: where its class comes from and what it is called, for information alone.

    config: its JSON, as plain data; empty when it has none. stem: of its weights' files; None when it has none that can
    be read. network: whether it must have some.
    """

    name: str
    library: str
    kind: str
    folder: Path
    config: Mapping[str, Any]
    stem: str | None = None
    network: bool = False


@dataclass(frozen=True)
class Layout:
    """What a model folder says of itself. kind: the pipeline's class, or the network's in a folder of one part.

    parts: those whose folder is there. absent: parts named but not there. options: the other values of the index.
    """

    folder: Path
    kind: str
    parts: Mapping[str, Part]
    absent: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None


def find_parts(folder: str | os.PathLike[str]) -> Layout:
    """The parts of a model folder, or the single part, named "model", of a folder that is one (a VAE, a U-Net).

    `CheckpointError` when the folder is none of both, its JSON is damaged, or it asks for code: `auto_map`,
    `trust_remote_code`, or a class from a library that is neither diffusers nor transformers.
    """
    folder = Path(folder)
    names = _listing(folder)
    if INDEX not in names:
        if "config.json" not in names:
            raise CheckpointError(f"{folder} is no model folder: it holds neither {INDEX} nor config.json")
        part = _part("model", "", folder, names)
        return Layout(folder, part.kind, {"model": part})
    index = read_plain(folder / INDEX)
    kind = _class_name(folder / INDEX, index.get("_class_name"))
    parts: dict[str, Part] = {}
    absent, options = [], {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not _is_part(value):
            options[name] = value
        elif value == [None, None]:
            pass  # a part that the model does without
        elif not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{folder / INDEX} names the part {shown(name)}, which cannot be a folder in it"
            )
        else:
            library, part_kind = _library_and_class(folder / INDEX, name, value)
            if (folder / name).is_dir():
                parts[name] = _part(name, library, folder / name, _listing(folder / name), part_kind)
            else:
                absent.append(name)
    return Layout(folder, kind, parts, tuple(absent), options)


def weight_files(folder: str | os.PathLike[str], stem: str, variant: str | None = None) -> WeightFiles:
    """The files of `folder` that hold the weights called `stem`: `stem[.variant].safetensors`, or shards by an index.

    variant: such as "fp16"; None is the plain one, or else the only one there is. A single file comes before shards of
    the same variant. `CheckpointError` when the variant is absent (it lists those that are there), when there are only
    pickled files, and when an index is damaged, leaves the folder, or names a file that is not there.
    """
    folder = Path(folder)
    names = _listing(folder)
    found = pick_files(names, stem, variant, str(folder))
    if found.single is not None:
        return WeightFiles(folder, (found.single,), found.variant)
    assert found.index is not None  # or it would not have been picked
    index = _read_index(folder, found.index)
    files = tuple(sorted(set(index.values())))
    for file in files:
        if file not in names:
            raise CheckpointError(f"{folder} lacks {file}, which {found.index} names; fetch it again")
    return WeightFiles(folder, files, found.variant, index)


@dataclass(frozen=True)
class Pick:
    """What a listing of names offers of one variant: a single file, or the index of shards, and the shards it names."""

    variant: str | None
    single: str | None = None
    index: str | None = None
    shards: tuple[str, ...] = ()


def pick_files(names: Iterable[str], stem: str, variant: str | None, place: str) -> Pick:
    """Choose among the names of a folder's files; the rule of `weight_files`. `place` names the folder in errors."""
    names = sorted(names)
    offers = _offers(names, stem)
    if variant in offers:
        pick = offers[variant]
    elif variant is None and len(offers) == 1:
        [pick] = offers.values()
    elif offers:
        wanted = f"no {stem} of variant {variant!r}" if variant is not None else f"no plain {stem}"
        there = ", ".join("the plain one" if key is None else repr(key) for key in offers)
        raise CheckpointError(f"{place} holds {wanted}; there is {there}")
    else:
        _complain_of_none(names, stem, place)
    if pick.single is None and pick.index is None:
        raise CheckpointError(
            f"{place} holds {pick.shards[0]}, but not the index of the shards; fetch it again"
        )
    return pick


def stem_of(names: Iterable[str]) -> str | None:
    """The stem of the weights among these names of files, None when there are none."""
    names = list(names)
    return next((stem for stem in STEMS if _offers(names, stem)), None)


def is_network(names: Collection[str]) -> bool:
    """Whether a part with files of these names is a network, and must have weights: schedulers, tokenizers are none."""
    return "config.json" in names and "tokenizer_config.json" not in names


def read_plain(path: Path) -> dict[str, Any]:
    """A JSON object as plain data. `CheckpointError` when it is damaged, far too large, or asks for code."""
    value = read_json(path, limit=JSON_LIMIT, strict=True)
    _refuse_code(path, value)
    return value


def _refuse_code(path: Path, config: dict[str, Any]) -> None:
    """`auto_map` and `trust_remote_code`, at any depth, ask a loader to import Python files of the folder."""
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key in ("auto_map", "trust_remote_code", "custom_pipelines"):
                if value.get(key):
                    raise CheckpointError(f"{path} asks for code of its own ({key}), which is never run here")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _listing(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no folder can have this name"
        raise CheckpointError(f"{folder} cannot be read as a folder: {reason}") from None


def _offers(names: Iterable[str], stem: str) -> dict[str | None, Pick]:
    """Variant to what holds it, the plain one (None) first.

    The variant stands before the last dot of a file, as `model.fp16.safetensors`; in an index before `json`, and in
    older folders elsewhere; in older shards after their number.
    """
    start, between, end = re.escape(stem), r"(?:\.(?P<variant>[A-Za-z0-9_-]+?))?", r"\.safetensors"
    number = r"-\d{5}-of-\d{5}"
    patterns = {
        "shard": (f"{start}{between}{number}{end}", f"{start}{number}{between}{end}"),
        "single": (f"{start}{between}{end}",),
        "index": (
            rf"{start}{end}\.index{between}\.json",
            rf"{start}{end}{between}\.index\.json",
            rf"{start}{between}{end}\.index\.json",
        ),
    }
    found: dict[str | None, dict[str, list[str]]] = {}
    for name in sorted(names):
        for role, forms in patterns.items():
            match = next((m for form in forms if (m := re.fullmatch(form, name))), None)
            if match:
                found.setdefault(match["variant"], {}).setdefault(role, []).append(name)
                break
    return {
        variant: Pick(
            variant,
            roles.get("single", [None])[0],
            roles.get("index", [None])[0],
            tuple(roles.get("shard", ())),
        )
        for variant, roles in sorted(found.items(), key=lambda item: item[0] or "")
    }


def _complain_of_none(names: list[str], stem: str, place: str) -> None:
    pickled = [name for name in names if Path(name).suffix.lower() in PICKLED]
    if pickled:
        raise CheckpointError(
            f"{place} holds only pickled weights ({shown(pickled[0])}), which can run code when opened; use a version "
            "of the model with safetensors files, or convert them on a machine you can lose"
        )
    raise CheckpointError(f"{place} holds no {stem}.safetensors")


def _read_index(folder: Path, file: str) -> dict[str, str]:
    """Tensor name to the shard that holds it."""
    table = read_plain(folder / file).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{folder / file} must have a table 'weight_map' of tensors to files")
    for shard in table.values():
        if shard_path(folder, shard).suffix != ".safetensors":
            raise CheckpointError(
                f"{folder / file} names the shard {shown(shard)}, which is no safetensors file"
            )
    return table


def _part(name: str, library: str, folder: Path, names: set[str], kind: str = "") -> Part:
    config_file = next((file for file in CONFIGS if file in names), None)
    config = read_plain(folder / config_file) if config_file else {}
    own = config.get("_class_name")
    if own is not None:
        own = _class_name(folder / str(config_file), own)
    return Part(name, library, kind or own or "", folder, config, stem_of(names), is_network(names))


def _class_name(path: Path, name: Any) -> str:
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    if isinstance(name, list):
        raise CheckpointError(
            f"{path} asks for code of its own (_class_name {shown(str(name))}), which is never run here"
        )
    raise CheckpointError(f"{path} must name a class under '_class_name', not {shown(str(name))}")


def _is_part(value: Any) -> bool:
    """Whether a value of the index is a library and a class; others are options of the pipeline."""
    return isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value)


def _library_and_class(path: Path, part: str, value: list[Any]) -> tuple[str, str]:
    library, kind = str(value[0]), value[1]
    if library not in LIBRARIES:
        raise CheckpointError(
            f"{path} asks for code of {shown(library)} for the part {part}, which is never run here; "
            f"parts are of {', '.join(sorted(LIBRARIES))}"
        )
    return library, _class_name(path, kind)
