"""The native API of pictures: files, estimates, jobs with their events, results and receipts, and what was used."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sfumato.serve.asked import PICTURE
from sfumato.serve.desk import Desk
from sfumato.serve.job import now
from sfumato.serve.keys import Key
from sfumato.serve.ledger import check_days, day_of, month_of
from sfumato.serve.refusals import bad, not_found
from sfumato.serve.store import MEDIA, UPLOADS, is_id
from sfumato.serve.web import jobs
from sfumato.serve.web.answers import Answer
from sfumato.serve.web.body import file_of, form_body, json_body, keep_file
from sfumato.serve.web.jobs import MOST_LISTED, Family, asked, key_of, told, whole
from sfumato.serve.web.schema import BINARY, EXAMPLE, described, sends

PICTURES = Family(
    PICTURE, "/jobs", "/estimate", "pictures", "picture", MEDIA, {"request": EXAMPLE, "previews": 4}
)


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(prefix="/v1", tags=["native"])

    @router.post("/files", status_code=201, summary="Send a picture or a clip; its id may stand in requests",
                 openapi_extra={"requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {
                "file": BINARY}}, "example": {"file": "start.png"}},
            **{kind: {"schema": BINARY, "example": f"the bytes of a file of {kind}"} for kind in UPLOADS.values()},
        }}})  # fmt: skip
    async def send(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in UPLOADS.values() or kind == "application/octet-stream":
            data: bytes | None = await request.body()
        else:
            data = await file_of(await form_body(request), "file")
        if data is None:
            raise bad("the form has no file", "file")
        upload = await keep_file(desk.books, key_of(request), data, "file")
        answer = {name: getattr(upload, name) for name in ("id", "format", "bytes", "width", "height")}
        return Answer({"object": "file", **answer, "created": round(upload.made, 3)}, 201)

    @router.get("/files/{file}", summary="A file that was sent", **sends(*UPLOADS.values()))
    async def sent(request: Request, file: str) -> Response:
        upload = await _upload(desk, key_of(request), file)
        return Response(await desk.floor.bytes_of(file), media_type=UPLOADS[upload.format])

    @router.delete("/files/{file}", summary="Forget a file")
    async def forget(request: Request, file: str) -> Response:
        await _upload(desk, key_of(request), file)
        await desk.books.write(desk.ledger.drop_upload, file)
        await desk.books.work(desk.store.drop, file)
        return Answer({"object": "file", "id": file, "deleted": True})

    @router.post("/preflight", summary="What of a request will not survive",
                 openapi_extra=described(PICTURES.schema, PICTURES.example))  # fmt: skip
    async def preflight(request: Request) -> Response:
        ask = asked(desk, PICTURES, request, *await json_body(request))
        files, parts = await desk.files(key_of(request), ask.request)
        return Answer(await desk.preflight(ask, files, parts))

    @router.get("/jobs", summary="The latest jobs of this key, of pictures and of clips, the newest first")
    async def latest(request: Request, limit: str = "20", before: str | None = None) -> Response:
        count = whole(limit, "limit", 1, MOST_LISTED)
        tenant, place = key_of(request).id, dict[str, Any]()
        if before is not None and is_id(before, "job"):
            place["after"] = (await desk.find(tenant, before))[0]
        elif before is not None:
            place["before"] = _number(before, "before")
        records = await desk.books.write(desk.ledger.jobs_of, tenant, count + 1, **place)
        rest, records = records[count:], records[:count]
        lives = [desk.floor.live.get(record.id) for record in records]
        found = [
            told(desk, live.record if live else record, live)
            for record, live in zip(records, lives, strict=True)
        ]
        return Answer({"object": "list", "data": found, "has_more": bool(rest)})

    jobs.add(router, desk, PICTURES, json_body)

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


async def _upload(desk: Desk, key: Key, file: str) -> Any:
    upload = await desk.books.write(desk.ledger.upload, key.id, file) if is_id(file, "file") else None
    if upload is None:
        raise not_found("file", file)
    return upload


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1e12:
        raise bad(f"{name} must be the id of a job, or a time in seconds", name)
    return value
