"""What was asked and what is owed for it: the only thing that must survive.

A job is accepted by one transaction that also reserves its price, and ended by one that settles or refunds it; the
tables admit one of each. So whatever dies in between, a job is there once and is billed at most once.

SQLite by default, in WAL mode with every commit on the disk before it is believed; PostgreSQL by its URL, such as
postgresql+psycopg://user@host/name. Both through SQLAlchemy's core. Calls block: the front keeps a thread for them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from sfumato import checks
from sfumato.errors import InputError, SfumatoError
from sfumato.serve.tables import VERSION, tables

QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = "queued", "running", "succeeded", "failed", "cancelled"
OPEN = (QUEUED, RUNNING)
ENDED = (SUCCEEDED, FAILED, CANCELLED)
BUSY = 5_000  # milliseconds that SQLite waits for a lock


class LedgerError(SfumatoError):
    """The ledger cannot be read or written now: locked, no room on the disk, or its server is away."""

    code = "ledger_unavailable"


class OverBudget(SfumatoError):
    """A tenant's money for the month does not cover a job."""

    code = "budget_exceeded"

    def __init__(self, left: int):
        super().__init__("the budget of this key does not cover the job")
        self.left = left


@dataclass(frozen=True)
class Record:
    """A job as the ledger has it; see `tables.py`."""

    id: str
    tenant: str
    model: str
    request: dict[str, Any]
    options: dict[str, Any]
    digest: str
    made: float
    deadline: float
    reserved: int
    idempotency: str | None = None
    state: str = QUEUED
    started: float | None = None
    ended: float | None = None
    tries: int = 0
    charged: int = 0
    pictures: int = 0
    receipt: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class Upload:
    """A picture, clip or LoRA that a tenant sent. format: of `store.UPLOADS`. width, height: 0 of a LoRA."""

    id: str
    tenant: str
    format: str
    bytes: int
    width: int
    height: int
    made: float


class Ledger:
    """Jobs and money. Every method is one transaction, and raises `LedgerError` where that did not happen.

    currency: what it is kept in; None takes what a ledger that is there says.
    """

    def __init__(self, url: str, currency: str | None = None):
        self.meta, found = tables()
        self.jobs, self.entries, self.uploads = found["jobs"], found["entries"], found["uploads"]
        self.answers, self.about = found["answers"], found["about"]
        try:
            self.engine = sql.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except (SQLAlchemyError, ImportError) as error:
            raise InputError(
                f"ledger {_without_password(url)} cannot be used: {error}", argument="ledger"
            ) from None
        if self.engine.dialect.name == "sqlite":
            _as_sqlite_should(self.engine)
        elif self.engine.dialect.name != "postgresql":
            raise InputError("the ledger must be sqlite:///FILE or postgresql+psycopg://…", argument="ledger")
        self.currency = self._open(currency)

    def _open(self, currency: str | None) -> str:
        with self._transaction() as run:
            self.meta.create_all(run)
            known = {row.name: row.value for row in run.execute(sql.select(self.about))}
            if not known:
                known = {"version": VERSION, "currency": currency or "USD"}
                run.execute(sql.insert(self.about), [{"name": n, "value": v} for n, v in known.items()])
        if known.get("version") != VERSION:
            raise InputError(
                f"the ledger is of version {known.get('version')}, and this program writes {VERSION}",
                argument="ledger",
            )
        if currency is not None and known.get("currency") != currency:
            raise InputError(
                f"the ledger is kept in {known.get('currency')}, and the prices are in {currency}: take another ledger",
                argument="prices",
            )
        return str(known["currency"])

    def close(self) -> None:
        self.engine.dispose()

    # --- a job's life ---------------------------------------------------------------------------------------------

    def accept(self, job: Record, budget: int | None = None) -> Record:
        """Write a job down and reserve its price; or, if the tenant has used its idempotency key, that job instead.

        `OverBudget` if what the tenant spent this month, and has reserved, leaves less than the price of `budget`.
        """
        try:
            with self._transaction() as run:
                if job.idempotency is not None and (before := self._keyed(run, job.tenant, job.idempotency)):
                    return before
                if budget is not None:
                    left = budget - self._committed(run, job.tenant, month_of(job.made))
                    if job.reserved > left:
                        raise OverBudget(max(left, 0))
                run.execute(sql.insert(self.jobs).values(**_row(job)))
                self._enter(run, job, "reserve", job.reserved, job.made)
                return job
        except IntegrityError:  # somebody was faster with the same key
            with self._transaction() as run:
                if job.idempotency is not None and (before := self._keyed(run, job.tenant, job.idempotency)):
                    return before
            raise LedgerError("the job could not be written") from None

    def start(self, job: str, now: float) -> bool:
        """A queued job runs; False if it was none."""
        c = self.jobs.c
        with self._transaction() as run:
            change = sql.update(self.jobs).where(c.id == job, c.state == QUEUED)
            done = run.execute(change.values(state=RUNNING, started=now, tries=c.tries + 1))
            return done.rowcount == 1

    def requeue(self, job: str) -> bool:
        """A running job is to run again; False if it was none."""
        c = self.jobs.c
        with self._transaction() as run:
            done = run.execute(
                sql.update(self.jobs).where(c.id == job, c.state == RUNNING).values(state=QUEUED)
            )
            return done.rowcount == 1

    def end(
        self,
        job: Record,
        state: str,
        now: float,
        *,
        charged: int = 0,
        pictures: int = 0,
        seconds: float = 0.0,
        receipt: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> bool:
        """End an open job: settled at `charged` if it succeeded, and else refunded whole. False if it had ended."""
        if charged and state != SUCCEEDED:
            raise ValueError("only a job that succeeded is paid for")
        c = self.jobs.c
        with self._transaction() as run:
            done = run.execute(
                sql.update(self.jobs)
                .where(c.id == job.id, c.state.in_(OPEN))
                .values(
                    state=state,
                    ended=now,
                    charged=charged,
                    pictures=pictures,
                    receipt=None if receipt is None else json.dumps(receipt),
                    error=None if error is None else json.dumps(error),
                )
            )
            if done.rowcount != 1:
                return False
            kind = "settle" if state == SUCCEEDED else "refund"
            self._enter(
                run, job, kind, charged if state == SUCCEEDED else job.reserved, now, pictures, seconds
            )
            return True

    def _enter(
        self,
        run: sql.Connection,
        job: Record,
        kind: str,
        micros: int,
        now: float,
        pictures: int = 0,
        seconds: float = 0.0,
    ) -> None:
        row = {
            "tenant": job.tenant,
            "job": job.id,
            "closes": kind != "reserve",
            "kind": kind,
            "micros": micros,
        }
        run.execute(
            sql.insert(self.entries).values(
                **row, pictures=pictures, seconds=seconds, made=now, day=day_of(now)
            )
        )

    # --- what is there --------------------------------------------------------------------------------------------

    def job(self, tenant: str, job: str) -> Record | None:
        """A tenant's job; None if there is none of this id, or it is another's."""
        return self._first(sql.select(self.jobs).where(self.jobs.c.id == job, self.jobs.c.tenant == tenant))

    def jobs_of(
        self, tenant: str, limit: int, before: float | None = None, after: Record | None = None
    ) -> list[Record]:
        """A tenant's latest jobs, the newest first; before: only those made before; after: only those that come after
        this one in the list, of jobs made at once, too.
        """
        return self._all(_latest(self.jobs, tenant, limit, before, after))

    def open_jobs(self) -> list[Record]:
        """All that have not ended, the oldest first."""
        c = self.jobs.c
        return self._all(sql.select(self.jobs).where(c.state.in_(OPEN)).order_by(c.made, c.id))

    def same(self, tenant: str, digest: str, since: float) -> Record | None:
        """The tenant's latest job made since then of which the same was sent: an open one, or one that succeeded and
        whose client was not there to be answered."""
        c = self.jobs.c
        waits = sql.and_(c.state == SUCCEEDED, c.id.not_in(sql.select(self.answers.c.job)))
        query = sql.select(self.jobs).where(
            c.tenant == tenant, c.digest == digest, c.made >= since, sql.or_(c.state.in_(OPEN), waits)
        )
        return self._first(query.order_by(c.made.desc()).limit(1))

    def answered(self, job: str) -> None:
        """A client was given what the job drew."""
        with contextlib.suppress(IntegrityError), self._transaction() as run:  # or more than one
            run.execute(sql.insert(self.answers).values(job=job))

    def drop_answers(self, before: float) -> None:
        """Forget which of the jobs made before then were answered."""
        old = sql.select(self.jobs.c.id).where(self.jobs.c.made < before)
        with self._transaction() as run:
            run.execute(sql.delete(self.answers).where(self.answers.c.job.in_(old)))

    def keyed(self, tenant: str, idempotency: str) -> Record | None:
        """The tenant's job of this idempotency key."""
        with self._transaction() as run:
            return self._keyed(run, tenant, idempotency)

    def committed(self, tenant: str, now: float) -> int:
        """Millionths that a tenant has spent in this month or has reserved."""
        with self._transaction() as run:
            return self._committed(run, tenant, month_of(now))

    def usage(self, first: str, last: str, tenant: str | None = None) -> list[dict[str, Any]]:
        """By tenant and day from `first` to `last` (2026-01-31, both included): jobs, pictures, seconds, micros."""
        c = self.entries.c
        query = (
            sql.select(
                c.tenant,
                c.day,
                sql.func.count().label("jobs"),
                sql.func.sum(c.pictures).label("pictures"),
                sql.func.sum(c.seconds).label("seconds"),
                sql.func.sum(c.micros).label("micros"),
            )
            .where(c.kind == "settle", c.day >= first, c.day <= last)
            .group_by(c.tenant, c.day)
            .order_by(c.day, c.tenant)
        )
        if tenant is not None:
            query = query.where(c.tenant == tenant)
        with self._transaction() as run:
            rows = run.execute(query).mappings().all()
        return [
            {
                "tenant": row["tenant"],
                "day": row["day"],
                "jobs": int(row["jobs"]),
                "pictures": int(row["pictures"]),
                "seconds": round(float(row["seconds"]), 3),
                "micros": int(row["micros"]),
            }
            for row in rows
        ]

    # --- pictures -------------------------------------------------------------------------------------------------

    def add_upload(self, upload: Upload, most: int | None = None) -> bool:
        """Write an upload down; False if the tenant would then have more than `most` bytes of them."""
        with self._transaction() as run:
            if most is not None and self._kept(run, upload.tenant) + upload.bytes > most:
                return False
            run.execute(sql.insert(self.uploads).values(**vars(upload)))
            return True

    def kept(self, tenant: str) -> int:
        """Bytes of a tenant's files."""
        with self._transaction() as run:
            return self._kept(run, tenant)

    def upload(self, tenant: str, upload: str) -> Upload | None:
        """A tenant's picture; None if there is none of this id, or it is another's."""
        c = self.uploads.c
        with self._transaction() as run:
            row = (
                run.execute(sql.select(self.uploads).where(c.id == upload, c.tenant == tenant))
                .mappings()
                .first()
            )
        return None if row is None else Upload(**row)

    def uploads_of(
        self, tenant: str, limit: int, before: float | None = None, after: Upload | None = None
    ) -> list[Upload]:
        """A tenant's latest files, as `jobs_of`."""
        with self._transaction() as run:
            rows = run.execute(_latest(self.uploads, tenant, limit, before, after)).mappings().all()
        return [Upload(**row) for row in rows]

    def drop_upload(self, upload: str) -> None:
        with self._transaction() as run:
            run.execute(sql.delete(self.uploads).where(self.uploads.c.id == upload))

    def old_uploads(self, before: float) -> list[str]:
        """Files sent before then."""
        query = sql.select(self.uploads.c.id).where(self.uploads.c.made < before)
        with self._transaction() as run:
            return list(run.execute(query).scalars())

    # --- inside ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        try:
            with self.engine.begin() as run:
                yield run
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).split("\n")[0][:200]
            raise LedgerError(f"the ledger cannot be used now: {cause}") from None

    def _first(self, query: sql.Select[Any]) -> Record | None:
        with self._transaction() as run:
            row = run.execute(query).mappings().first()
        return None if row is None else _record(row)

    def _all(self, query: sql.Select[Any]) -> list[Record]:
        with self._transaction() as run:
            return [_record(row) for row in run.execute(query).mappings().all()]

    def _keyed(self, run: sql.Connection, tenant: str, idempotency: str) -> Record | None:
        c = self.jobs.c
        row = (
            run.execute(sql.select(self.jobs).where(c.tenant == tenant, c.idempotency == idempotency))
            .mappings()
            .first()
        )
        return None if row is None else _record(row)

    def _kept(self, run: sql.Connection, tenant: str) -> int:
        c = self.uploads.c
        return int(run.execute(sql.select(sql.func.sum(c.bytes)).where(c.tenant == tenant)).scalar() or 0)

    def _committed(self, run: sql.Connection, tenant: str, month: str) -> int:
        e, j = self.entries.c, self.jobs.c
        spent = sql.select(sql.func.sum(e.micros)).where(
            e.tenant == tenant, e.kind == "settle", e.day >= f"{month}-01"
        )
        held = sql.select(sql.func.sum(j.reserved)).where(j.tenant == tenant, j.state.in_(OPEN))
        return int(run.execute(spent).scalar() or 0) + int(run.execute(held).scalar() or 0)


def _latest(
    table: sql.Table, tenant: str, limit: int, before: float | None, after: Record | Upload | None
) -> sql.Select[Any]:
    """A tenant's rows, the newest first; see `Ledger.jobs_of`."""
    c = table.c
    query = sql.select(table).where(c.tenant == tenant).order_by(c.made.desc(), c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(c.made < before)
    if after is not None:
        same = sql.and_(c.made == after.made, c.id < after.id)
        query = query.where(sql.or_(c.made < after.made, same))
    return query


def open_existing(url: str) -> Ledger:
    """A ledger that is there. `InputError` if there is no such file."""
    place = url.removeprefix("sqlite:///")
    if place != url and not Path(place).is_file():
        raise InputError(f"there is no ledger {place!r}; give the server's folder by --data", argument="data")
    return Ledger(url)


def day_of(when: float) -> str:
    """The day (UTC) of a time, as 2026-01-31."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d")


def check_days(first: str, last: str) -> None:
    """`InputError` unless both are days of the calendar, as 2026-01-31, and the last is not before the first."""
    for name, day in (("since", first), ("until", last)):
        try:
            sound = re.fullmatch(r"\d{4}-\d\d-\d\d", day, re.ASCII) and date.fromisoformat(day)
        except ValueError:
            sound = None
        if not sound:
            raise InputError(
                f"{name} must be a day such as 2026-01-31, not {checks.shown(day)}", argument=name
            )
    if last < first:
        raise InputError(f"until {last} is before since {first}", argument="until")


def month_of(when: float) -> str:
    return day_of(when)[:7]


def _row(job: Record) -> dict[str, Any]:
    row = dict(vars(job))
    for name in ("request", "options", "receipt", "error"):
        row[name] = None if row[name] is None else json.dumps(row[name])
    return row


def _record(row: Any) -> Record:
    values = dict(row)
    for name in ("request", "options", "receipt", "error"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return Record(**values)


def _as_sqlite_should(engine: sql.Engine) -> None:
    """WAL, commits that reach the disk, locks waited for, and transactions that begin by taking the write lock."""

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions late, and without the lock
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY}"):
            connection.execute(f"PRAGMA {pragma}").close()

    def begun(connection: sql.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sql.event.listen(engine, "connect", connected)
    sql.event.listen(engine, "begin", begun)


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('//')[0]}//…@{tail}" if at else url
