"""A request as clients send it: JSON in which pictures, a clip and LoRAs are ids of files, sent before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sfumato import checks
from sfumato.errors import DataError, InputError
from sfumato.serve.store import is_id

if TYPE_CHECKING:
    from sfumato.types import Request

LORAS = "loras"  # the field that names them
PICTURE, CLIP = "picture", "clip"  # what a job draws
MOST_FILES = 16  # of one request
MOST_PIXELS = 100_000_000  # of the frames of a clip to begin with, together; three bytes each


def files_of(request: Mapping[str, Any]) -> dict[str, str]:
    """The ids of pictures, a clip and LoRAs that a request names, and the field where each stands first. `InputError`
    for what is none where a picture or a clip belongs, and for too many."""
    places = [(name, request.get(name)) for name in ("image", "mask", "clip")]
    controls = request.get("controls")
    if isinstance(controls, list):
        places += [("controls", each.get("image")) for each in controls if isinstance(each, dict)]
    found: dict[str, str] = {}
    for name, value in places:
        if value is None:
            continue
        if not isinstance(value, str) or not value.startswith("file_"):
            raise InputError(
                f"{name} must be the id of an uploaded file, such as file_…, not {checks.shown(value)}; send files "
                "to /v1/files",
                argument=name,
            )
        found.setdefault(value, name)
    for name in loras_of(request):
        found.setdefault(name, LORAS)
    if len(found) > MOST_FILES:
        first = list(found.values())[MOST_FILES]
        raise InputError(f"a request names at most {MOST_FILES} files", argument=first)
    return found


def loras_of(request: Mapping[str, Any]) -> list[str]:
    """The ids of LoRAs that a request names, in its order; what has another name is the server's own."""
    uses = request.get(LORAS)
    if not isinstance(uses, list):
        return []
    names: list[Any] = [each.get("name") if isinstance(each, dict) else each for each in uses]
    return [name for name in names if is_id(name, "file")]


def request_of(values: Mapping[str, Any], files: Mapping[str, bytes]) -> Request:
    """The request, with the pictures in it. Errors of `Request.from_dict` and of decoding, which name the argument."""
    from sfumato.pictures import BLACK, decode, decode_mask
    from sfumato.types import MAX_FRAMES, Request
    from sfumato.video.read import decode_clip

    values = dict(values)
    for name, read in (("image", decode), ("mask", decode_mask)):
        if values.get(name) is not None:
            values[name] = _read(name, values[name], files, read)
    if values.get("clip") is not None:
        wanted = values.get("frames")
        most = wanted if isinstance(wanted, int) and 0 < wanted <= MAX_FRAMES else None
        values["clip"] = _read(
            "clip",
            values["clip"],
            files,
            lambda data, what: decode_clip(data, what, frames=most, most=MOST_PIXELS),
        )
    if isinstance(values.get("controls"), list):
        values["controls"] = [
            {
                **each,
                "image": _read(
                    "controls", each["image"], files, lambda data, what: decode(data, what, BLACK)
                ),
            }
            if isinstance(each, dict) and each.get("image") is not None
            else each
            for each in values["controls"]
        ]
    return Request.from_dict(values)


def _read(name: str, value: Any, files: Mapping[str, bytes], read: Any) -> Any:
    if not isinstance(value, str) or value not in files:
        raise InputError(f"{name} must be the id of an uploaded file", argument=name)
    try:
        return read(files[value], name)
    except DataError as error:
        raise InputError(str(error), argument=name) from None
