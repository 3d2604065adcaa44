"""The application: all routes on one desk, errors as JSON, the guard around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

import sfumato
from sfumato.errors import InputError
from sfumato.serve.desk import Desk
from sfumato.serve.keys import KeyRing
from sfumato.serve.ledger import LedgerError
from sfumato.serve.refusals import Refused
from sfumato.serve.web import native, openai, status, videos, webui
from sfumato.serve.web.answers import Answer, Gone
from sfumato.serve.web.document import finished
from sfumato.serve.web.guard import Guard, error_headers, error_json

log = logging.getLogger("sfumato.serve")
ABOUT = """Pictures and clips by latent diffusion. Keys are sent as `Authorization: Bearer sfk_…`. Errors are
`{"error": {"message", "type", "param", "code"}}`; 429 and 503 say by Retry-After when to come back."""

ROOMS = (native, videos, openai, webui, status)


def build(desk: Desk) -> Guard:
    """The ASGI application of a desk, which somebody else opens and closes."""
    app = FastAPI(
        title="Sfumato",
        version=sfumato.__version__,
        description=ABOUT,
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    for room in ROOMS:
        app.include_router(room.routes(desk))
    for kind, answer in _answers().items():
        app.add_exception_handler(kind, answer)
    ring = None if desk.settings.keys is None else KeyRing(desk.settings.keys)
    _document(app, ring is not None)
    return Guard(app, desk.settings, desk.metrics, ring, desk.full)


def _document(app: FastAPI, guarded: bool) -> None:
    """Have the application tell of itself what is so; made when somebody asks for it first."""
    whole = app.openapi

    def told() -> dict[str, Any]:
        if app.openapi_schema is None:
            finished(whole(), guarded)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = told  # type: ignore[method-assign]


def _answers() -> dict[Any, Callable[[Request, Any], Any]]:
    """What becomes of an exception."""

    async def refused(request: Request, error: Refused) -> Response:
        return Answer(error_json(error), error.status, error_headers(error))

    async def wrong(request: Request, error: InputError) -> Response:
        return await refused(request, Refused(400, error.code, str(error), param=error.argument))

    async def ledger(request: Request, error: LedgerError) -> Response:
        log.error("%s", error)
        message = "the ledger cannot be used now; nothing was accepted"
        return await refused(request, Refused(503, error.code, message, retry_after=5))

    async def plain(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        found = Refused(error.status_code, codes.get(error.status_code, "bad_input"), str(error.detail))
        answer = await refused(request, found)
        answer.headers.update(error.headers or {})
        return answer

    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it; as logs of nginx have it

    return {Refused: refused, InputError: wrong, LedgerError: ledger, HTTPException: plain, Gone: gone}
