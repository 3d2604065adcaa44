"""What is sent back: JSON that can hold any text, jobs waited for, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sfumato.serve.floor import Floor
from sfumato.serve.job import Live
from sfumato.serve.ledger import CANCELLED, SUCCEEDED, Record
from sfumato.serve.refusals import Refused

HEARTBEAT = 15.0  # seconds between comments on a silent stream
STATUS = {
    "bad_input": 400,
    "bad_data": 400,
    "deadline_exceeded": 504,
    "out_of_memory": 503,
    "worker_lost": 503,
}


class Answer(Response):
    """JSON in ASCII, since half a surrogate pair has no UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Gone(Exception):
    """The client is gone; nobody reads an answer."""


async def ended(request: Request, floor: Floor, record: Record, live: Live | None) -> Record:
    """The job when it has ended, waited for as long as the client does. Raises `Gone` when it does not."""
    if live is None:
        return record
    async with floor.held(live):
        waiting = asyncio.create_task(live.ended.wait())
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (waiting, gone):
                task.cancel()
            await asyncio.gather(waiting, gone, return_exceptions=True)
        if not live.ended.is_set():
            raise Gone
    return live.record


async def _gone(request: Request) -> None:
    """Until the client is gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def succeeded(record: Record) -> Record:
    """The job, if it gave pictures; else its error as `Refused`."""
    if record.state == SUCCEEDED:
        return record
    error = record.error or {"code": "internal", "message": "the job failed", "param": None}
    theirs = 400 if error.get("param") else 500  # what names a field is about what was asked
    status = 422 if record.state == CANCELLED else STATUS.get(error["code"], theirs)
    after = 5.0 if status in (503, 504) else None
    raise Refused(status, error["code"], error["message"], param=error.get("param"), retry_after=after)


def event(name: str | None, data: dict[str, Any], number: int | None = None) -> bytes:
    """One server-sent event."""
    lines = [] if number is None else [f"id: {number}"]
    if name is not None:
        lines.append(f"event: {name}")
    lines.append("data: " + json.dumps(data, separators=(",", ":")))
    return ("\n".join(lines) + "\n\n").encode("ascii")


def streamed(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Server-sent events as an answer, with a comment where nothing else is said for long."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_beating(events), media_type="text/event-stream", headers=headers)


async def _beating(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    following: asyncio.Task[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({following}, timeout=HEARTBEAT)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                found, following = following.result(), None
            except StopAsyncIteration:
                return
            yield found
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        with contextlib.suppress(RuntimeError):
            await events.aclose()  # type: ignore[attr-defined]
