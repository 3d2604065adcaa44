"""Pictures of the class that a subject is of, drawn by the model itself before it is trained, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from sfumato.errors import StaleCacheError
from sfumato.generate import BATCH, Model, to_image
from sfumato.storage import atomic_file, read_json, write_json
from sfumato.train.recipe import PriorRecipe

CARD = "drawn.json"


def draw_class(
    model: Model,
    recipe: PriorRecipe,
    folder: Path,
    size: int,
    seed: int,
    identity: str,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fill `folder` with `recipe.count` captioned pictures of `size` pixels a side, those that are there excepted.

    Picture k is drawn from seed + k, so that a run that was stopped goes on to the same pictures. identity: of the
    model. `StaleCacheError` when the folder holds pictures of something else.
    """
    changes = {"steps": recipe.steps or None, "guidance": recipe.guidance or None}
    wanted = [identity, recipe.prompt, size, seed, changes]
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD).exists():
        write_json(folder / CARD, {"key": key, "prompt": recipe.prompt})
    elif read_json(folder / CARD).get("key") != key:
        raise StaleCacheError(
            f"{folder} holds pictures that another recipe drew; give another --out, or remove that folder"
        )
    names = [folder / f"{k:05d}.png" for k in range(recipe.count)]
    missing = [k for k, path in enumerate(names) if not path.exists()]
    done = recipe.count - len(missing)
    given = {name: value for name, value in changes.items() if value is not None}
    for start in range(0, len(missing), BATCH):
        some = missing[start : start + BATCH]
        pixels = model.generate_pixels(
            [recipe.prompt] * len(some), [seed + k for k in some], size=(size, size), **given
        )
        for k, picture in zip(some, pixels, strict=True):
            names[k].with_suffix(".txt").write_text(recipe.prompt, encoding="utf-8")
            with atomic_file(names[k]) as temporary:
                to_image(picture[:, None]).save(temporary, format="PNG")
        done += len(some)
        on_progress(done, recipe.count)
