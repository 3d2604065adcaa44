"""Workers of `sfumato serve` as replicas of Ray Serve, on whatever machines the cluster has.

The front, its API, its queue and its ledger are as on one machine. It gives each job to one worker, which it knows by
number; so each worker is a deployment of its own with one replica, which Serve places, watches and starts again. Front
and replica say the same as front and process do: `say` takes messages, `listen` streams what is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sfumato.cluster.connection import absolute, join
from sfumato.serve import wire

APPLICATION = "sfumato-worker-{}"
ONGOING = 1000  # calls of a replica at once: one listens, the others are short
WATCH = 2.0  # seconds between looks whether a replica lives


class Replica:
    """The deployment: a worker, and who listens to it."""

    def __init__(self, start: dict[str, Any]):
        from sfumato.serve.worker.worker import Worker

        self._outbox = Outbox()
        self._worker = Worker(self._outbox, start)

    async def say(self, message: dict[str, Any], parts: list[bytes]) -> None:
        """A message of the front."""
        self._worker.take(message, parts)

    async def listen(self) -> AsyncIterator[wire.Message]:
        """What the worker says, from that it is ready. When nobody listens any more, nobody wants what it draws."""
        queue = self._outbox.open()
        try:
            while True:
                yield await queue.get()
        finally:
            if self._outbox.close(queue):
                self._worker.stop()

    async def end(self) -> None:
        """End the process; Serve starts another."""
        os._exit(1)


class Outbox:
    """The worker's end of its line: messages go to who listens, and that it is ready is told to all who come."""

    def __init__(self) -> None:
        self._ready: wire.Message | None = None
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Queue[wire.Message]] | None = None

    def send(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        """From any thread."""
        said = message, list(parts)
        if message["is"] == "ready":
            self._ready = said
        if (listener := self._listener) is not None:
            loop, queue = listener
            with contextlib.suppress(RuntimeError):  # its loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, said)

    def open(self) -> asyncio.Queue[wire.Message]:
        """Listen from now on, in the place of who did."""
        queue: asyncio.Queue[wire.Message] = asyncio.Queue()
        if self._ready is not None:
            queue.put_nowait(self._ready)
        self._listener = asyncio.get_running_loop(), queue
        return queue

    def close(self, queue: asyncio.Queue[wire.Message]) -> bool:
        """Listen no more; False if another does now."""
        if self._listener is None or self._listener[1] is not queue:
            return False
        self._listener = None
        return True


class Replicas:
    """Deploys workers on a cluster as they are asked for; `connect` is for `serve.run.serve`."""

    def __init__(self, address: str, count: int):
        self._ray = join(address, count + 1)
        self._ray.serve.start(proxy_location="Disabled")
        self._handles: dict[int, Any] = {}
        self._turn = asyncio.Lock()  # Serve takes one application at a time

    async def connect(self, start: dict[str, Any]) -> Link:
        """A line to the worker of this number, deployed if it is not yet."""
        number = int(start["number"])
        async with self._turn:
            if number not in self._handles:
                self._handles[number] = await asyncio.to_thread(self._deployed, number, start)
        return Link(self._handles[number])

    def _deployed(self, number: int, start: dict[str, Any]) -> Any:
        gpus = 1 if (start["device"] or "").startswith("cuda") else 0
        deployment = self._ray.serve.deployment(
            Replica,
            name=f"worker-{number}",
            num_replicas=1,
            max_ongoing_requests=ONGOING,
            health_check_period_s=WATCH,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        )
        told = {**start, "models": [absolute(model) for model in start["models"]]}
        return self._ray.serve.run(
            deployment.bind(told), name=APPLICATION.format(number), route_prefix=None, blocking=False
        )

    def close(self) -> None:
        """Take the workers down."""
        self._ray.serve.shutdown()


class Link:
    """A `serve.devices.Link` to a replica."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._said = handle.options(stream=True).listen.remote()
        self._words = self._said.__aiter__()
        self._outgoing: asyncio.Queue[tuple[dict[str, Any], list[bytes]]] = asyncio.Queue()
        self._broken = False
        self._sending = asyncio.create_task(self._send_all())

    def send(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        if self._broken:
            raise wire.Broken("the worker is gone")
        self._outgoing.put_nowait((message, list(parts)))

    async def _send_all(self) -> None:
        """One after the other: calls of a handle may overtake each other."""
        while not self._broken:
            message, parts = await self._outgoing.get()
            try:
                await self._handle.say.remote(message, parts)
            except Exception:  # what Ray raises of a replica that is gone is of many kinds
                self._broken = True

    async def receive(self) -> wire.Message:
        try:
            return await anext(self._words)
        except Exception as error:
            self._broken = True
            raise wire.Broken(f"the replica is gone ({type(error).__name__})") from None

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            self._handle.end.remote()

    async def close(self) -> None:
        self._broken = True
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)
        with contextlib.suppress(Exception):
            self._said.cancel()
