"""The only rooms that know families of models by name. `open_model` opens whatever a user may name.

A family of our own is a module with these functions:

    open_folder(directory, device) -> System      the packaged or trained model in a folder
    save_folder(system, directory, extra)         write it so that `open_folder` reads it back

and, where it can be trained from a recipe, with these too:

    DenoiserConfig, Preset                        what the recipe's tables [denoiser] and [preset] may say
    configure(autoencoder, denoiser, words, preset) -> config
    build(config) -> System                       fresh weights

`FAMILIES` maps the name that a model folder states to the module, imported when it is first asked for. Checkpoints that
others made are opened by `CHECKPOINTS`, which tells their families apart by names and shapes of their tensors.
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

FAMILIES = {"pocket": "sfumato.families.pocket"}
PACKAGED = {"pocket": Path(__file__).parent / "pocket" / "weights"}
DEFAULT_MODEL = "pocket"
DEFAULT_FAMILY = "pocket"  # of a recipe that names none
CARD = "model.json"
UNUSED = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)  # parts of a Hub's folder that nothing here reads
CHECKPOINTS = "sfumato.families.sd.system"


def family_named(name: str) -> ModuleType:
    """The module of a family; an unknown name is an `InputError` that lists the known ones."""
    if name not in FAMILIES:
        raise InputError(f"family {name!r} is unknown; known are {', '.join(FAMILIES)}", argument="family")
    return importlib.import_module(FAMILIES[name])


def model_folder(directory: Path) -> Path:
    """`directory`, or the `model/` in it, as training runs have; `CheckpointError` when neither has a card."""
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no model {str(directory)!r}: give a packaged one ({', '.join(PACKAGED)}), a folder, a "
            ".safetensors file, or org/name of the Hub"
        )
    for place in (directory, directory / "model"):
        if (place / CARD).is_file():
            return place
    raise CheckpointError(f"{directory} is not a model folder: it holds no {CARD}")


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

    dtype: of a checkpoint's weights. options: of `open_system` of the checkpoints' module; None in them is nothing
    asked, and the offload "auto" reads nothing of a checkpoint before it is needed. `InputError` when options are given
    for a model of our own, which has nothing to choose.
    """
    asked = {name: value for name, value in (options or {}).items() if value is not None}
    lazy = asked.get("offload") == "auto" and asked.pop("offload") == "auto"
    path = PACKAGED.get(str(model), Path(model))
    if not path.exists():
        from sfumato.checkpoint.hub import fetch, is_hub_id

        if is_hub_id(str(model)):
            path = fetch(str(model), asked.get("variant"), UNUSED, progress=True)
    if path.is_file() or (
        path.is_dir() and any((path / n).is_file() for n in ("model_index.json", "config.json"))
    ):
        asked |= {"offload": "model"} if lazy else {}
        return _open_checkpoint(importlib.import_module(CHECKPOINTS), path, device, dtype, asked)
    family = family_of(path)
    if asked:
        raise InputError(
            f"{next(iter(asked))} is for checkpoints; {str(model)!r} is whole as it is",
            argument=next(iter(asked)),
        )
    return family.open_folder(model_folder(path), device)


def _open_checkpoint(
    module: ModuleType, path: Path, device: torch.device, dtype: torch.dtype, asked: dict[str, Any]
) -> Any:
    """By the module's `open_system`. `InputError` for what that does not know: an option of another family."""
    known = inspect.signature(module.open_system).parameters
    for name in asked:
        if name not in known:
            raise InputError(
                f"{name} is for checkpoints of another family than that of {str(path)!r}; leave it out",
                argument=name,
            )
    return module.open_system(path, device, dtype, **asked)
