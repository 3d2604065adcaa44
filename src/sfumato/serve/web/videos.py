"""Clips, as pictures are drawn: /v1/videos. A body is JSON as of /v1/jobs, or a form that brings its files along."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData

from sfumato import checks
from sfumato.serve.asked import CLIP
from sfumato.serve.desk import Desk
from sfumato.serve.refusals import bad
from sfumato.serve.store import CLIPS
from sfumato.serve.web import jobs
from sfumato.serve.web.body import digest_of, file_of, form_body, json_of, kind_of_body, look_at_file
from sfumato.serve.web.jobs import FIELDS, Family, key_of
from sfumato.serve.web.schema import BINARY

EXAMPLE = {"prompt": "a red ball rolls to the left", "frames": 9, "seed": 7}
FAMILY = Family(
    kind=CLIP,
    path="/videos",
    estimate="/videos/estimate",
    preflight="/videos/preflight",
    outputs="clips",
    output="clip",
    media=CLIPS,
    example={"request": EXAMPLE, "previews": 4},
)
FILES = ("image", "clip")  # of a form: what a clip begins with
NUMBERS = {"previews": int, "deadline": float}


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(prefix="/v1", tags=["videos"])

    async def read(request: Request) -> jobs.Body:
        if kind_of_body(request) != "multipart/form-data":
            return await jobs.json_of(request)
        form = await form_body(request)
        body, digest = _texts(form), []
        files = {name: await file_of(form, name) for name in FILES}
        wanted = body.setdefault("request", {})
        for name, data in files.items():
            if data is None:
                continue
            if name in wanted:
                raise bad(f"{name} is given twice, in the request and as a file", name)
            digest.append(data)
        found = digest_of({**body, "files": [name for name in FILES if files[name] is not None]}, *digest)
        brought = {}
        for name, data in files.items():
            if data is not None:
                upload = await look_at_file(desk.books, key_of(request), data, name)
                wanted[name], brought[upload.id] = upload.id, (upload, data)
        return body, found, brought

    schema = FAMILY.schema
    binary = dict.fromkeys(FILES, BINARY)
    form = {**schema, "required": [], "properties": {**schema["properties"], **binary}}
    example = {"request": {"frames": 9, "seed": 7}, "image": "start.png"}
    jobs.add(router, desk, FAMILY, read, {"schema": form, "example": example})
    return router


def _texts(form: FormData) -> dict[str, Any]:
    """The text fields of a form as JSON has them: `request` is JSON itself."""
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in FILES:
            continue
        if name not in FIELDS or not isinstance(value, str):
            raise bad(f"unknown field {checks.shown(name)}; a form has {', '.join((*FIELDS, *FILES))}", name)
        if name in found:
            raise bad(f"give one {name}", name)
        if name == "request":
            found[name] = json_of(value, "request")
            continue
        try:
            found[name] = NUMBERS.get(name, str)(value)
        except ValueError:
            number = "a whole number" if NUMBERS.get(name) is int else "a number"
            raise bad(f"{name} must be {number}, not {checks.shown(value)}", name) from None
    return found
