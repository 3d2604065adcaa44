"""Workers: started, asked, watched, and started again when they are lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from sfumato.errors import SfumatoError
from sfumato.serve import wire
from sfumato.serve.job import Live
from sfumato.serve.refusals import Refused

log = logging.getLogger("sfumato.serve")
WAITS = (0.1, 0.5, 1.0, 2.0, 5.0)  # seconds before the next try; the last again and again
PATIENCE = 30.0  # seconds that an answer to a check may take
Hear = Callable[["Device", dict[str, Any], list[bytes]], None]


class Link(Protocol):
    """The front's end of a line to a worker. Both ways raise `wire.Broken` when the worker is gone."""

    def send(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        """Send without waiting; messages arrive in order."""

    async def receive(self) -> wire.Message:
        """The next message."""

    def kill(self) -> None:
        """End the worker, whatever it is doing."""

    async def close(self) -> None:
        """End the worker, and wait until it has."""


Connect = Callable[[dict[str, Any]], Awaitable[Link]]  # starts a worker, which is told this


class Unable(SfumatoError):
    """A worker cannot open its models; the message is its own."""

    code = "unable"
    exit_code = 2


class Device:
    """One device and the worker process on it, if there is one now.

    start: what a worker is told first. connect: starts one, such as `process.connect`. hear: hears when it is ready,
    and what it says of jobs. lost: hears that it is gone; `running` are then the jobs that went with it.
    """

    def __init__(self, start: dict[str, Any], connect: Connect, hear: Hear, lost: Callable[[Device], None]):
        self.start, self._connect, self._hear, self._lost = start, connect, hear, lost
        self.name = start["device"] or "default"
        self.facts: list[dict[str, Any]] = []
        self.room = 0
        self.running: list[Live] = []
        self.ready = asyncio.Event()
        self._link: Link | None = None
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start the first worker, and wait until it can draw. `Unable` if it cannot."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(first))
        await first

    async def close(self) -> None:
        """End the worker, whatever it is doing."""
        self._stopping = True
        self.kill()
        if self._task is not None:
            await self._task

    def kill(self) -> None:
        """End this worker; another is started unless the device is closing."""
        if self._link is not None:
            self._link.kill()

    async def check(self, message: dict[str, Any], parts: Sequence[bytes]) -> dict[str, Any]:
        """A worker's answer to a check or a preflight, or the `Refused` that it is. `wire.Broken` if it is lost."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._say({"number": number, **message}, parts)
            async with asyncio.timeout(PATIENCE):
                found = await answer
        finally:
            self._asked.pop(number, None)
        if (error := found.get("error")) is not None:
            status = 400 if error["client"] else 500 if error["code"] == "internal" else 503
            after = 5 if status == 503 else None
            raise Refused(status, error["code"], error["message"], param=error["param"], retry_after=after)
        return found

    @property
    def asked(self) -> int:
        """Checks that are not answered yet."""
        return len(self._asked)

    def draw(self, message: dict[str, Any], parts: Sequence[bytes]) -> None:
        self._say({"do": "draw", **message}, parts)

    def cancel(self, job: str) -> None:
        with contextlib.suppress(wire.Broken):
            self._say({"do": "cancel", "job": job})

    def _say(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        if self._link is None:
            raise wire.Broken("the worker is gone")
        self._link.send(message, parts)

    async def _keep(self, first: asyncio.Future[None]) -> None:
        """A worker after the other, until the device is closed or the first cannot begin."""
        tries = 0
        while not self._stopping:
            try:
                await self._one(first)
            except Unable as error:
                if not first.done():
                    first.set_exception(error)
                    return
                log.error("the worker of %s: %s", self.name, error)
            except (wire.Broken, OSError) as error:
                if not self._stopping:
                    log.warning("the worker of %s: %s", self.name, error)
                if not first.done():
                    first.set_exception(
                        Unable("the worker ended before it could draw; its messages stand above")
                    )
                    return
            if self.ready.is_set():
                tries = 0
            self.ready.clear()
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(wire.Broken("the worker is gone"))
            self._lost(self)
            if not self._stopping:
                await asyncio.sleep(WAITS[min(tries, len(WAITS) - 1)])
                tries += 1

    async def _one(self, first: asyncio.Future[None]) -> None:
        link = self._link = await self._connect(self.start)
        try:
            message, _ = await link.receive()
            if message["is"] == "unable":
                raise Unable(message["error"]["message"])
            self.facts, self.room, number = message["models"], message["room"], self.start["number"]
            self.name = f"{message['device']}#{number}" if number else message["device"]
            self.ready.set()
            self._hear(self, message, [])
            if not first.done():
                first.set_result(None)
            while True:
                message, parts = await link.receive()
                if message["is"] == "checked":
                    answer = self._asked.get(message["number"])
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                else:
                    self._hear(self, message, parts)
        finally:
            self._link = None
            await link.close()
