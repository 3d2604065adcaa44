"""Bodies read strictly: JSON without doubtful spots, forms within limits, files decoded before they are kept."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sfumato import pictures
from sfumato.errors import DataError
from sfumato.serve.asked import MOST_PIXELS
from sfumato.serve.books import Books, room_on_disk
from sfumato.serve.job import now
from sfumato.serve.keys import Key
from sfumato.serve.ledger import Upload
from sfumato.serve.refusals import Refused, bad
from sfumato.serve.store import new_id
from sfumato.storage import strict_json
from sfumato.video import formats
from sfumato.video.read import READ, decode_clip

RETRIES = "x-stainless-retry-count"  # of OpenAI's clients, which begin with 0
FIELD = 2**20  # bytes of a form's text field


async def json_body(request: Request) -> tuple[dict[str, Any], str]:
    """The JSON object of a body, and the hash of what it says. `Refused` for anything else."""
    if kind_of_body(request) != "application/json":
        raise Refused(415, "unsupported_media_type", "send JSON, with Content-Type: application/json")
    value = json_of(await request.body())
    return value, digest_of(value)


def kind_of_body(request: Request) -> str:
    """The media type that a body is said to have."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_of(data: bytes | str, param: str | None = None) -> dict[str, Any]:
    """The JSON object in a body, or in a field of a form. `Refused` for anything else."""
    what = "the body" if param is None else param
    try:
        value = strict_json(data.decode("utf-8") if isinstance(data, bytes) else data)
    except RecursionError:
        raise bad(f"{what}'s JSON is nested too deeply", param) from None
    except ValueError as error:
        raise bad(f"{what} is not readable JSON: {str(error)[:200]}", param) from None
    if not isinstance(value, dict):
        raise bad(f"{what} must be a JSON object", param)
    return value


def digest_of(value: Any, *more: bytes) -> str:
    """SHA-256 of JSON, however it was spelled, and of bytes."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for data in more:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


async def form_body(request: Request) -> FormData:
    """The form of a body, whose files go to a temporary disk. `Refused` for anything else, and where that is full."""
    if kind_of_body(request) != "multipart/form-data":
        raise Refused(415, "unsupported_media_type", "send a form: multipart/form-data")
    try:
        with room_on_disk():
            return await request.form(max_files=8, max_fields=64, max_part_size=FIELD)
    except HTTPException as error:
        raise bad(f"the form cannot be read: {str(error.detail)[:200]}") from None
    except (ValueError, KeyError, UnicodeDecodeError):
        raise bad("the form cannot be read") from None


async def file_of(form: FormData, *names: str) -> bytes | None:
    """The bytes of the one file of a form, as `upload_of`."""
    found = upload_of(form, *names)
    return None if found is None else await found.read()


def upload_of(form: FormData, *names: str) -> UploadFile | None:
    """The one file of a form under one of these names; None if there is none. `Refused` for several, or for text."""
    found = [value for name in names for value in form.getlist(name)]
    if not found:
        return None
    if len(found) > 1:
        raise bad(f"give one {names[0]}, not {len(found)}", names[0])
    if not isinstance(found[0], UploadFile):
        raise bad(f"{names[0]} must be a file", names[0])
    return found[0]


def idempotency_of(request: Request) -> str | None:
    """The Idempotency-Key header, if there is one. `Refused` for one that cannot be kept."""
    value = request.headers.get("idempotency-key")
    if value is not None and not (0 < len(value) <= 255 and value.isascii() and value.isprintable()):
        raise bad("an idempotency key has 1 to 255 printable ASCII characters", "Idempotency-Key")
    return value


def is_retry(headers: Mapping[str, str]) -> bool:
    """Whether OpenAI's client says that it tries again."""
    return headers.get(RETRIES, "0") not in ("", "0")


def may_retry(headers: Mapping[str, str]) -> bool:
    """Whether it counts its tries: then who hangs up may come back."""
    return RETRIES in headers


def unbase64(value: Any, param: str, what: str | None = None) -> bytes:
    """The bytes of base64, with or without what a data: URL begins with. `Refused`, which calls it `what`, for anything
    else, as addresses.
    """
    what = what or param
    if not isinstance(value, str):
        raise bad(f"{what} must be a picture as base64", param)
    head, comma, _ = value[:100].partition(",")
    text = value[len(head) + 1 :] if comma and head.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad(f"{what} must be a picture as base64; addresses are not followed", param) from None


async def look_at_picture(books: Books, key: Key, data: bytes, param: str = "image") -> Upload:
    """What to keep a picture as, which is decoded to know that it is one. `Refused` for what is none."""
    return await _looked(books, key, data, param, _picture)


async def look_at_file(books: Books, key: Key, data: bytes, param: str) -> Upload:
    """The same of a picture or a clip, of which only the beginning is decoded."""
    return await _looked(books, key, data, param, _picture_or_clip)


async def _looked(
    books: Books, key: Key, data: bytes, param: str, look: Callable[[bytes, str], pictures.Header]
) -> Upload:
    try:
        header = await books.work(look, data, param)
    except DataError as error:
        raise Refused(400, error.code, str(error), param=param) from None
    return Upload(new_id("file"), key.id, header.format, len(data), header.width, header.height, now())


def _picture(data: bytes, name: str) -> pictures.Header:
    """Its size is told as it stands upright."""
    kind = pictures.read_header(data, f"the {name}").format
    return pictures.Header(kind, *pictures.decode(data, f"the {name}").size)


def _picture_or_clip(data: bytes, name: str) -> pictures.Header:
    """A WebP that moves is a picture, too: its first."""
    kind = formats.sniff(data[:64])
    if kind is None and name == "file" and pictures.sniff(data[:64]) is None:
        what = pictures.describe(data[:64]) if data else "empty"
        what = "no picture, clip or LoRA" if what == pictures.UNKNOWN else what
        raise DataError(f"the file is {what}; PNG, JPEG, WebP, {READ}, and of LoRAs .safetensors")
    if name != "clip" and kind in (None, "webp"):
        return _picture(data, name)
    clip = decode_clip(data, f"the {name}", argument=name, frames=2, most=MOST_PIXELS)
    return pictures.Header(kind or "", *clip.size)
