"""What a file says of itself, so that a later edit shows: digests of the pixels that were drawn, and of the recipe.

They lie in the recipe under `drawn`. They find accidents and careless edits; who knows how they are made can make them
anew. What nobody else can make is a seal (`signing`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfumato.pictures import fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWN = "drawn"
APART = (DRAWN, "frame")  # of a recipe: what is added when a file is written


def with_digests(recipe: Mapping[str, Any], frames: Sequence[Image]) -> dict[str, Any]:
    """The recipe of one picture, or of a clip's frames, with both digests; doing it twice changes nothing."""
    told = {name: value for name, value in recipe.items() if name != DRAWN}
    return told | {DRAWN: {"pixels": of_pixels(frames), "recipe": of_recipe(recipe)}}


def of_pixels(frames: Sequence[Image]) -> str:
    """SHA-256 of the frames as RGB: their number, sizes and values."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(fingerprint(frame.convert("RGB")).encode())
    return digest.hexdigest()


def of_recipe(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of the recipe as JSON with its names in order, without what is added when a file is written."""
    told = {name: value for name, value in recipe.items() if name not in APART}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def drawn(recipe: Mapping[str, Any], name: str) -> str | None:
    """The digest that a recipe, which may be a stranger's, holds by that name: `pixels` or `recipe`."""
    told = recipe.get(DRAWN)
    found = told.get(name) if isinstance(told, Mapping) else None
    return found if isinstance(found, str) else None
