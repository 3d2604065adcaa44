"""The only rooms that know families of models by name. `open_model` opens whatever a user may name.

A family of our own is a module with these functions:

    open_folder(directory, device) -> System      the packaged or trained model in a folder
    open_autoencoder(directory, device)           its autoencoder alone
    save_folder(system, directory, extra)         write it so that `open_folder` reads it back
    control_title(shapes, metadata)               as of `published.kinds.Family`

and, where it can be trained from a recipe, with these too:

    DenoiserConfig, Preset                        what the recipe's tables [denoiser] and [preset] may say
    configure(autoencoder, denoiser, words, preset) -> config
    build(config) -> System                       fresh weights

`FAMILIES` maps the name that a model folder states to the module, imported when it is first asked for.

A family of checkpoints that others made is a folder in `CHECKPOINTS` with two modules:

    family.FAMILY                                 its tables for the shared rooms (`published/kinds.py`)
    system.build(found, name, device, dtype, families, **options) -> System
    system.usual_preset(found) -> Preset          of a kind of which nothing more is known

Which of them a checkpoint is of, names and shapes of its tensors tell, over all families together.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sfumato.errors import CheckpointError, InputError
from sfumato.storage import read_json

if TYPE_CHECKING:
    import torch

    from sfumato.families.published.kinds import Family

FAMILIES = {"pocket": "sfumato.families.pocket"}
PACKAGED = {"pocket": Path(__file__).parent / "pocket" / "weights"}
DEFAULT_MODEL = "pocket"
DEFAULT_FAMILY = "pocket"  # of a recipe that names none
CARD = "model.json"
UNUSED = ("safety_checker", "feature_extractor")  # parts of a Hub's folder that nothing here reads
CHECKPOINTS = ("sd", "sd3", "svd")
ALIASES = {  # options of the command line that have a shorter name, for one family's text encoders
    "--no-t5": ("--without", "t5"),
    "--no-clip-l": ("--without", "clip_l"),
    "--no-clip-g": ("--without", "clip_g"),
}


def family_named(name: str) -> ModuleType:
    """The module of a family; an unknown name is an `InputError` that lists the known ones."""
    if name not in FAMILIES:
        raise InputError(f"family {name!r} is unknown; known are {', '.join(FAMILIES)}", argument="family")
    return importlib.import_module(FAMILIES[name])


def model_folder(directory: Path) -> Path:
    """`directory`, or the `model/` in it, as training runs have; `CheckpointError` when neither has a card."""
    if not directory.is_dir():
        if directory.suffix == ".safetensors":
            raise CheckpointError(f"there is no file {str(directory)!r}")
        raise CheckpointError(
            f"there is no model {str(directory)!r}: give a packaged one ({', '.join(PACKAGED)}), a folder, a "
            ".safetensors file, or org/name of the Hub"
        )
    for place in (directory, directory / "model"):
        if (place / CARD).is_file():
            return place
    raise CheckpointError(f"{directory} is not a model folder: it holds neither {CARD} nor model_index.json")


def family_of(directory: Path) -> ModuleType:
    """The family of a model folder, by its card; `CheckpointError` when there is no card, or it names none we know."""
    directory = model_folder(directory)
    name = read_json(directory / CARD).get("family")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{directory / CARD} names the family {name!r}; known are {', '.join(FAMILIES)}"
        )
    return family_named(name)


def open_model(
    model: str | Path, device: torch.device, dtype: torch.dtype, options: dict[str, Any] | None = None
) -> Any:
    """The system of a packaged model, a model folder, a checkpoint (a file, a diffusers folder) or a Hub id.

    dtype: of a checkpoint's weights. options: variant, prediction and parts of `published.system.opened`, and those of
    the family's `build`; None in them is nothing asked, and the offload "auto" reads nothing of a checkpoint before it
    is needed. `InputError` when options are given for a model of our own, which has nothing to choose, or one that the
    checkpoint's family does not know.
    """
    asked = {name: value for name, value in (options or {}).items() if value is not None}
    lazy = asked.get("offload") == "auto" and asked.pop("offload") == "auto"
    path = located(model, asked.get("variant"))
    if is_checkpoint(path):
        asked |= {"offload": "model"} if lazy else {}
        return _open_checkpoint(path, device, dtype, asked)
    family = family_of(path)
    if asked:
        raise InputError(
            f"{next(iter(asked))} is for checkpoints; {str(model)!r} is whole as it is",
            argument=next(iter(asked)),
        )
    return family.open_folder(model_folder(path), device)


def located(model: str | Path, variant: str | None = None) -> Path:
    """Where what a user names lies: the folder of a packaged model, a path, or what is fetched of the Hub."""
    if model == "":
        raise InputError("the model's name is empty; name a model, a folder or a file", argument="model")
    path = PACKAGED.get(str(model), Path(model))
    if not path.exists():
        from sfumato.checkpoint.hub import fetch, is_hub_id

        if is_hub_id(str(model)):
            return fetch(str(model), variant, UNUSED, progress=True)
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether it is a file of weights or a folder in the layout of diffusers, and no model folder of our own."""
    return path.is_file() or any((path / name).is_file() for name in ("model_index.json", "config.json"))


def checkpoint_families() -> tuple[Family, ...]:
    """The families of checkpoints that others made."""
    names = [f"sfumato.families.{name}.family" for name in CHECKPOINTS]
    return tuple(importlib.import_module(name).FAMILY for name in names)


def system_module(family: Family) -> ModuleType:
    """The module in which a family's checkpoints become systems."""
    return importlib.import_module(f"sfumato.families.{family.name}.system")


def _stranger(name: str, value: Any, path: Path, kind: str) -> InputError:
    """What to say of an option that the family of a checkpoint does not know: what a user calls it, and whose it is."""
    option = f"--{name.replace('_', '-')}"
    if name == "without":
        option = " and ".join(f"--without {part}" for part in value)
    knowing = [
        family
        for family in checkpoint_families()
        if name in inspect.signature(system_module(family).build).parameters
    ]
    kinds = " or ".join(f"{family.name} ({', '.join(family.systems)})" for family in knowing)
    return InputError(
        f"{option} is for checkpoints of the family {kinds}; {str(path)!r} is of {kind}: leave it out",
        argument=name,
    )


def _open_checkpoint(path: Path, device: torch.device, dtype: torch.dtype, asked: dict[str, Any]) -> Any:
    """By the `build` of the family that it is of."""
    from sfumato.families.published.system import opened

    families = checkpoint_families()
    first = {name: asked.pop(name) for name in ("variant", "prediction", "parts") if name in asked}
    found = opened(path, families, **first)
    assert found.family is not None  # or it could not draw
    build = system_module(found.family).build
    known = inspect.signature(build).parameters
    for name in asked:
        if name not in known:
            raise _stranger(name, asked[name], path, found.kind)
    return build(found, str(path), device, dtype, families, **asked)
