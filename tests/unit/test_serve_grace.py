"""Who hangs up: a job that is not kept ends at once, or after its grace if nobody has come back for it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from sfumato.serve.ledger import CANCELLED, LedgerError
from sfumato.serve.refusals import Refused
from shop import Shop, ends, in_shop


async def visit(shop: Shop, live, seconds: float = 0.0) -> None:
    """Somebody waits for the job for so long, and hangs up."""
    async with shop.floor.held(live):
        await asyncio.sleep(seconds)


def left(shop: Shop, grace: float):
    live = shop.accept(1)
    live.keep, live.grace = False, grace
    return live


def test_without_a_grace_it_is_told_to_stop_at_once(tmp_path):
    async def story(shop: Shop) -> None:
        live = left(shop, 0.0)
        await shop.draws(live)
        await visit(shop, live)
        assert live.ending == "client_gone"

    in_shop(tmp_path, story)


def test_within_its_grace_it_goes_on_and_ends_after_it(tmp_path):
    async def story(shop: Shop) -> None:
        live = left(shop, 0.3)
        await shop.draws(live)
        await visit(shop, live)
        await asyncio.sleep(0.1)
        assert live.ending is None
        async with asyncio.timeout(10):
            while live.ending is None:
                await asyncio.sleep(0.01)
        assert live.ending == "client_gone"

    in_shop(tmp_path, story)


def test_who_comes_back_has_the_job_and_a_whole_grace_again(tmp_path):
    async def story(shop: Shop) -> None:
        live = left(shop, 0.4)
        worker = await shop.draws(live)
        await visit(shop, live)
        await visit(shop, live, 0.6)  # while somebody waits, the first one's grace passes
        assert live.ending is None
        await asyncio.sleep(0.1)
        worker.done(live.id)
        await ends(live)
        assert shop.state(live) == "succeeded"
        await asyncio.sleep(0.5)
        assert live.ending is None

    in_shop(tmp_path, story)


def test_what_waits_in_the_queue_has_a_grace_too(tmp_path):
    async def story(shop: Shop) -> None:
        first, second = shop.accept(1), shop.accept(2)
        await shop.draws(first, second)
        live = shop.accept(3)
        live.keep, live.grace = False, 0.1
        await visit(shop, live)
        await ends(live)
        assert shop.state(live) == CANCELLED and live.record.error["message"].startswith(
            "the client was gone"
        )

    in_shop(tmp_path, story)


# --- a worker that is lost while a job is handed over ----------------------------------------------------------------


@pytest.mark.parametrize("wrong", [LedgerError("locked"), Refused(400, "bad_input", "no file")])
def test_a_job_is_queued_once_whatever_fails_while_its_worker_is_lost(tmp_path, wrong):
    async def story(shop: Shop) -> None:
        write, failed = shop.books.write, []

        async def writing(call, *args, **more):
            if call == shop.books.ledger.start and not failed:
                failed.append(call)
                await shop.lose()
                while live not in shop.floor.queue:
                    await asyncio.sleep(0.01)
                raise wrong
            return await write(call, *args, **more)

        shop.books.write = writing
        live = shop.accept(1)
        async with asyncio.timeout(60):
            while not failed or live not in shop.floor.queue:
                await asyncio.sleep(0.01)
            for _ in range(20):
                assert shop.floor.queue.count(live) <= 1
                await asyncio.sleep(0.01)
            worker = await shop.draws(live)
        assert worker.jobs == [live.id] and live not in shop.floor.queue
        worker.done(live.id)
        await ends(live)
        assert shop.state(live) == "succeeded"

    in_shop(tmp_path, story)


def test_a_clean_stop_warns_of_nothing(tmp_path, caplog):
    async def story(shop: Shop) -> None:
        live = shop.accept(1)
        (await shop.draws(live)).done(live.id)
        await ends(live)

    with caplog.at_level(logging.INFO, "sfumato.serve"):
        in_shop(tmp_path, story)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_worker_that_is_lost_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sfumato.serve"):
        in_shop(tmp_path, lambda shop: shop.lose())
    assert "the worker is gone" in caplog.text
