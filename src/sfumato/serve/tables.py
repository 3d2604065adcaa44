"""The columns of the ledger. Times are seconds since 1970, amounts are whole millionths of the currency."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

VERSION = "1"  # of these columns; a ledger of another is refused


def tables() -> tuple[MetaData, dict[str, Table]]:
    """What the ledger is made of, and its tables by name.

    jobs        one row each: what was asked, how far it is, what was reserved and charged
    entries     a reservation opens a job and one settlement or refund closes it; the constraint on (job, closes) is
                what no job can be billed twice by
    uploads     pictures, clips and LoRAs that tenants sent
    answers     young jobs whose client was there to be given what was drawn
    about       version and currency
    """
    meta = MetaData()
    jobs = Table(
        "jobs",
        meta,
        Column("id", String(64), primary_key=True),
        Column("tenant", String(64), nullable=False),
        Column("model", Text, nullable=False),
        Column("state", String(16), nullable=False),
        Column("request", Text, nullable=False),  # JSON, as it was asked
        Column("options", Text, nullable=False),  # JSON: kind, format, looks, and what was expected
        Column("digest", String(64), nullable=False),  # of what was sent
        Column("idempotency", String(255)),
        Column("made", Float(53), nullable=False),
        Column("deadline", Float(53), nullable=False),
        Column("started", Float(53)),
        Column("ended", Float(53)),
        Column("tries", Integer, nullable=False),
        Column("reserved", BigInteger, nullable=False),
        Column("charged", BigInteger, nullable=False),
        Column("pictures", Integer, nullable=False),
        Column("receipt", Text),  # JSON, of a job that is done
        Column("error", Text),  # JSON, of one that is not
        UniqueConstraint("tenant", "idempotency"),
        Index("jobs_of_tenant", "tenant", "made"),
        Index("jobs_by_state", "state"),
    )
    entries = Table(
        "entries",
        meta,
        Column("number", Integer, primary_key=True, autoincrement=True),
        Column("tenant", String(64), nullable=False),
        Column("job", String(64), nullable=False),
        Column("closes", Boolean, nullable=False),
        Column("kind", String(16), nullable=False),  # reserve, settle or refund
        Column("micros", BigInteger, nullable=False),
        Column("pictures", Integer, nullable=False),
        Column("seconds", Float(53), nullable=False),
        Column("made", Float(53), nullable=False),
        Column("day", String(10), nullable=False),  # 2026-01-31, UTC
        UniqueConstraint("job", "closes"),
        Index("entries_of_tenant", "tenant", "day"),
    )
    uploads = Table(
        "uploads",
        meta,
        Column("id", String(64), primary_key=True),
        Column("tenant", String(64), nullable=False),
        Column("format", String(8), nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("width", Integer, nullable=False),
        Column("height", Integer, nullable=False),
        Column("made", Float(53), nullable=False),
        Index("uploads_of_tenant", "tenant", "made"),
    )
    answers = Table("answers", meta, Column("job", String(64), primary_key=True))
    about = Table(
        "about", meta, Column("name", String(32), primary_key=True), Column("value", Text, nullable=False)
    )
    found = (jobs, entries, uploads, answers, about)
    return meta, {table.name: table for table in found}
