"""Money and jobs: what the ledger promises, on SQLite and, where a server of it is installed, on PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.errors import InputError
from sfumato.serve import ledger as books
from sfumato.serve.ledger import (
    CANCELLED,
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Ledger,
    LedgerError,
    OverBudget,
    Record,
)
from sfumato.serve.store import new_id

NOW = 1_790_000_000.0  # 2026-09-21


def record(**changes) -> Record:
    job = Record(
        id=new_id("job"),
        tenant="a",
        model="pocket",
        request={"prompt": "a red cube", "seed": 2**64 - 1},
        options={"format": "png"},
        digest="d",
        made=NOW,
        deadline=NOW + 60,
        reserved=500,
    )
    return replace(job, **changes)


@pytest.fixture(scope="module")
def postgres():
    """The URL of an empty PostgreSQL that lives as long as these tests."""
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("no PostgreSQL is installed")
    psycopg = pytest.importorskip("psycopg")
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="pg"))
    change = {}
    if os.geteuid() == 0:  # it refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        change = {"user": "nobody", "group": nobody.pw_gid, "extra_groups": []}
    run = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **change}
    made = subprocess.run(["initdb", "-D", str(folder / "d"), "-U", "sfumato", "--auth=trust", "-N"], **run)
    if made.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip("PostgreSQL does not start here")
    options = ["-k", str(folder), "-c", "listen_addresses=", "-c", "shared_buffers=8MB"]
    server = subprocess.Popen(["postgres", "-D", str(folder / "d"), *options], **run)
    url = f"postgresql+psycopg://sfumato@/postgres?host={folder}"
    try:
        for _ in range(100):
            try:
                psycopg.connect(f"host={folder} user=sfumato dbname=postgres").close()
                break
            except psycopg.OperationalError:
                time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # its quick way to stop, whoever is connected
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request, tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres")
    opened = Ledger(url)
    yield opened
    if request.param == "postgresql":
        opened.meta.drop_all(opened.engine)
    opened.close()


def test_a_job_is_found_as_it_was_written(ledger):
    job = ledger.accept(record())
    assert ledger.job("a", job.id) == job
    assert ledger.job("b", job.id) is None
    assert ledger.open_jobs() == [job]


def test_a_job_that_succeeds_is_settled_once(ledger):
    job = ledger.accept(record())
    assert ledger.committed("a", NOW) == 500
    assert ledger.start(job.id, NOW + 1)
    assert not ledger.start(job.id, NOW + 1)
    done = {"charged": 300, "pictures": 2, "seconds": 1.5, "receipt": {"x": 1}}
    assert ledger.end(job, SUCCEEDED, NOW + 2, **done)
    assert not ledger.end(job, SUCCEEDED, NOW + 3, **done)
    assert not ledger.end(job, FAILED, NOW + 3)
    kept = ledger.job("a", job.id)
    assert (kept.state, kept.charged, kept.pictures, kept.receipt, kept.tries) == (
        SUCCEEDED,
        300,
        2,
        {"x": 1},
        1,
    )
    assert ledger.committed("a", NOW) == 300
    assert ledger.open_jobs() == []
    day = {"tenant": "a", "day": "2026-09-21", "jobs": 1, "pictures": 2, "seconds": 1.5, "micros": 300}
    assert ledger.usage("2026-09-21", "2026-09-21") == [day]
    assert ledger.usage("2026-09-21", "2026-09-21", "b") == []
    assert ledger.usage("2026-09-22", "2026-09-30") == []


@pytest.mark.parametrize("state", [FAILED, CANCELLED])
def test_what_gives_no_picture_is_free(ledger, state):
    job = ledger.accept(record())
    assert ledger.end(job, state, NOW + 1, error={"code": "x"})
    assert ledger.committed("a", NOW) == 0
    assert ledger.usage("2000-01-01", "2100-01-01") == []
    with pytest.raises(ValueError):
        ledger.end(job, state, NOW + 1, charged=1)


def test_the_tables_themselves_admit_one_settlement(ledger):
    job = ledger.accept(record())
    ledger.end(job, SUCCEEDED, NOW, charged=1)
    with pytest.raises(books.IntegrityError), ledger._transaction() as run:
        ledger._enter(run, job, "refund", 1, NOW)


def test_a_budget_holds_what_is_spent_and_what_is_reserved(ledger):
    first = ledger.accept(record(), budget=1200)
    ledger.accept(record(), budget=1200)
    with pytest.raises(OverBudget) as refused:
        ledger.accept(record(), budget=1200)
    assert refused.value.left == 200
    ledger.accept(record(tenant="b"), budget=1200)
    ledger.end(first, SUCCEEDED, NOW, charged=100)
    ledger.accept(record(), budget=1200)
    next_month = NOW + 30 * 86400
    assert ledger.committed("a", next_month) == 1000  # what is open, and nothing of the month before


def test_an_idempotency_key_is_one_job(ledger):
    job = ledger.accept(record(idempotency="k"))
    again = ledger.accept(record(idempotency="k", digest="other"))
    assert again == job
    assert ledger.accept(record(tenant="b", idempotency="k")).tenant == "b"
    assert ledger.keyed("a", "k") == job
    assert len(ledger.open_jobs()) == 2


def test_the_same_once_more_is_joined_unless_it_gave_nothing(ledger):
    job = ledger.accept(record())
    assert ledger.same("a", "d", NOW - 10) == job
    assert ledger.same("a", "d", NOW + 1) is None
    assert ledger.same("b", "d", NOW - 10) is None
    ledger.end(job, CANCELLED, NOW)
    assert ledger.same("a", "d", NOW - 10) is None


def test_what_a_client_was_given_is_not_joined_again(ledger):
    job = ledger.accept(record())
    ledger.start(job.id, NOW)
    ledger.end(job, SUCCEEDED, NOW, charged=1)
    assert ledger.same("a", "d", NOW - 10).id == job.id  # nobody was there to be answered
    for _ in range(2):
        ledger.answered(job.id)
    assert ledger.same("a", "d", NOW - 10) is None
    ledger.drop_answers(job.made)
    assert ledger.same("a", "d", NOW - 10) is None
    other = ledger.accept(record(made=NOW - 1))
    assert ledger.same("a", "d", NOW - 10) == other
    ledger.drop_answers(job.made + 1)  # it is too old to be joined, and nobody asks any more
    with ledger._transaction() as run:
        assert run.execute(books.sql.select(ledger.answers)).all() == []


def test_a_running_job_goes_back_into_the_queue(ledger):
    job = ledger.accept(record())
    assert not ledger.requeue(job.id)
    ledger.start(job.id, NOW)
    assert ledger.requeue(job.id)
    [kept] = ledger.open_jobs()
    assert (kept.state, kept.tries) == (QUEUED, 1)


def test_lists_are_a_tenants_own_newest_first(ledger):
    jobs = [ledger.accept(record(made=NOW + k)) for k in range(4)]
    ledger.accept(record(tenant="b"))
    assert [job.id for job in ledger.jobs_of("a", 3)] == [jobs[k].id for k in (3, 2, 1)]
    assert [job.id for job in ledger.jobs_of("a", 3, before=NOW + 1)] == [jobs[0].id]
    assert [job.id for job in ledger.jobs_of("a", 3, after=jobs[1])] == [jobs[0].id]


def test_uploads_are_a_tenants_own(ledger):
    upload = books.Upload(new_id("file"), "a", "png", 10, 8, 8, NOW)
    ledger.add_upload(upload)
    assert ledger.upload("a", upload.id) == upload
    assert ledger.upload("b", upload.id) is None
    assert ledger.old_uploads(NOW + 1) == [upload.id] and ledger.old_uploads(NOW) == []
    later = [books.Upload(new_id("file"), "a", "png", 10, 8, 8, NOW + k) for k in (1, 2)]
    for each in later:
        ledger.add_upload(each)
    assert ledger.uploads_of("a", 2) == [later[1], later[0]] and ledger.uploads_of("b", 2) == []
    assert ledger.uploads_of("a", 9, after=later[0]) == [upload] == ledger.uploads_of("a", 9, before=NOW + 1)
    ledger.drop_upload(upload.id)
    assert ledger.upload("a", upload.id) is None


def test_a_ledger_of_another_currency_or_version_is_refused(ledger):
    url = ledger.engine.url.render_as_string(hide_password=False)
    assert Ledger(url).currency == "USD"
    with pytest.raises(InputError, match="kept in USD"):
        Ledger(url, "EUR")
    with ledger._transaction() as run:
        run.execute(books.sql.update(ledger.about).where(ledger.about.c.name == "version").values(value="0"))
    with pytest.raises(InputError, match="version 0"):
        Ledger(url)


def test_other_databases_are_refused():
    with pytest.raises(InputError, match="ledger"):
        Ledger("nonsense://x")


def test_a_locked_ledger_says_so_and_is_well_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "BUSY", 50)
    ledger = Ledger(f"sqlite:///{tmp_path / 'l.db'}")
    other = sqlite3.connect(tmp_path / "l.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked"):
        ledger.accept(record())
    other.execute("ROLLBACK")
    job = ledger.accept(record())
    assert ledger.open_jobs() == [job]


def test_a_full_disk_loses_nothing_that_was_accepted(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'l.db'}")
    job = ledger.accept(record())
    with ledger.engine.connect() as run:
        pages = run.exec_driver_sql("PRAGMA page_count").scalar()
        run.exec_driver_sql(f"PRAGMA max_page_count={pages}")  # SQLite's own way to have no room left
    with pytest.raises(LedgerError, match="full"):
        for _ in range(50):
            ledger.accept(record(request={"prompt": "x" * 20_000}))
    kept = ledger.open_jobs()
    assert job in kept
    assert {j.id for j in kept} == {j.id for j in Ledger(f"sqlite:///{tmp_path / 'l.db'}").open_jobs()}


def test_many_at_once_cannot_overspend(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'l.db'}")
    taken, refused = [], []

    def ask():
        for _ in range(5):
            try:
                taken.append(ledger.accept(record(), budget=4_000))
            except OverBudget:
                refused.append(1)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert (len(taken), len(refused)) == (8, 22)


KILLED = """
import sys, time
from sfumato.serve.ledger import *
from sfumato.serve.store import new_id
ledger = Ledger(sys.argv[1])
for k in range(10_000):
    job = ledger.accept(Record(new_id("job"), "a", "m", {}, {}, str(k), time.time(), 9e9, 10))
    print("accepted", job.id, flush=True)
    ledger.start(job.id, time.time())
    if ledger.end(job, SUCCEEDED, time.time(), charged=7):
        print("settled", job.id, flush=True)
"""


def test_killed_in_the_middle_it_keeps_what_it_said(tmp_path):
    url = f"sqlite:///{tmp_path / 'l.db'}"
    accepted, settled = set(), set()
    for turn in range(5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE, text=True)
        for count, line in enumerate(process.stdout):
            word, job = line.split()
            (accepted if word == "accepted" else settled).add(job)
            if count > 20 + 7 * turn:
                process.kill()
        process.wait()
    ledger = Ledger(url)
    for job in accepted:
        kept = ledger.job("a", job)
        assert kept is not None and kept.state in (QUEUED, RUNNING, SUCCEEDED)
        assert job not in settled or (kept.state, kept.charged) == (SUCCEEDED, 7)
    with ledger._transaction() as run:
        rows = run.execute(books.sql.select(ledger.entries.c.job, ledger.entries.c.kind)).all()
        done = run.execute(
            books.sql.select(ledger.jobs.c.id).where(ledger.jobs.c.state == SUCCEEDED)
        ).scalars()
    settlements = [job for job, kind in rows if kind == "settle"]
    assert len(settlements) == len(set(settlements)) and set(settlements) == set(done)
