"""Connections on which nothing comes, or not enough: ended after a while, whoever holds them."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
import uvicorn

from sfumato.serve.web import guard
from sfumato.serve.web.connection import Connection

HEAD, IDLE = 0.5, 0.3
OK = b"HTTP/1.1 200"


class Quick(Connection):
    HEAD = HEAD


async def app(scope, receive, send) -> None:
    """Answers with the body if it is asked by POST, after half a second at /slow, and else at once."""
    body = b"here"
    if scope["method"] == "POST":
        body = (await receive())["body"]
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * HEAD)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def talked(story) -> None:
    """A server with quick connections, and `story(connect)`."""

    async def run() -> None:
        bound = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=Quick,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=IDLE,
            ws="none",
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(30):
                await story(lambda: asyncio.open_connection(*bound.getsockname()))
        finally:
            server.should_exit = True
            await serving

    asyncio.run(run())


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_a_head_that_does_not_end_is_not_waited_for(sent):
    async def story(connect) -> None:
        reader, writer = await connect()
        started = asyncio.get_running_loop().time()
        writer.write(sent)
        heard = await reader.read()
        assert asyncio.get_running_loop().time() - started > HEAD * 0.9
        if sent:
            assert heard.startswith(b"HTTP/1.1 408 ")
            assert json.loads(heard.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"
        else:
            assert heard == b""
        writer.close()

    talked(story)


async def dripped(reader, writer, pause: float) -> bytes:
    """What is heard while a byte is sent now and then, until the server hangs up."""
    heard = asyncio.create_task(reader.read())
    while not heard.done():
        writer.write(b"x")
        await asyncio.sleep(pause)
    return heard.result() if heard.exception() is None else b""  # it may hang up on what was sent too late


def test_a_head_in_drops_is_not_waited_for():
    async def story(connect) -> None:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ")
        assert (await dripped(reader, writer, 0.05)).startswith(b"HTTP/1.1 408 ")
        writer.close()

    talked(story)


def test_the_rest_of_a_body_in_drops_holds_nothing_after_the_answer():
    async def story(connect) -> None:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert (await reader.readuntil(b"here")).startswith(OK)
        await dripped(reader, writer, 0.05)
        writer.close()

    talked(story)


def test_who_is_answered_slowly_or_asks_again_is_not_hurried():
    async def story(connect) -> None:
        reader, writer = await connect()
        for path in ("/", "/slow", "/"):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n".encode())
            await asyncio.sleep(HEAD / 2)
            writer.write(b"\r\n")
            assert (await reader.readuntil(b"here")).startswith(OK)
            await asyncio.sleep(IDLE / 2)  # and so the second head ends after the first one's time
        for _ in range(2):  # the second one's head has begun while the first one is answered
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost:")
            await asyncio.sleep(2 * HEAD)
            writer.write(b" x\r\n\r\n")
            for _ in range(2):
                assert (await reader.readuntil(b"here")).startswith(OK)
        assert await reader.read() == b""  # silent between two requests
        writer.close()

    talked(story)


def test_a_slow_body_is_refused(tmp_path, monkeypatch):
    """By the guard, which looks how long a body takes."""
    from asgi import desk_of
    from sfumato.serve.web.app import build

    monkeypatch.setattr(guard, "SLOWEST", 0.3)

    async def ask(app) -> list[dict]:
        heard: list[dict] = []

        async def receive() -> dict:
            await asyncio.sleep(0.1)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: dict) -> None:
            heard.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/jobs", "raw_path": b"/v1/jobs", "query_string": b"", "root_path": "", "headers": headers,
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        async with asyncio.timeout(30):
            await app(scope, receive, send)
        return heard

    with desk_of(tmp_path) as desk:
        start, body = asyncio.run(ask(build(desk)))
    assert start["status"] == 408 and json.loads(body["body"])["error"]["code"] == "too_slow"
