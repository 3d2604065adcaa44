"""The only rooms that know families of models by name. A family is a module with these functions:

    open_folder(directory, device) -> System      the packaged or trained model in a folder
    save_folder(system, directory, extra)         write it so that `open_folder` reads it back

and, where it can be trained from a recipe, with these too:

    DenoiserConfig, Preset                        what the recipe's tables [denoiser] and [preset] may say
    configure(autoencoder, denoiser, words, preset) -> config
    build(config) -> System                       fresh weights

`FAMILIES` maps the name that a model folder states to the module, imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from sfumato.errors import CheckpointError, InputError
from sfumato.storage import read_json

FAMILIES = {"pocket": "sfumato.families.pocket"}
PACKAGED = {"pocket": Path(__file__).parent / "pocket" / "weights"}
DEFAULT_MODEL = "pocket"
DEFAULT_FAMILY = "pocket"  # of a recipe that names none
CARD = "model.json"


def family_named(name: str) -> ModuleType:
    """The module of a family; an unknown name is an `InputError` that lists the known ones."""
    if name not in FAMILIES:
        raise InputError(f"family {name!r} is unknown; known are {', '.join(FAMILIES)}", argument="family")
    return importlib.import_module(FAMILIES[name])


def model_folder(directory: Path) -> Path:
    """`directory`, or the `model/` in it, as training runs have; `CheckpointError` when neither has a card."""
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no model {str(directory)!r}: give a packaged one ({', '.join(PACKAGED)}) or a model folder"
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
