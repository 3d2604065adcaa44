"""What jobs of every kind have in common: estimated, submitted, watched, cancelled, fetched, and their receipts."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from sfumato import checks
from sfumato.errors import InputError
from sfumato.serve.asked import CLIP
from sfumato.serve.desk import Ask, Brought, Desk
from sfumato.serve.job import Live, job_json, kind_of
from sfumato.serve.keys import Key
from sfumato.serve.ledger import ENDED, SUCCEEDED, Record
from sfumato.serve.money import HEADROOM
from sfumato.serve.refusals import Refused, bad, not_found
from sfumato.serve.store import SUFFIX, is_id
from sfumato.serve.web import thumbs
from sfumato.serve.web.answers import Answer, event, streamed
from sfumato.serve.web.body import idempotency_of, json_body
from sfumato.serve.web.schema import described, request_schema, sends

FIELDS = ("model", "request", "format", "previews", "deadline")
MOST_PREVIEWS = 50
MOST_LISTED = 100
Body = tuple[dict[str, Any], str, Brought]  # what a body says, the hash of what was sent, and files in it
Read = Callable[[Request], Coroutine[Any, Any, Body]]


@dataclass(frozen=True)
class Family:
    """A family of routes on jobs of one kind, and its words.

    kind: of `Ask`. path: where it lies. estimate, preflight: where one asks for the price, and for what will be lost.
    outputs: what a job's files are called, of which one is `output`. media: formats to media types, the one by default
    first. example: a body.
    """

    kind: str
    path: str
    estimate: str
    preflight: str
    outputs: str
    output: str
    media: Mapping[str, str]
    example: dict[str, Any]

    @property
    def schema(self) -> dict[str, Any]:
        """Of a body."""
        formats = list(self.media)
        return {
            "type": "object",
            "additionalProperties": False,
            "required": ["request"],
            "properties": {
                "model": {"type": "string", "description": "of /v1/models; the first by default"},
                "request": request_schema(),
                "format": {"type": "string", "enum": formats, "default": formats[0]},
                "previews": {"type": "integer", "minimum": 0, "maximum": MOST_PREVIEWS, "default": 0},
                "deadline": {"type": "number", "description": "seconds from acceptance"},
            },
        }


def add(
    router: APIRouter, desk: Desk, family: Family, read: Read, form: dict[str, Any] | None = None
) -> None:
    """Add the routes of a family. read: the body of a submission. form: its schema and
    example as a form, where one is read.
    """
    one, outputs = f"{family.path}/{{job}}", family.outputs
    body = described(family.schema, family.example)
    if form is not None:
        body["requestBody"]["content"]["multipart/form-data"] = form

    async def find(request: Request, job: str) -> tuple[Record, Live | None]:
        if not is_id(job, "job"):
            raise not_found("job", job)
        record, live = await desk.find(key_of(request).id, job)
        if family.kind == CLIP and kind_of(record) != CLIP:
            raise not_found("job", job)
        return record, live

    @router.post(family.estimate, summary=f"What {outputs} would cost and take", openapi_extra=body)
    async def estimate(request: Request) -> Response:
        desk.check_asking(key_of(request))
        ask = asked(desk, family, request, *await read(request))
        files, parts = await desk.files(key_of(request), ask)
        checked = await desk.expected(ask, files, parts)
        expected = checked["expected"]
        most = desk.price(ask.model, expected)
        price = {"currency": desk.prices.currency, "most_micros": most, "headroom": HEADROOM}
        waits = round(desk.floor.wait(), 3)
        return Answer(
            {
                "object": "estimate",
                "model": ask.model,
                **expected,
                "price": price,
                "wait_seconds": waits,
                "notes": [*checked["notes"], *desk.too_long(ask, expected)],
            }
        )

    @router.post(family.preflight, summary=f"What of {outputs} will not survive", openapi_extra=body)
    async def preflight(request: Request) -> Response:
        desk.check_asking(key_of(request))
        ask = asked(desk, family, request, *await read(request))
        files, parts = await desk.files(key_of(request), ask)
        return Answer(await desk.preflight(ask, files, parts))

    @router.post(family.path, status_code=202, summary=f"Have {outputs} drawn", openapi_extra=body)
    async def submit(request: Request) -> Response:
        ask = asked(desk, family, request, *await read(request))
        record, live = await desk.submit(key_of(request), ask)
        return Answer(told(desk, record, live), 202, {"location": f"/v1{family.path}/{record.id}"})

    @router.get(one, summary="How far a job is")
    async def state(request: Request, job: str) -> Response:
        return Answer(told(desk, *await find(request, job)))

    @router.get(f"{one}/events", summary="A job's state, progress and previews as they happen (server-sent)",
                **sends("text/event-stream"))  # fmt: skip
    async def events(request: Request, job: str) -> Response:
        return streamed(_events(desk, *await find(request, job)))

    @router.post(f"{one}/cancel", summary="Stop a job; what is cancelled is free")
    async def cancel(request: Request, job: str) -> Response:
        record, live = await find(request, job)
        if live is not None:
            await desk.stopped(live)
            record = live.record
        return Answer(told(desk, record, None if record.state in ENDED else live))

    async def made(request: Request, job: str, number: str) -> tuple[Record, int]:
        """A job that is done, and the place of one of its outputs."""
        record, _ = await find(request, job)
        place = whole(number, "number", 0, 10_000)
        if record.state != SUCCEEDED or kind_of(record) != family.kind or place >= record.pictures:
            raise not_found(family.output, number)
        return record, place

    @router.get(f"{one}/{outputs}/{{number}}", summary=f"A {family.output} of a job that is done",
                **sends(*family.media.values()))  # fmt: skip
    async def output(request: Request, job: str, number: str) -> Response:
        record, place = await made(request, job, number)
        kind = record.options["format"]
        path = await desk.books.work(desk.store.output, record.id, place)
        return _file(path, family, family.media[kind], f"{record.id}-{place}.{SUFFIX[kind]}")

    @router.get(f"{one}/thumbs/{{number}}", summary=f"A {family.output} small, as WebP, for lists",
                **sends(thumbs.MEDIA))  # fmt: skip
    async def thumb(request: Request, job: str, number: str) -> Response:
        record, place = await made(request, job, number)
        make = partial(thumbs.small, kind=family.kind)
        try:
            path = await desk.books.work(desk.store.thumb, record.id, place, make)
        except OSError:
            raise Refused(503, "storage_full", "it cannot be made small now", retry_after=60) from None
        return _file(path, family, thumbs.MEDIA, f"{record.id}-{place}-small.{thumbs.SUFFIX}")

    @router.get(f"{one}/receipt", summary="What a job took and cost, with the recipe to draw it again")
    async def receipt(request: Request, job: str) -> Response:
        record, _ = await find(request, job)
        if record.receipt is None:
            raise Refused(404, "no_receipt", f"this job is {record.state}; one that succeeded has a receipt")
        return Answer(record.receipt)


def _file(path: Path | None, family: Family, media: str, name: str) -> Response:
    """What was drawn and does not change any more."""
    if path is None:
        raise Refused(410, "gone", f"this {family.output} is not kept any more")
    headers = {"cache-control": "private, max-age=86400, immutable"}
    return FileResponse(
        path, media_type=media, filename=name, content_disposition_type="inline", headers=headers
    )


async def json_of(request: Request) -> Body:
    """A body that brings no files along."""
    return (*await json_body(request), {})


def asked(
    desk: Desk, family: Family, request: Request, body: dict[str, Any], digest: str, brought: Brought
) -> Ask:
    """What a body asks for, checked as far as it goes without the model."""
    for name in body:
        if name not in FIELDS:
            raise bad(f"unknown field {checks.shown(name)}; a job has {', '.join(FIELDS)}", name)
    wanted = body.get("request")
    if not isinstance(wanted, dict):
        example = str(family.example["request"]).replace("'", '"')
        raise bad(f"request must be an object, such as {example}", "request")
    if family.kind == CLIP and wanted.get("strength") is not None and wanted.get("clip") is None:
        raise bad("strength goes with a clip to begin with", "strength")
    model = body.get("model", desk.settings.models[0].name)
    if not isinstance(model, str):
        raise bad(f"model must be a name, not {checks.shown(model)}", "model")
    kind = body.get("format", next(iter(family.media)))
    if not isinstance(kind, str) or kind not in family.media:
        raise bad(f"format must be {checks.either(family.media)}, not {checks.shown(kind)}", "format")
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
        kind=family.kind,
        brought=brought,
    )


def key_of(request: Request) -> Key:
    """Who asks, as the guard found."""
    return request.state.key


def told(desk: Desk, record: Record, live: Live | None) -> dict[str, Any]:
    """A job as the API tells it."""
    position = None if live is None else desk.floor.position(live)
    return job_json(record, live, desk.prices.currency, position)


def whole(text: str, name: str, low: int, high: int) -> int:
    """A whole number of an address. `Refused` for what is none, or outside."""
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise bad(f"{name} must be a whole number between {low} and {high}", name)
    return int(text)


async def _events(desk: Desk, record: Record, live: Live | None) -> AsyncIterator[bytes]:
    """The job's state now, then whatever happens, until it has ended: state with the whole job, progress, preview."""
    number = 0
    if live is None:
        yield event("state", told(desk, record, None), number)
        return
    with live.listening() as listener:
        yield event("state", told(desk, live.record, live), number)
        if live.look is not None:
            number += 1
            yield event("preview", _preview(*live.look), number)
        while not (live.ended.is_set() and listener.empty()):
            happened = await listener.get()
            number += 1
            if happened.kind == "state":
                yield event("state", told(desk, live.record, live), number)
            elif happened.picture is not None:
                yield event("preview", _preview(happened.data["number"], happened.picture), number)
            else:
                yield event(happened.kind, happened.data, number)


def _preview(number: int, picture: bytes) -> dict[str, Any]:
    return {"number": number, "media_type": "image/jpeg", "b64": base64.b64encode(picture).decode()}
