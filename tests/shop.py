"""A floor without processes: workers that do what a test tells them, and die when it says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sfumato.serve import wire
from sfumato.serve.books import Books
from sfumato.serve.floor import Floor
from sfumato.serve.job import Live, now
from sfumato.serve.ledger import RUNNING, Ledger, Record
from sfumato.serve.settings import Settings, model_given
from sfumato.serve.store import Store

READY = {"is": "ready", "models": [], "room": 10**9, "device": "cpu"}
RECEIPT = {"seconds": 1.0}


class Worker:
    """The front's end of a line to a worker that is in this process: what it was given, and its death."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[dict] = asyncio.Queue()
        self.jobs: list[str] = []
        self.heard.put_nowait(READY)

    def send(self, message, parts=()) -> None:
        if message["do"] == "draw":
            self.jobs.append(message["job"])

    async def receive(self):
        message = await self.heard.get()
        if message is None:
            raise wire.Broken("the worker is gone")
        return dict(message), [b"a picture"] if message["is"] == "done" else []

    def done(self, job: str) -> None:
        self.heard.put_nowait({"is": "done", "job": job, "receipt": RECEIPT, "recipe": {}})

    def kill(self) -> None:
        self.heard.put_nowait(None)

    async def close(self) -> None:
        pass


class Shop:
    """A floor on a ledger, and the workers that it has started, the last one at work."""

    def __init__(self, folder: Path):
        settings = Settings((model_given("pocket"),), folder, devices=(None,), batch=2)
        self.books = Books(Ledger(settings.ledger_url), Store(folder))
        self.workers: list[Worker] = []
        self.floor = Floor(settings, self.books, self.connect)

    async def connect(self, start) -> Worker:
        self.workers.append(Worker())
        return self.workers[-1]

    def accept(self, number: int, **more) -> Live:
        """A job that the ledger has, and the floor."""
        live = Live(record(number, **more))
        self.books.ledger.accept(live.record)
        self.floor.add(live)
        return live

    async def drawing(self) -> set[str]:
        """What is drawn, when something is."""
        async with asyncio.timeout(60):
            while not (found := {live.id for live in self.floor.running if live.record.state == RUNNING}):
                await asyncio.sleep(0.01)
        return found

    async def draws(self, *lives: Live) -> Worker:
        """The worker, when it draws all of these."""
        async with asyncio.timeout(60):
            while {live.id for live in lives} != await self.drawing():
                await asyncio.sleep(0.01)
        return self.workers[-1]

    async def lose(self) -> None:
        """The worker dies, and another begins."""
        before = len(self.workers)
        self.workers[-1].kill()
        async with asyncio.timeout(60):
            while len(self.workers) == before:
                await asyncio.sleep(0.01)

    def state(self, live: Live) -> str:
        return self.books.ledger.job("a", live.id).state


def record(number: int, **more) -> Record:
    options = {
        "expected": {"seconds": 2.0, "pictures": 1, "memory": 1, "pixel_steps": 4}, "sampler_steps": 4, "tune": [],
        "notes": [], "files": [], "format": "png", "looks": 0, "look_format": "jpeg",
    }  # fmt: skip
    name = f"job_{number:032x}"
    made = now() + number / 1000
    return Record(name, "a", "pocket", {}, options, "", made=made, deadline=made + 600, reserved=7, **more)


def in_shop(folder: Path, story) -> None:
    async def run() -> None:
        shop = Shop(folder)
        await shop.floor.open()
        try:
            await story(shop)
        finally:
            await shop.floor.close()
            shop.books.close()

    asyncio.run(run())


async def ends(live: Live) -> None:
    async with asyncio.timeout(60):
        await live.ended.wait()
