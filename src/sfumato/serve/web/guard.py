"""Before every route: the host, the key, whether there is room, the size and the slowness of a body. Denied unless it
is listed as public.

Plain ASGI, so that streams stream and a client that goes away is noticed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from sfumato.serve.keys import WATCH, Key, KeyRing, local
from sfumato.serve.metrics import Metrics
from sfumato.serve.refusals import Refused
from sfumato.serve.settings import LOOPBACK_NAMES, Settings
from sfumato.serve.web.body import is_retry

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
log = logging.getLogger("sfumato.serve")

PUBLIC = ("/", "/healthz", "/readyz", "/openapi.json")  # and what lies under these
PUBLIC_UNDER = "/page/"
WATCHED = "/metrics"
SUBMISSIONS = frozenset({  # where jobs come in
    "/v1/jobs", "/v1/videos", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
})  # fmt: skip
SLOWEST = 60.0  # seconds that a body may take, and more as it comes:
SPEED = 2**18  # bytes for which it may take a second longer
FILES = "/v1/files"  # where bodies are large
FORM = 2**16  # bytes that a form has around its file
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; font-src 'self'; connect-src 'self'; manifest-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Wraps the whole application. full: why nothing can be accepted of a key now, if so."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        metrics: Metrics,
        ring: KeyRing | None,
        full: Callable[[Key], Refused | None],
    ):
        self.app, self.settings, self.metrics, self.ring, self.full = app, settings, metrics, ring, full
        self._hosts = {*LOOPBACK_NAMES, settings.host, *settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def say(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                known = {name for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in known]
                if b"cache-control" not in known:
                    extra.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *extra]
                self.metrics.latency.labels(_route(scope)).observe(time.perf_counter() - started)
            await send(message)

        try:
            key = scope.setdefault("state", {})["key"] = self._admitted(scope)
            if key is not None and scope["method"] == "POST" and scope["path"] in SUBMISSIONS:
                self._check_room(scope, key)
            await self.app(scope, self._limited(scope, receive), say)
        except Refused as error:
            if not status:
                await _refuse(say, error)
        except Exception as error:
            log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if not status:
                await _refuse(say, Refused(500, "internal", "the server failed; its log says more"))
        finally:
            self.metrics.requests.labels(_route(scope), scope["method"], str(status)).inc()

    def _admitted(self, scope: Scope) -> Key | None:
        """Whose request it is; None on public routes. `Refused` for who may not."""
        headers = _headers(scope)
        if self.ring is None:
            self._check_place(headers)
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            raise Refused(400, "bad_input", "content-length must be a number")
        if int(length[:20]) > (most := self._most(scope)):
            raise Refused(413, "too_large", f"a request may have {most:,} bytes")
        path = scope["path"]
        if path in PUBLIC or path.startswith(PUBLIC_UNDER):
            return None
        if self.ring is None:
            return local()
        token = token_of(headers.get("authorization", ""))
        key = None if token is None else self.ring.find(token)
        if key is None:
            raise Refused(401, "invalid_api_key", "give a key that is in use: Authorization: Bearer sfk_…")
        if (key.role == WATCH) != (path == WATCHED):
            raise Refused(
                403, "forbidden", f"this key is for {'/metrics alone' if key.role == WATCH else 'drawing'}"
            )
        return key

    def _check_room(self, scope: Scope, key: Key) -> None:
        """A server that is full says so before anything is read, parsed or written: but not to one who may have sent
        this before, whose job may be there.
        """
        headers = _headers(scope)
        again = "idempotency-key" in headers or is_retry(headers)
        if not again and (no := self.full(key)) is not None:
            raise no

    def _check_place(self, headers: dict[str, str]) -> None:
        """Without keys, a page of another site that this machine's browser shows must not get in."""
        name = _host(headers.get("host", ""))
        if name not in self._hosts:
            raise Refused(403, "wrong_host", "this server answers to its own address alone")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refused(403, "wrong_origin", "requests of other sites are not answered")

    def _most(self, scope: Scope) -> int:
        """Bytes that a body may have."""
        large = self.settings.lora_size + FORM if scope["path"] == FILES else 0
        return max(self.settings.body, large)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with a body that is not too large and does not take too long."""
        taken, done, began, most = 0, False, asyncio.get_running_loop().time(), self._most(scope)

        async def limited() -> Message:
            nonlocal taken, done
            if done:
                return await receive()
            seconds = SLOWEST + taken / SPEED
            try:
                async with asyncio.timeout_at(began + seconds):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, "too_slow", f"the body took longer than {seconds:.0f} s") from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > most:
                    raise Refused(413, "too_large", f"a request may have {most:,} bytes")
                done = not message.get("more_body", False)
            return message

        return limited


def token_of(header: str) -> str | None:
    """The key in an Authorization header: a bearer's, or the password of HTTP's basic scheme, which web UIs use."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return None


def error_json(error: Refused) -> dict[str, Any]:
    """As the clients of OpenAI read errors."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def _headers(scope: Scope) -> dict[str, str]:
    """What was sent, by names in lower case; of a name sent twice, the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def error_headers(error: Refused) -> dict[str, str]:
    found = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        found["www-authenticate"] = 'Bearer realm="sfumato"'
    return found


async def _refuse(send: Send, error: Refused) -> None:
    body = json.dumps(error_json(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error_headers(error)}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _host(value: str) -> str:
    """A Host header without its port."""
    if value.startswith("["):
        return value.partition("]")[0] + "]"
    return value.rpartition(":")[0] if ":" in value else value


def _route(scope: Scope) -> str:
    """The route's own pattern, so that ids do not become labels."""
    path: str = scope["path"]
    found: str = getattr(scope.get("route"), "path", path if path in SUBMISSIONS else "other")
    return found
