"""The native API of pictures: files, estimates, jobs with their events, results and receipts, and what was used."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from sfumato.serve.asked import PICTURE
from sfumato.serve.desk import Desk
from sfumato.serve.job import now
from sfumato.serve.keys import Key
from sfumato.serve.ledger import Record, Upload, check_days, day_of, month_of
from sfumato.serve.refusals import bad, file_gone, not_found
from sfumato.serve.store import LORA, MEDIA, UPLOADS, is_id
from sfumato.serve.web import jobs
from sfumato.serve.web.answers import Answer
from sfumato.serve.web.files import kept
from sfumato.serve.web.jobs import MOST_LISTED, Family, key_of, told, whole
from sfumato.serve.web.schema import BINARY, EXAMPLE, sends

PICTURES = Family(
    kind=PICTURE,
    path="/jobs",
    estimate="/estimate",
    preflight="/preflight",
    outputs="pictures",
    output="picture",
    media=MEDIA,
    example={"request": EXAMPLE, "previews": 4},
)

Find = Callable[[str], Coroutine[Any, Any, Any]]
Read = Callable[..., Coroutine[Any, Any, list[Any]]]


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(prefix="/v1", tags=["native"])

    @router.post("/files", status_code=201, summary="Send a picture, a clip or a LoRA; its id may stand in requests",
                 openapi_extra={"requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {
                "file": BINARY}}, "example": {"file": "start.png"}},
            **{kind: {"schema": BINARY, "example": f"the bytes of a file of {kind}"} for kind in UPLOADS.values()},
            UPLOADS[LORA]: {"schema": BINARY, "example": "the bytes of ink.safetensors, or of any other file"},
        }}})  # fmt: skip
    async def send(request: Request) -> Response:
        return Answer(_file(await kept(desk, key_of(request), request)), 201)

    @router.get("/files", summary="The latest files of this key, the newest first")
    async def files(request: Request, limit: str = "20", before: str | None = None) -> Response:
        key = key_of(request)
        find, read = partial(_upload, desk, key), partial(desk.books.write, desk.ledger.uploads_of, key.id)
        return Answer(await _page(limit, before, "file", find, read, _file))

    @router.get("/files/{file}", summary="A file that was sent", **sends(*UPLOADS.values()))
    async def sent(request: Request, file: str) -> Response:
        upload = await _upload(desk, key_of(request), file)
        path = await desk.books.work(desk.store.upload, file)
        if path is None:
            raise file_gone(file)
        return FileResponse(path, media_type=UPLOADS[upload.format])

    @router.delete("/files/{file}", summary="Forget a file")
    async def forget(request: Request, file: str) -> Response:
        await _upload(desk, key_of(request), file)
        await desk.books.drop(file)
        return Answer({"object": "file", "id": file, "deleted": True})

    @router.get("/jobs", summary="The latest jobs of this key, of pictures and of clips, the newest first")
    async def latest(request: Request, limit: str = "20", before: str | None = None) -> Response:
        tenant = key_of(request).id

        async def find(job: str) -> Record:
            return (await desk.find(tenant, job))[0]

        def tell(record: Record) -> dict[str, Any]:
            live = desk.floor.live.get(record.id)
            return told(desk, live.record if live else record, live)

        read = partial(desk.books.write, desk.ledger.jobs_of, tenant)
        return Answer(await _page(limit, before, "job", find, read, tell))

    jobs.add(router, desk, PICTURES, jobs.json_of)

    @router.get("/usage", summary="What this key has used, by day")
    async def usage(request: Request, since: str | None = None, until: str | None = None) -> Response:
        key, time = key_of(request), now()
        first, last = since or f"{month_of(time)}-01", until or day_of(time)
        check_days(first, last)
        rows = await desk.books.write(desk.ledger.usage, first, last, key.id)
        used = await desk.books.write(desk.ledger.committed, key.id, time)
        days = [{name: value for name, value in row.items() if name != "tenant"} for row in rows]
        return Answer({
            "object": "usage", "currency": desk.prices.currency, "since": first, "until": last, "days": days,
            "month": {"spent_and_reserved_micros": used, "budget_micros": key.budget},
        })  # fmt: skip

    return router


async def _page(
    limit: str, before: str | None, kind: str, find: Find, read: Read, tell: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Part of a list, the newest first. kind: of ids. find: what `before` names. read: so many, from a place on."""
    count, place = whole(limit, "limit", 1, MOST_LISTED), dict[str, Any]()
    if before is not None and is_id(before, kind):
        place["after"] = await find(before)
    elif before is not None:
        place["before"] = _number(before, "before", kind)
    found = await read(count + 1, **place)
    return {
        "object": "list",
        "data": [tell(each) for each in found[:count]],
        "has_more": len(found) > count,
    }


def _file(upload: Upload) -> dict[str, Any]:
    """A file as the API tells it."""
    names = ("id", "format", "bytes", *(() if upload.format == LORA else ("width", "height")))
    told = {name: getattr(upload, name) for name in names}
    return {"object": "file", **told, "created": upload.made}


async def _upload(desk: Desk, key: Key, file: str) -> Upload:
    upload = await desk.books.write(desk.ledger.upload, key.id, file) if is_id(file, "file") else None
    if upload is None:
        raise not_found("file", file)
    return upload


def _number(text: str, name: str, kind: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1e12:
        raise bad(f"{name} must be the id of a {kind}, or a time in seconds", name)
    return value
