"""Jobs on their way through the devices: queued, handed over, drawn again when a worker is lost, settled, ended.

A job is in the ledger before its client hears that it was accepted, and stays there until a transaction ends it. What
is here in memory is made from the ledger when the server starts, so nothing depends on this process living on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from sfumato.serve.asked import CLIP, LORAS, loras_of
from sfumato.serve.books import Books
from sfumato.serve.devices import Connect, Device
from sfumato.serve.job import Live, error_of, fairest, next_for, now, why
from sfumato.serve.ledger import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, LedgerError
from sfumato.serve.metrics import Metrics
from sfumato.serve.money import work_of
from sfumato.serve.refusals import LONGEST_WAIT, Refused, file_gone
from sfumato.serve.settings import Settings
from sfumato.serve.wire import Broken

log = logging.getLogger("sfumato.serve")
MOST_LOSSES = 3  # workers that may be lost with a job drawn by itself before it is given up
MOST_TRIES = 20  # starts of a job after which it is not taken up again, when the server died with it
GRACE = 30.0  # seconds that a worker may be late in stopping a job, before it is killed
RECKON = 0.1  # seconds between sums of what waits
TICK = 0.25  # seconds between looks at deadlines
AGAIN = 1.0  # seconds until the ledger or the disk is tried again
GIVE_UP = 60.0  # seconds of trying to write what was drawn
SWEEP = 3600.0
READY = 10.0  # seconds that a submission waits for a worker that is being started again


class Floor:
    """The queue and the devices, on one event loop."""

    def __init__(self, settings: Settings, books: Books, connect: Connect):
        self.settings, self.books, self.metrics = settings, books, Metrics()
        self.live: dict[str, Live] = {}
        self.queue: list[Live] = []
        self.closing = False
        self._served: dict[str, int] = {}  # tenant → the number of its last turn
        self._turns = itertools.count(1)
        self._reckoned = (-math.inf, 0.0)  # when, and the seconds of work that waited then
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        start = {"models": [model.to_json() for model in settings.models], "batch": settings.batch}
        self.devices = [
            Device(
                {**start, "number": number, "device": name, "memory": settings.memory},
                connect,
                self._heard,
                self._lost,
            )
            for number, name in enumerate(settings.devices)
        ]

    async def open(self) -> None:
        """Start the workers, and take up what an earlier server has left."""
        await asyncio.gather(*(device.open() for device in self.devices))
        ledger = self.books.ledger
        for record in await self.books.write(ledger.open_jobs):
            live = Live(
                record, alone=record.state == RUNNING
            )  # who waited for it is gone, and may ask for it
            if record.state == RUNNING:
                await self.books.write(ledger.requeue, record.id)
                live.record = replace(record, state=QUEUED, started=None)
            self.add(live)
            if record.state == RUNNING and record.tries >= MOST_TRIES:
                self.queue.remove(live)
                message = (
                    f"the server, or its worker, was lost each of the {record.tries} times that it was drawn"
                )
                self._begin(self._end(live, FAILED, error_of("worker_lost", message)))
        if self.queue:
            log.info("%d jobs were left by an earlier server", len(self.queue))
        for work in (self._dispatching, self._ticking, self._sweeping):
            self._begin(work())

    async def close(self) -> None:
        """End the workers. What has not ended stays in the ledger for the next start."""
        self.closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(device.close() for device in self.devices))

    def add(self, live: Live) -> None:
        """Take a job that the ledger has into the queue."""
        self.live[live.id] = live
        self.queue.append(live)
        self._wake.set()

    @property
    def ready(self) -> bool:
        """Whether there is a worker that can draw."""
        return any(device.ready.is_set() for device in self.devices)

    @property
    def running(self) -> list[Live]:
        return [live for device in self.devices for live in device.running]

    async def some_device(self) -> Device:
        """A worker to ask; `Refused` if none is there for a while."""
        until = time.monotonic() + READY
        while time.monotonic() < until:
            ready = [device for device in self.devices if device.ready.is_set()]
            if ready:
                return min(ready, key=lambda device: device.asked)
            await asyncio.sleep(0.05)
        raise Refused(503, "no_worker", "no worker is there now; one is being started", retry_after=5)

    def wait(self) -> float:
        """Seconds of work that each device has before it, as expected."""
        return sum(live.seconds_left for live in self.live.values()) / len(self.devices)

    def patience(self) -> float:
        """Seconds after which a quarter of what waits will be done; spread, so that not all come back at once.

        Reckoned ten times a second at most, since whoever is refused is told it.
        """
        when, wait = self._reckoned
        if time.monotonic() > when + RECKON:
            wait = self.wait()
            self._reckoned = time.monotonic(), wait
        return min(LONGEST_WAIT, max(1.0, wait / 4) * random.uniform(1.0, 1.5))

    @contextlib.asynccontextmanager
    async def held(self, live: Live) -> AsyncIterator[Live]:
        """While inside, somebody waits for the job. When nobody does any more it is cancelled, unless it is kept: after
        its grace, if nobody has come for it until then."""
        live.holders += 1
        live.visits += 1
        try:
            yield live
        finally:
            live.holders -= 1
            if not live.holders and not live.keep and not live.ended.is_set():
                if live.grace and not self.closing:
                    self._begin(self._missed(live, live.visits))
                else:
                    self.stop(live, "client_gone")

    async def _missed(self, live: Live, visits: int) -> None:
        """Give who was the job's last visitor time to come back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(live.grace):
                await live.ended.wait()
        if live.visits == visits:
            self.stop(live, "client_gone")

    def stop(self, live: Live, reason: str) -> None:
        """Have a job end as cancelled: at once if it waits, within a step if it is drawn."""
        if live.ending is not None or live.ended.is_set():
            return
        live.ending = reason
        if live in self.queue:
            self.queue.remove(live)
            self._begin(self._end(live, CANCELLED, error_of("cancelled", why(reason))))
        elif live.device is not None:
            live.device.cancel(live.id)

    def position(self, live: Live) -> int | None:
        """How many are before it in the queue."""
        return self.queue.index(live) if live in self.queue else None

    # --- drawing --------------------------------------------------------------------------------------------------

    async def _dispatching(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            for device in self.devices:
                while device.ready.is_set():
                    turn = fairest(self.queue, self.running, self._served)
                    live = next_for(turn, device.running, self.settings.batch, device.room)
                    if live is None:
                        break
                    await self._hand(live, device)
            self._count()

    async def _hand(self, live: Live, device: Device) -> None:
        """Give a job to a device."""
        self.queue.remove(live)
        device.running.append(live)
        self._served[live.record.tenant] = next(self._turns)
        live.device, live.done, started = device, 0, now()
        try:
            parts = [await self.bytes_of(name) for name in live.files]
            loras = await self.places_of(loras_of(live.record.request))
            if live not in device.running:  # the worker was lost meanwhile, and the job is in the queue again
                return
            await self.books.write(self.books.ledger.start, live.id, started)
        except Refused as error:
            if live not in device.running:
                return
            device.running.remove(live)
            self._begin(self._end(live, FAILED, error_of("file_gone", str(error))))
            return
        except LedgerError as error:
            log.warning("%s", error)
            if live in device.running:  # else it is on its way back already
                self._back(live)
            await asyncio.sleep(AGAIN)
            self._wake.set()
            return
        if live not in device.running:
            return
        live.record = replace(live.record, state=RUNNING, started=started)
        self.metrics.waited.observe(started - live.record.made)
        options = live.record.options
        message = {
            "job": live.id,
            "model": live.record.model,
            "kind": live.kind,
            "request": live.record.request,
            "files": live.files,
            "loras": loras,
            "format": options["format"],
            "looks": options["looks"],
            "look_format": options["look_format"],
            "left": live.record.deadline - now(),
        }
        with contextlib.suppress(Broken):
            device.draw(message, parts)
            if live.ending is not None:
                device.cancel(live.id)
        live.publish("state", {"state": RUNNING})

    async def bytes_of(self, name: str, field: str | None = None) -> bytes:
        """An upload, of a request's field; `Refused` if it is not there any more."""
        data = await self.books.work(self.books.store.get, name)
        if data is None:
            raise file_gone(name, field)
        return data

    async def places_of(self, loras: Sequence[str]) -> dict[str, str]:
        """Where uploaded LoRAs lie, by id; `Refused` if one is not there any more."""
        found = {name: await self.books.work(self.books.store.upload, name) for name in loras}
        for name, place in found.items():
            if place is None:
                raise file_gone(name, LORAS)
        return {name: str(place) for name, place in found.items()}

    def _back(self, live: Live) -> None:
        """Into the queue again, where it was."""
        if live.device is not None and live in live.device.running:
            live.device.running.remove(live)
        live.device, live.done = None, 0
        live.record = replace(live.record, state=QUEUED, started=None)
        self.queue.insert(0, live)

    def _heard(self, device: Device, message: dict[str, Any], parts: list[bytes]) -> None:
        """What a worker says of itself or of a job."""
        kind = message["is"]
        if kind == "ready":
            self._wake.set()
            self._count()
            return
        if kind == "pulse":
            self.metrics.resident.labels(device.name).set(message["resident"])
            self.metrics.calls.labels(device.name).set(message["calls"])
            self.metrics.rows.labels(device.name).set(message["rows"])
            return
        live = self.live.get(message["job"])
        if live is None or live.device is not device:
            return
        if kind == "step":
            live.done = message["done"]
            live.publish(
                "progress", {"step": live.done, "steps": live.steps, "progress": round(live.progress, 4)}
            )
        elif kind == "look":
            live.look = message["number"], parts[0]
            live.publish("preview", {"number": message["number"]}, parts[0])
        elif kind == "done":
            self._off(live)
            self._begin(self._settle(live, message, parts))
        elif kind == "failed":
            self._off(live)
            error = message["error"]
            if error["code"] == "cancelled":
                self._begin(self._end(live, CANCELLED, error_of("cancelled", why(live.ending))))
            else:
                self._begin(
                    self._end(live, FAILED, error_of(error["code"], error["message"], error["param"]))
                )

    def _off(self, live: Live) -> None:
        """The device has room again."""
        if live.device is not None and live in live.device.running:
            live.device.running.remove(live)
        self._wake.set()

    def _lost(self, device: Device) -> None:
        """A worker is gone, and what it drew has to be drawn again."""
        if self.closing:
            return
        self.metrics.restarts.inc()
        jobs, device.running = device.running, []
        for live in jobs:
            live.losses += len(jobs) == 1  # in company it may have been another's fault
            live.alone = True
            if live.ending is not None:
                late = live.ending == "deadline"
                error = error_of("deadline_exceeded" if late else "cancelled", why(live.ending))
                self._begin(self._end(live, FAILED if late else CANCELLED, error))
            elif live.losses >= MOST_LOSSES:
                message = f"the worker was lost {live.losses} times while it drew nothing but this"
                self._begin(self._end(live, FAILED, error_of("worker_lost", message)))
            else:
                self._begin(self._again(live))
        self._wake.set()

    async def _again(self, live: Live) -> None:
        while True:
            try:
                await self.books.write(self.books.ledger.requeue, live.id)
                break
            except LedgerError as error:
                log.warning("%s", error)
                await asyncio.sleep(AGAIN)
        self._back(live)
        live.publish("state", {"state": QUEUED})
        self._wake.set()

    # --- ending ---------------------------------------------------------------------------------------------------

    async def _settle(self, live: Live, message: dict[str, Any], files: list[bytes]) -> None:
        """Keep what was drawn, and then take the money: a crash between the two draws them again and bills once."""
        until = time.monotonic() + GIVE_UP
        while True:
            try:
                await self.books.work(self.books.store.put_outputs, live.id, files)
                break
            except OSError as error:
                log.error("what %s drew cannot be written: %s", live.id, error)
                if time.monotonic() > until:
                    await self._end(
                        live, FAILED, error_of("storage_full", "what was drawn could not be kept")
                    )
                    return
                await asyncio.sleep(AGAIN)
        receipt = message["receipt"]
        due = self.settings.prices.due(
            live.record.model, work_of(live.expected, receipt["seconds"]), live.record.reserved
        )
        receipt = {
            **receipt,
            "job": live.id,
            "model": live.record.model,
            "queued_seconds": round((live.record.started or live.record.made) - live.record.made, 4),
            "currency": self.settings.prices.currency,
            "reserved_micros": live.record.reserved,
            "charged_micros": due,
            "recipe": message["recipe"],
        }
        changes = {"charged": due, "pictures": len(files), "receipt": receipt}
        if await self._end(live, SUCCEEDED, None, seconds=receipt["seconds"], **changes):
            made = self.metrics.clips if live.kind == CLIP else self.metrics.pictures
            made.labels(live.record.model).inc(len(files))
            self.metrics.seconds.inc(receipt["seconds"])
            self.metrics.charged.inc(due)

    async def _end(
        self, live: Live, state: str, error: dict[str, Any] | None, *, seconds: float = 0.0, **changes: Any
    ) -> bool:
        """Write a job's end down, however long that takes, and tell who waits. False if it had ended."""
        if live.ended.is_set():
            return False
        ended = now()
        while True:
            try:
                await self.books.write(
                    self.books.ledger.end, live.record, state, ended, error=error, seconds=seconds, **changes
                )
                break
            except LedgerError as failure:
                log.warning("%s", failure)
                await asyncio.sleep(AGAIN)
        live.record = replace(live.record, state=state, ended=ended, error=error, **changes)
        self.live.pop(live.id, None)
        self._begin(self._forget(live))
        live.ended.set()
        live.publish("state", {"state": state})
        self.metrics.jobs.labels(live.record.model, state).inc()
        self.metrics.took.observe(ended - live.record.made)
        self._count()
        self._wake.set()
        return True

    async def _forget(self, live: Live) -> None:
        """Drop the files that are a job's alone."""
        with contextlib.suppress(LedgerError, OSError):  # then they are swept
            await self.books.drop(*live.forget)

    async def _ticking(self) -> None:
        """Deadlines: of what waits, and of workers that do not stop."""
        while True:
            await asyncio.sleep(TICK)
            late = now()
            for live in [live for live in self.queue if live.record.deadline < late]:
                self.queue.remove(live)
                live.ending = "deadline"
                self._begin(self._end(live, FAILED, error_of("deadline_exceeded", why("deadline"))))
            for device in self.devices:
                stuck = [live for live in device.running if live.record.deadline + GRACE < late]
                if stuck and device.ready.is_set():
                    log.error("a worker does not stop; it is ended")
                    for live in stuck:
                        live.ending = live.ending or "deadline"
                    device.kill()

    async def _sweeping(self) -> None:
        """Remove what is older than it is kept; take up jobs whose acceptance was written without our hearing so."""
        while True:
            with contextlib.suppress(LedgerError, OSError):
                for record in await self.books.write(self.books.ledger.open_jobs):
                    if (
                        record.id not in self.live
                        and record.state == QUEUED
                        and record.made < now() - AGAIN * 60
                    ):
                        self.add(Live(record))
                needed = {name for live in self.live.values() for name in live.needs}
                await self.books.sweep(self.settings.keep + self.settings.longest, needed)
            await asyncio.sleep(SWEEP)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the desk failed", exc_info=error)

    def _count(self) -> None:
        self.metrics.queued.set(len(self.queue))
        self.metrics.running.set(len(self.running))
        self.metrics.workers.set(sum(device.ready.is_set() for device in self.devices))
