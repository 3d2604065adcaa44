"""The server's application without a server: a desk whose workers were not started, and requests put to it directly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.serve.books import Books
from sfumato.serve.desk import Desk
from sfumato.serve.ledger import Ledger
from sfumato.serve.settings import Settings, model_given
from sfumato.serve.store import Store


@contextlib.contextmanager
def desk_of(data: Path, **options: Any) -> Iterator[Desk]:
    """A desk for pocket with its data in `data`. options: of `Settings`."""
    settings = Settings(models=(model_given("pocket"),), data=data, devices=(None,), **options).validate()
    books = Books(Ledger(settings.ledger_url), Store(data))
    yield Desk(settings, books)
    books.close()


def asked(
    app: Any, method: str, path: str, body: bytes | None = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer. body: None is one that never comes."""
    return asyncio.run(ask(app, method, path, body, **headers))


async def ask(
    app: Any, method: str, path: str, body: bytes | None = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """The same, on a loop that runs."""
    sent = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]
    heard: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        assert body is not None, "the body was read"
        return sent.pop() if sent else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        heard.append(message)

    await app(scope_of(method, path, **headers), receive, send)
    found = {name.decode(): value.decode() for name, value in heard[0]["headers"]}
    return heard[0]["status"], found, b"".join(each.get("body", b"") for each in heard[1:])


def scope_of(method: str, path: str, **headers: str) -> dict[str, Any]:
    """A request before its body."""
    path, _, query = path.partition("?")
    pairs = {"host": "127.0.0.1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": method,
        "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "headers": [(n.encode(), v.encode()) for n, v in pairs.items()],
    }  # fmt: skip
