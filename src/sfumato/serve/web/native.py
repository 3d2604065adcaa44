"""The native API: files, estimates, jobs with their events, results and receipts, and what was used."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from sfumato import checks
from sfumato.errors import InputError
from sfumato.serve.desk import Ask, Desk
from sfumato.serve.job import Live, job_json, now
from sfumato.serve.keys import Key
from sfumato.serve.ledger import ENDED, SUCCEEDED, Record, day_of, month_of
from sfumato.serve.money import HEADROOM
from sfumato.serve.refusals import Refused, bad, not_found
from sfumato.serve.store import MEDIA, SUFFIX, is_id
from sfumato.serve.web.answers import Answer, event, streamed
from sfumato.serve.web.body import file_of, form_body, idempotency_of, json_body, keep_picture
from sfumato.serve.web.schema import EXAMPLE, described, request_schema

FIELDS = ("model", "request", "format", "previews", "deadline")
MOST_PREVIEWS = 50
MOST_LISTED = 100


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(prefix="/v1", tags=["native"])
    body = {
        "type": "object",
        "additionalProperties": False,
        "required": ["request"],
        "properties": {
            "model": {"type": "string", "description": "of /v1/models; the first by default"},
            "request": request_schema(),
            "format": {"type": "string", "enum": list(MEDIA), "default": "png"},
            "previews": {"type": "integer", "minimum": 0, "maximum": MOST_PREVIEWS, "default": 0},
            "deadline": {"type": "number", "description": "seconds from acceptance"},
        },
    }
    example = {"request": EXAMPLE, "previews": 4}

    @router.post("/files", status_code=201, summary="Send a picture; its id may stand in requests", openapi_extra={
        "requestBody": {"required": True, "content": {
            "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {
                "file": {"type": "string", "format": "binary"}}}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        }},
    })  # fmt: skip
    async def send(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in MEDIA.values() or kind == "application/octet-stream":
            data: bytes | None = await request.body()
        else:
            data = await file_of(await form_body(request), "file")
        if data is None:
            raise bad("the form has no file", "file")
        upload = await keep_picture(desk.books, _key(request), data, "file")
        answer = {name: getattr(upload, name) for name in ("id", "format", "bytes", "width", "height")}
        return Answer({"object": "file", **answer, "created": round(upload.made, 3)}, 201)

    @router.get("/files/{file}", summary="A picture that was sent")
    async def sent(request: Request, file: str) -> Response:
        upload = await _upload(desk, _key(request), file)
        return Response(await desk.floor.bytes_of(file), media_type=MEDIA[upload.format])

    @router.delete("/files/{file}", summary="Forget a picture")
    async def forget(request: Request, file: str) -> Response:
        await _upload(desk, _key(request), file)
        await desk.books.write(desk.ledger.drop_upload, file)
        await desk.books.work(desk.store.drop, file)
        return Answer({"object": "file", "id": file, "deleted": True})

    @router.post(
        "/estimate", summary="What a job would cost and take", openapi_extra=described(body, example)
    )
    async def estimate(request: Request) -> Response:
        ask = await _ask(desk, request)
        pictures, parts = await desk.pictures(_key(request), ask.request)
        expected = (await desk.expected(ask, pictures, parts))["expected"]
        most = desk.price(ask.model, expected)
        price = {"currency": desk.prices.currency, "most_micros": most, "headroom": HEADROOM}
        waits = round(desk.floor.wait(), 3)
        return Answer(
            {"object": "estimate", "model": ask.model, **expected, "price": price, "wait_seconds": waits}
        )

    @router.post(
        "/preflight", summary="What of a request will not survive", openapi_extra=described(body, example)
    )
    async def preflight(request: Request) -> Response:
        ask = await _ask(desk, request)
        pictures, parts = await desk.pictures(_key(request), ask.request)
        return Answer(await desk.preflight(ask, pictures, parts))

    @router.post(
        "/jobs", status_code=202, summary="Have pictures drawn", openapi_extra=described(body, example)
    )
    async def submit(request: Request) -> Response:
        ask = await _ask(desk, request)
        record, live = await desk.submit(_key(request), ask)
        return Answer(_json(desk, record, live), 202, {"location": f"/v1/jobs/{record.id}"})

    @router.get("/jobs", summary="The latest jobs of this key, the newest first")
    async def latest(request: Request, limit: str = "20", before: str | None = None) -> Response:
        count = _whole(limit, "limit", 1, MOST_LISTED)
        since = None if before is None else _number(before, "before")
        records = await desk.books.write(desk.ledger.jobs_of, _key(request).id, count, since)
        found = [_json(desk, live.record if (live := _live(desk, r)) else r, _live(desk, r)) for r in records]
        return Answer({"object": "list", "data": found, "has_more": len(found) == count})

    @router.get("/jobs/{job}", summary="How far a job is")
    async def state(request: Request, job: str) -> Response:
        return Answer(_json(desk, *await _job(desk, request, job)))

    @router.get(
        "/jobs/{job}/events", summary="A job's state, progress and previews as they happen (server-sent)"
    )
    async def events(request: Request, job: str) -> Response:
        record, live = await _job(desk, request, job)
        return streamed(_events(desk, record, live))

    @router.post("/jobs/{job}/cancel", summary="Stop a job; what is cancelled is free")
    async def cancel(request: Request, job: str) -> Response:
        record, live = await _job(desk, request, job)
        if live is not None:
            desk.floor.stop(live, "cancelled")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await live.ended.wait()
            record = live.record
        return Answer(_json(desk, record, None if record.state in ENDED else live))

    @router.get("/jobs/{job}/pictures/{number}", summary="A picture of a job that is done")
    async def picture(request: Request, job: str, number: str) -> Response:
        record, _ = await _job(desk, request, job)
        place = _whole(number, "number", 0, 10_000)
        if record.state != SUCCEEDED or place >= record.pictures:
            raise not_found("picture", number)
        path = await desk.books.work(desk.store.output, record.id, place)
        if path is None:
            raise Refused(410, "gone", "this picture is not kept any more")
        kind = record.options["format"]
        return FileResponse(
            path,
            media_type=MEDIA[kind],
            filename=f"{record.id}-{place}.{SUFFIX[kind]}",
            content_disposition_type="inline",
            headers={"cache-control": "private, max-age=86400, immutable"},
        )

    @router.get("/jobs/{job}/receipt", summary="What a job took and cost, with the recipe to draw it again")
    async def receipt(request: Request, job: str) -> Response:
        record, _ = await _job(desk, request, job)
        if record.receipt is None:
            raise Refused(404, "no_receipt", f"this job is {record.state}; one that succeeded has a receipt")
        return Answer(record.receipt)

    @router.get("/usage", summary="What this key has used, by day")
    async def usage(request: Request, since: str | None = None, until: str | None = None) -> Response:
        key, time = _key(request), now()
        first, last = since or f"{month_of(time)}-01", until or day_of(time)
        for name, day in (("since", first), ("until", last)):
            if not re.fullmatch(r"\d{4}-\d\d-\d\d", day, re.ASCII):
                raise bad(f"{name} must be a day such as 2026-01-31", name)
        rows = await desk.books.write(desk.ledger.usage, first, last, key.id)
        used = await desk.books.write(desk.ledger.committed, key.id, time)
        days = [{name: value for name, value in row.items() if name != "tenant"} for row in rows]
        return Answer({
            "object": "usage", "currency": desk.prices.currency, "since": first, "until": last, "days": days,
            "month": {"spent_and_reserved_micros": used, "budget_micros": key.budget},
        })  # fmt: skip

    return router


def _key(request: Request) -> Key:
    return request.state.key


async def _ask(desk: Desk, request: Request) -> Ask:
    """What a native body asks for, checked as far as it goes without the model."""
    body, digest = await json_body(request)
    for name in body:
        if name not in FIELDS:
            raise bad(f"unknown field {checks.shown(name)}; a job has {', '.join(FIELDS)}", name)
    wanted = body.get("request")
    if not isinstance(wanted, dict):
        raise bad("request must be an object, such as " + str(EXAMPLE).replace("'", '"'), "request")
    model = body.get("model", desk.settings.models[0].name)
    if not isinstance(model, str):
        raise bad(f"model must be a name, not {checks.shown(model)}", "model")
    kind = body.get("format", "png")
    if not isinstance(kind, str) or kind not in MEDIA:
        raise bad(f"format must be {checks.either(MEDIA)}, not {checks.shown(kind)}", "format")
    previews, deadline = body.get("previews", 0), body.get("deadline")
    try:
        checks.integer("previews", previews, 0, MOST_PREVIEWS)
        if deadline is not None:
            checks.number("deadline", deadline, 1, desk.settings.longest)
    except InputError as error:
        raise bad(str(error), error.argument) from None
    return Ask(
        model,
        wanted,
        digest,
        kind,
        looks=previews,
        deadline=deadline,
        idempotency=idempotency_of(request),
    )


async def _job(desk: Desk, request: Request, job: str) -> tuple[Record, Live | None]:
    if not is_id(job, "job"):
        raise not_found("job", job)
    return await desk.find(_key(request).id, job)


async def _upload(desk: Desk, key: Key, file: str) -> Any:
    upload = await desk.books.write(desk.ledger.upload, key.id, file) if is_id(file, "file") else None
    if upload is None:
        raise not_found("file", file)
    return upload


def _live(desk: Desk, record: Record) -> Live | None:
    return desk.floor.live.get(record.id)


def _json(desk: Desk, record: Record, live: Live | None) -> dict[str, Any]:
    position = None if live is None else desk.floor.position(live)
    return job_json(record, live, desk.prices.currency, position)


async def _events(desk: Desk, record: Record, live: Live | None) -> AsyncIterator[bytes]:
    """The job's state now, then whatever happens, until it has ended: state with the whole job, progress, preview."""
    number = 0
    if live is None:
        yield event("state", _json(desk, record, None), number)
        return
    with live.listening() as listener:
        yield event("state", _json(desk, live.record, live), number)
        if live.look is not None:
            number += 1
            yield event("preview", _preview(*live.look), number)
        while not (live.ended.is_set() and listener.empty()):
            happened = await listener.get()
            number += 1
            if happened.kind == "state":
                yield event("state", _json(desk, live.record, live), number)
            elif happened.picture is not None:
                yield event("preview", _preview(happened.data["number"], happened.picture), number)
            else:
                yield event(happened.kind, happened.data, number)


def _preview(number: int, picture: bytes) -> dict[str, Any]:
    return {"number": number, "media_type": "image/jpeg", "b64": base64.b64encode(picture).decode()}


def _whole(text: str, name: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise bad(f"{name} must be a whole number between {low} and {high}", name)
    return int(text)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1e12:
        raise bad(f"{name} must be a number", name)
    return value
