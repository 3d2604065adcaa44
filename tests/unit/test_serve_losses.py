"""Which job a lost worker counts against, and when it is given up; with workers that die when they are told to."""

from __future__ import annotations

import contextlib

import pytest

from sfumato.serve.floor import MOST_LOSSES, MOST_TRIES
from sfumato.serve.job import now
from sfumato.serve.ledger import FAILED, SUCCEEDED, Ledger
from shop import Shop, ends, in_shop, record


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
