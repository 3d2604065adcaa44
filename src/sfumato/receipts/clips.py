"""Clips to files that say how they were made, and back.

mp4, webm: the container's metadata, `sfumato` (the whole recipe as JSON), `comment` (the form of AUTOMATIC1111's web
UI) and `digitalsourcetype`, IPTC's mark of what a model made; mp4 also has that mark in XMP, where it belongs. WebP:
EXIF and XMP, as pictures. GIF: the recipe is its comment, and XMP has the mark. A folder: each PNG says it, as pictures
do.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import InputError, SfumatoError
from sfumato.receipts import provenance
from sfumato.receipts.digests import with_digests
from sfumato.video.formats import BY_PYAV, FOLDER, format_of, pyav
from sfumato.video.xmp import WRITERS

if TYPE_CHECKING:
    from sfumato.types import Clip, Result


def check_output(path: str | os.PathLike[str], count: int = 1) -> None:
    """Raise `InputError` now if `count` clips could not be written to `path` later: the ending, the folder it lies in,
    what stands there already, and what writes such a file.
    """
    kind = format_of(path)
    if kind in BY_PYAV:
        pyav("output")
    files = provenance.targets(path, count)
    provenance.check_place(path, files, folder=kind == FOLDER)
    for file in files if kind == FOLDER else ():
        if os.path.lexists(file):
            raise InputError(
                f"output {str(file)[:200]!r} exists; name a folder that does not", argument="output"
            )


def save_clips(result: Result, path: str | os.PathLike[str]) -> list[Path]:
    """Write every clip of `result` with its recipe; all appear, or on a failure none does. Returns files, or folders.

    The recipe in clip k is that of clip k alone: count 1 and its own seed.
    """
    from sfumato.video.write import check_clip, staged, write_clip

    check_output(path, len(result.clips))
    kind, files = format_of(path), provenance.targets(path, len(result.clips))
    for clip in result.clips:
        check_clip(clip, kind)
    try:
        with contextlib.ExitStack() as stack:
            for k, (clip, file) in enumerate(zip(result.clips, files, strict=True)):
                recipe = with_digests(provenance.recipe_of(result.recipe, k), clip.frames)
                place = stack.enter_context(staged(file))
                write_clip(clip, place, kind, notes_of(recipe, kind), **_metadata(recipe, kind))
    except OSError as error:
        raise SfumatoError(f"{path} could not be written: {error.strerror or error}") from error
    return files


def encoded(clip: Clip, recipe: dict[str, Any], kind: str) -> bytes:
    """The bytes of a file of this format, such as mp4, with one clip, its recipe, and the digests of both."""
    from sfumato.video.write import write_clip

    recipe = with_digests(recipe, clip.frames)
    with tempfile.TemporaryDirectory(prefix="sfumato-") as folder:
        place = Path(folder) / f"clip.{kind}"
        write_clip(clip, place, kind, notes_of(recipe, kind), **_metadata(recipe, kind))
        return place.read_bytes()


def notes_of(recipe: dict[str, Any], kind: str) -> dict[str, str]:
    """What the container is to say. A GIF has room for one text."""
    if kind == "gif":
        return {"sfumato": json.dumps(recipe)}
    return {
        "sfumato": json.dumps(recipe),
        "comment": provenance.parameters(recipe),
        "digitalsourcetype": provenance.source_type(recipe),
    }


def _metadata(recipe: dict[str, Any], kind: str) -> dict[str, Any]:
    """What pictures of such a format have; XMP without the recipe where the notes hold it."""
    if kind == "webp":
        return provenance.exif_and_xmp(recipe)
    if kind in WRITERS:
        return {"xmp": provenance.mark(recipe).encode()}
    if kind == FOLDER:
        return {
            "save_picture": lambda frame, file, number: provenance.save_png(
                frame, file, recipe | {"frame": number}
            )
        }
    return {}


def read_recipe(path: str | os.PathLike[str], argument: str = "file") -> dict[str, Any]:
    """The recipe inside a clip written by `save_clips`. Raises `InputError` if there is none or it is no clip."""
    from sfumato.video.read import notes, read_clip

    found = notes(path, argument)
    text = found.get("comment", "")
    if "sfumato" not in found and text.startswith("{"):  # of a GIF
        found = found | {"sfumato": text}
    recipe = provenance.recipe_in(found, path)
    if recipe is None:
        if Path(path).suffix.lower().removeprefix(".") in BY_PYAV:
            read_clip(path, argument=argument, frames=1)  # one that is cut off says so
        raise InputError(f"{path} carries no recipe of ours")
    return recipe
