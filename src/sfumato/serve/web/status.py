"""Whether the server lives and is ready, what it counts, and the page at `/`."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

import sfumato
from sfumato.serve.desk import Desk
from sfumato.serve.refusals import not_found
from sfumato.serve.web.answers import Answer
from sfumato.serve.web.schema import sends

PAGE = Path(__file__).parent.parent / "page"
MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".txt": "text/plain; charset=utf-8",
}


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(tags=["status"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", summary="Whether the server lives")
    async def health() -> Response:
        return Answer({"status": "ok", "version": sfumato.__version__})

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", summary="Whether it takes jobs and can draw them",
                responses={503: {"description": "not now", "content": {"application/json": {}}}})  # fmt: skip
    async def ready() -> Response:
        status = "ready" if desk.ready else "draining" if desk.draining else "starting"
        return Answer({"status": status}, 200 if desk.ready else 503)

    @router.get("/metrics", summary="For Prometheus", **sends("text/plain"))
    async def metrics() -> Response:
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def home(request: Request) -> Response:
        return _file("index.html", request)

    @router.api_route("/page/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request, path: str) -> Response:
        return _file(path, request)

    return router


def _file(name: str, request: Request) -> Response:
    """A file of the page, which all lie in one folder and those under it; nothing else of this machine.

    304 where the browser says that it has this one.
    """
    found = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
    path = found.get(name)
    if path is None or path.suffix not in MEDIA:
        raise not_found("file", name)
    headers = {"cache-control": "no-cache"}
    answer = FileResponse(path, media_type=MEDIA[path.suffix], headers=headers, stat_result=path.stat())
    if request.headers.get("if-none-match") == answer.headers["etag"]:
        return Response(status_code=304, headers={**headers, "etag": answer.headers["etag"]})
    return answer
