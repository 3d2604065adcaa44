"""Which job a lost worker counts against, and when it is given up; with workers that die when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from sfumato.serve import wire
from sfumato.serve.books import Books
from sfumato.serve.floor import MOST_LOSSES, MOST_TRIES, Floor
from sfumato.serve.job import Live, now
from sfumato.serve.ledger import FAILED, RUNNING, SUCCEEDED, Ledger, Record
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
        "files": [], "format": "png", "looks": 0, "look_format": "jpeg",
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


def test_a_poisonous_job_is_given_up_and_its_neighbour_is_drawn(tmp_path):
    async def story(shop: Shop) -> None:
        poison, neighbour = shop.accept(1), shop.accept(2)
        await shop.draws(poison, neighbour)
        await shop.lose()  # in company: nobody's fault
        while not poison.ended.is_set():
            found = await shop.drawing()
            assert len(found) == 1, "each is drawn alone"
            if found == {poison.id}:
                await shop.lose()
                if poison.losses == MOST_LOSSES:
                    await ends(poison)
            else:
                shop.workers[-1].done(neighbour.id)
                await ends(neighbour)
        assert shop.state(poison) == FAILED and poison.record.error["code"] == "worker_lost"
        assert poison.losses == MOST_LOSSES and neighbour.losses == 0
        if not neighbour.ended.is_set():
            (await shop.draws(neighbour)).done(neighbour.id)
            await ends(neighbour)
        assert shop.state(neighbour) == SUCCEEDED
        assert len(shop.workers) <= 1 + MOST_LOSSES + 1

    in_shop(tmp_path, story)


def test_what_is_lost_in_company_again_and_again_is_not_given_up(tmp_path):
    async def story(shop: Shop) -> None:
        for number in range(0, 2 * MOST_LOSSES, 2):
            pair = shop.accept(number), shop.accept(number + 1)
            await shop.draws(*pair)
            await shop.lose()
            for _ in pair:
                (name,) = await shop.drawing()
                shop.workers[-1].done(name)
                await ends(next(live for live in pair if live.id == name))
            assert [(shop.state(live), live.losses) for live in pair] == [(SUCCEEDED, 0)] * 2

    in_shop(tmp_path, story)


@pytest.mark.parametrize(("tries", "taken"), [(MOST_TRIES - 1, True), (MOST_TRIES, False)])
def test_a_job_that_takes_the_server_with_it_is_not_taken_up_for_ever(tmp_path, tries, taken):
    before = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    job = record(1)
    before.accept(job)
    for _ in range(tries):  # each time the front was lost while it ran
        before.requeue(job.id)
        assert before.start(job.id, now())
    before.close()

    async def story(shop: Shop) -> None:
        live = shop.floor.live[job.id]
        if taken:
            (await shop.draws(live)).done(job.id)
        await ends(live)
        assert shop.state(live) == (SUCCEEDED if taken else FAILED)

    in_shop(tmp_path, story)
    with contextlib.closing(Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")) as book:
        assert book.open_jobs() == [] and book.committed("a", now()) == book.job("a", job.id).charged == 0
