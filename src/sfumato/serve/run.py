"""A server from start to drained: the ledger and the store opened, the socket, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from sfumato.errors import InputError
from sfumato.serve import process
from sfumato.serve.books import Books
from sfumato.serve.desk import Desk
from sfumato.serve.devices import Connect
from sfumato.serve.ledger import Ledger
from sfumato.serve.settings import Settings
from sfumato.serve.store import Store
from sfumato.serve.web.app import build
from sfumato.serve.web.connection import Connection

log = logging.getLogger("sfumato.serve")
BACKLOG = 4096  # connections that wait to be taken
IDLE = 30  # seconds that a connection may be silent between two requests


class Server(uvicorn.Server):
    """Stops in two steps: at the first signal it accepts no more and ends what it has; at the second, at once."""

    def __init__(self, config: uvicorn.Config, desk: Desk):
        super().__init__(config)
        self.desk = desk
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._draining is not None or not self.started:
            self.should_exit = True
            self.force_exit = self.force_exit or self._draining is not None
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        open_ = len(self.desk.floor.live)
        log.info("stopping: %d jobs are to end first", open_)
        if not await self.desk.drain(self.desk.settings.drain):
            log.warning("%d jobs have not ended; they stay in the ledger", len(self.desk.floor.live))
        self.should_exit = True


def serve(
    settings: Settings,
    told: Callable[[str], None] = lambda address: None,
    connect: Connect = process.connect,
) -> None:
    """Run until a signal ends it. told: hears the address when it can be asked. connect: starts workers.

    `InputError` for what cannot be served, a folder that another server has, and an address that is taken.
    """
    settings = settings.validate()
    os.umask(0o077)
    store = Store(settings.data)
    with _alone(settings.data):
        ledger = Ledger(settings.ledger_url, settings.prices.currency)
        books = Books(ledger, store)
        try:
            bound = _bound(settings)
            with bound:
                asyncio.run(_run(settings, books, bound, told, connect))
        finally:
            books.close()


async def _run(
    settings: Settings, books: Books, bound: socket.socket, told: Callable[[str], None], connect: Connect
) -> None:
    desk = Desk(settings, books, connect)
    config = uvicorn.Config(
        build(desk),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
        ws="none",
        http=Connection,
    )
    try:
        await desk.open()
        host, port = bound.getsockname()[:2]
        told(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await Server(config, desk).serve(sockets=[bound])
    finally:
        await desk.close()


def _bound(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise InputError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}; choose another by --port",
            argument="port",
        ) from None
    return bound


@contextlib.contextmanager
def _alone(data: Path) -> Iterator[None]:
    """One server for a folder: two would draw each job twice. The lock goes with the process, however it ends."""
    handle = os.open(data, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another server uses the folder {str(data)!r}", argument="data") from None
        yield
    finally:
        os.close(handle)
