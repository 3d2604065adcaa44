"""A job that has not ended, as the front has it in memory: who waits for it, and how far it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sfumato.serve.asked import CLIP, PICTURE, loras_of
from sfumato.serve.ledger import QUEUED, Record

BACKLOG = 256  # events that a listener may be behind before the oldest are dropped


@dataclass(frozen=True)
class Event:
    """What happened to a job. kind: state, progress, preview; data: plain JSON; picture: of a preview."""

    kind: str
    data: dict[str, Any]
    picture: bytes | None = None


@dataclass(eq=False)
class Live:
    """A job between acceptance and its end.

    record: as the ledger has it. keep: it goes on when nobody waits for it any more; else for `grace` seconds. alone:
    it was at work when a worker was lost, and is drawn without others. losses: how many were lost while they drew
    nothing else.
    """

    record: Record
    keep: bool = True
    grace: float = 0.0
    alone: bool = False
    losses: int = 0
    done: int = 0  # steps
    look: tuple[int, bytes] | None = None
    device: Any = None
    ending: str | None = None  # why it was told to stop
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    holders: int = 0
    visits: int = 0  # of holders, those that are gone among them
    _listeners: set[asyncio.Queue[Event]] = field(default_factory=set)

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def kind(self) -> str:
        return kind_of(self.record)

    @property
    def files(self) -> list[str]:
        """The pictures and clips that the request names."""
        options = self.record.options
        return list(options["files"] if "files" in options else options["pictures"])

    @property
    def needs(self) -> list[str]:
        """All uploads that must be there until it has ended."""
        return [*self.files, *loras_of(self.record.request)]

    @property
    def forget(self) -> list[str]:
        """Of these, what is the job's alone, and goes with it."""
        return list(self.record.options.get("forget", ()))

    @property
    def steps(self) -> int:
        """Steps until all is drawn."""
        return int(self.record.options["sampler_steps"])

    @property
    def expected(self) -> dict[str, Any]:
        return self.record.options["expected"]

    @property
    def tune(self) -> Any:
        """What drawings at once on a device must share: the model, and what is folded into it."""
        return self.record.model, self.record.options["tune"]

    @property
    def progress(self) -> float:
        return min(1.0, self.done / self.steps) if self.steps else 0.0

    @property
    def seconds_left(self) -> float:
        """Of the device, as expected."""
        return float(self.expected["seconds"]) * (1 - self.progress)

    def publish(self, kind: str, data: dict[str, Any], picture: bytes | None = None) -> None:
        """Tell all who listen. Who is far behind loses the oldest."""
        for listener in self._listeners:
            if listener.full():
                listener.get_nowait()
            listener.put_nowait(Event(kind, data, picture))

    @contextmanager
    def listening(self) -> Iterator[asyncio.Queue[Event]]:
        """Events from now on."""
        listener: asyncio.Queue[Event] = asyncio.Queue(BACKLOG)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)


def fairest(queue: Sequence[Live], running: Sequence[Live], served: Mapping[str, int]) -> Live | None:
    """Whose turn it is: the oldest job of the tenants with the fewest running, and of these of the one that has waited
    longest for a turn. served: the number of a tenant's last turn.
    """
    counts: dict[str, int] = {}
    for live in running:
        counts[live.record.tenant] = counts.get(live.record.tenant, 0) + 1

    def turn(live: Live) -> tuple[int, int, float, str]:
        tenant = live.record.tenant
        return counts.get(tenant, 0), served.get(tenant, 0), live.record.made, live.id

    return min(queue, key=turn, default=None)


def next_for(turn: Live | None, here: Sequence[Live], batch: int, room: int) -> Live | None:
    """The job whose turn it is, if it may begin now on a device where `here` are drawn; else None.

    What is drawn at once has one tune, at most `batch` pictures (or is one job), and fits into `room` bytes. Nobody
    overtakes the one whose turn it is.
    """
    if turn is None or not here:
        return turn
    if turn.alone or any(live.alone for live in here) or turn.tune != here[0].tune:
        return None
    at_once = [*here, turn]
    if sum(min(live.expected["pictures"], batch) for live in at_once) > batch:
        return None
    return turn if sum(live.expected["memory"] for live in at_once) <= room else None


def kind_of(record: Record) -> str:
    """What a job draws."""
    return str(record.options.get("kind", PICTURE))


def job_json(record: Record, live: Live | None, currency: str, position: int | None = None) -> dict[str, Any]:
    """A job as the API tells it."""
    options, kind = record.options, kind_of(record)
    home, outputs = (
        (f"/v1/videos/{record.id}", "clips") if kind == CLIP else (f"/v1/jobs/{record.id}", "pictures")
    )
    made = {
        name: [f"{home}/{name}/{number}" for number in range(record.pictures)] for name in (outputs, "thumbs")
    }
    answer: dict[str, Any] = {
        "id": record.id,
        "object": "video" if kind == CLIP else "job",
        "state": record.state,
        "model": record.model,
        "created": record.made,
        "started": record.started,
        "ended": record.ended,
        "deadline": record.deadline,
        "request": record.request,
        "format": options["format"],
        "expected": options["expected"],
        "price": {"currency": currency, "reserved_micros": record.reserved, "charged_micros": record.charged},
        "pictures": made.get("pictures", []),
        "clips": made.get("clips", []),
        "thumbs": made["thumbs"],
        "notes": options.get("notes", []),
        "error": record.error,
    }
    if live is not None:
        answer["progress"] = round(live.progress, 4)
        if record.state == QUEUED:
            answer["position"] = position
    return answer


def now() -> float:
    """Seconds since 1970."""
    return time.time()


def error_of(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as the ledger keeps it and the API tells it."""
    return {"code": code, "message": message, "param": param}


def why(reason: str | None) -> str:
    """Why a job was told to stop, in words."""
    return {
        "client_gone": "the client was gone before the job was done",
        "deadline": "the job was not done before its deadline",
    }.get(reason or "", "the job was cancelled")
