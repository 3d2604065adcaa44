"""Where jobs come in: who may submit what, at which price, and whether it is the same as before."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sfumato import checks
from sfumato.serve import process
from sfumato.serve.asked import CLIP, LORAS, PICTURE, files_of, loras_of
from sfumato.serve.books import RETRY_WINDOW, Books
from sfumato.serve.devices import Connect
from sfumato.serve.floor import Floor
from sfumato.serve.job import Live, now
from sfumato.serve.keys import Key
from sfumato.serve.ledger import LedgerError, OverBudget, Record, Upload
from sfumato.serve.money import shown, work_of
from sfumato.serve.rates import Rates
from sfumato.serve.refusals import Refused, bad, file_gone, not_found
from sfumato.serve.settings import Settings
from sfumato.serve.store import LORA, new_id
from sfumato.serve.wire import Broken

CANCELLING = 2.0  # seconds that an answer to a cancellation waits for the job's end
ASKS = 600  # estimates and preflights of a key in a minute
Brought = Mapping[str, tuple[Upload, bytes]]


@dataclass(frozen=True)
class Ask:
    """What a client wants drawn. request: plain JSON with pictures by id. digest: of what was sent. retry: it says that
    it tries again. keep: the job goes on when the client is gone; else so many seconds of `grace`. looks: pictures of
    it forming, of `look_format`. via: the interface that it came by. kind: what is to be drawn, `job.PICTURE` or
    `job.CLIP`. brought: files that came with it, by the ids that stand in the request; they are kept when it is
    accepted. forget: until it has ended, and for this job alone, as its client knows of no files.
    """

    model: str
    request: dict[str, Any]
    digest: str
    format: str = "png"
    looks: int = 0
    look_format: str = "jpeg"
    deadline: float | None = None
    idempotency: str | None = None
    retry: bool = False
    keep: bool = True
    grace: float = 0.0
    via: str = "native"
    kind: str = PICTURE
    brought: Brought = field(default_factory=dict)
    forget: bool = False


class Desk:
    """The front's state. connect: starts workers.

    Raises `Refused` for what is not done, and `LedgerError` where the ledger failed.
    """

    def __init__(self, settings: Settings, books: Books, connect: Connect = process.connect):
        self.settings, self.books, self.prices = settings, books, settings.prices
        self.ledger, self.store = books.ledger, books.store
        self.floor, self.rates = Floor(settings, books, connect), Rates()
        self.metrics = self.floor.metrics
        self.draining = False
        self._coming: dict[str, int] = {}  # by tenant, jobs that are being accepted
        self._arriving: dict[tuple[str, str], asyncio.Task[tuple[Record, Live | None]]] = {}  # tenant, digest

    async def open(self) -> None:
        await self.floor.open()

    async def drain(self, seconds: float) -> bool:
        """Accept nothing more and wait until all that was accepted has ended. False if that takes longer."""
        self.draining = True
        until = time.monotonic() + seconds
        while (self.floor.live or self._coming) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.floor.live

    async def close(self) -> None:
        self.draining = True
        await self.floor.close()

    @property
    def ready(self) -> bool:
        """Whether a job submitted now could be drawn soon."""
        return not self.draining and self.floor.ready

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What is known of the models."""
        return self.floor.devices[0].facts

    # --- submitting -----------------------------------------------------------------------------------------------

    async def submit(self, key: Key, ask: Ask) -> tuple[Record, Live | None]:
        """Accept a job; or find the one that this is once more. Returns it as it is written down, and its life if it
        has not ended."""
        before = await self._before(key, ask)
        if before is not None:
            return before
        self._admit(key)
        self._coming[key.id] = self._coming.get(key.id, 0) + 1
        # a client that goes away now must not leave a job in the ledger that nobody here knows
        task = asyncio.create_task(self._coming_in(key, ask))
        self._arriving[key.id, ask.digest] = task
        task.add_done_callback(lambda task: self._arrived(key.id, ask.digest, task))
        return await asyncio.shield(task)

    def _arrived(self, tenant: str, digest: str, task: asyncio.Task[Any]) -> None:
        if self._arriving.get((tenant, digest)) is task:
            del self._arriving[tenant, digest]

    async def _coming_in(self, key: Key, ask: Ask) -> tuple[Record, Live | None]:
        try:
            return await self._accept(key, ask)
        except Refused as error:
            self.metrics.refused.labels(error.code).inc()
            raise
        finally:
            self._coming[key.id] -= 1
            if not self._coming[key.id]:
                del self._coming[key.id]

    async def _before(self, key: Key, ask: Ask) -> tuple[Record, Live | None] | None:
        """The job of the same idempotency key; or, of one who tries again, that of the same body which is open or was
        never answered."""
        if ask.idempotency is not None:
            found = await self.books.write(self.ledger.keyed, key.id, ask.idempotency)
            return None if found is None else self._same(found, ask)
        if ask.retry:
            if (arriving := self._arriving.get((key.id, ask.digest))) is not None:
                return await asyncio.shield(arriving)
            found = await self.books.write(self.ledger.same, key.id, ask.digest, now() - RETRY_WINDOW)
            live = None if found is None else self.floor.live.get(found.id)
            if found is not None and (live is None or live.ending is None):
                return (found if live is None else live.record), live
        return None

    def _same(self, found: Record, ask: Ask) -> tuple[Record, Live | None]:
        if found.digest != ask.digest:
            raise Refused(
                422,
                "idempotency_mismatch",
                "this idempotency key was used for another body; take a new one for a new job",
                param="Idempotency-Key",
            )
        live = self.floor.live.get(found.id)
        return (found if live is None else live.record), live

    def full(self, key: Key) -> Refused | None:
        """Why nothing can be accepted of a key now, if so: told from memory, whatever it would send."""
        coming = self._coming
        if self.draining:
            return self._no("draining", "the server is stopping; it, or another, is there again soon", 10.0)
        if len(self.floor.queue) + sum(coming.values()) >= self.settings.queue:
            return self._no("queue_full", "the queue is full; come back later", self.floor.patience())
        if key.queue is not None:
            mine = sum(live.record.tenant == key.id for live in self.floor.live.values())
            if mine + coming.get(key.id, 0) >= key.queue:
                message = f"this key may have {key.queue} jobs open at once"
                return self._no("too_many_open", message, self.floor.patience())
        if (seconds := self.rates.look(key.id, key.rate)) > 0:
            return self._no("rate_limited", f"this key may submit {key.rate} jobs in a minute", seconds)
        return None

    def check_asking(self, key: Key) -> None:
        """`Refused` for who asks more often what something would take than anybody at a page does."""
        if (seconds := self.rates.take(f"{key.id} asks", ASKS)) > 0:
            raise self._no(
                "rate_limited", f"a key may ask for {ASKS} estimates and preflights in a minute", seconds
            )

    def _no(self, code: str, message: str, after: float) -> Refused:
        self.metrics.refused.labels(code).inc()
        return Refused(503 if code == "draining" else 429, code, message, retry_after=after)

    def _admit(self, key: Key) -> None:
        """Say no at once where there is no room."""
        if (no := self.full(key)) is not None:
            raise no
        self.rates.take(key.id, key.rate)

    async def _accept(self, key: Key, ask: Ask) -> tuple[Record, Live | None]:
        files, parts = await self.files(key, ask)
        checked = await self.expected(ask, files, parts)
        expected, made = checked["expected"], now()
        seconds = self._deadline(ask)
        for why in self.too_long(ask, expected):
            raise bad(why, "deadline")
        if self.floor.wait() + expected["seconds"] > seconds:
            raise Refused(
                429,
                "too_busy",
                "what waits already takes longer than this job's deadline; come back later",
                retry_after=self.floor.patience(),
            )
        record = Record(
            id=new_id("job"),
            tenant=key.id,
            model=ask.model,
            request=ask.request,
            options={
                "format": ask.format,
                "looks": ask.looks,
                "look_format": ask.look_format,
                "files": files,
                "kind": ask.kind,
                "keep": ask.keep,
                "via": ask.via,
                "forget": list(ask.brought) if ask.forget else [],
                **{name: checked[name] for name in ("expected", "sampler_steps", "tune", "notes")},
            },
            digest=ask.digest,
            made=made,
            deadline=made + seconds,
            reserved=self.price(ask.model, expected),
            idempotency=ask.idempotency,
        )
        try:
            for upload, data in ask.brought.values():
                await self.books.keep(upload, data, alone=ask.forget)
            written = await self.books.write(self.ledger.accept, record, key.budget)
        except Exception as error:
            await self._drop(ask)
            if not isinstance(error, OverBudget):
                raise
            currency = self.prices.currency
            raise Refused(
                402,
                error.code,
                f"this would cost up to {shown(record.reserved, currency)}, and this key has "
                f"{shown(error.left, currency)} left this month",
            ) from None
        if written.id != record.id:
            await self._drop(ask)
            return self._same(written, ask)
        live = Live(record, keep=ask.keep, grace=ask.grace)
        self.floor.add(live)
        self.metrics.accepted.labels(record.model).inc()
        return record, live

    def _deadline(self, ask: Ask) -> float:
        return min(ask.deadline or self.settings.deadline, self.settings.longest)

    def too_long(self, ask: Ask, expected: Mapping[str, Any]) -> list[str]:
        """Why a job could not be done before its deadline; nothing where it could."""
        seconds = self._deadline(ask)
        if expected["seconds"] <= seconds:
            return []
        fewer = "steps, or smaller or fewer pictures"
        if ask.kind == CLIP:
            fewer = "frames or steps, or smaller or fewer clips"
        return [
            f"this would take {expected['seconds']:.0f} s of the device, and its deadline is {seconds:.0f} s; ask for "
            f"fewer {fewer}"
        ]

    async def _drop(self, ask: Ask) -> None:
        """Forget what came with a job that is not accepted."""
        with contextlib.suppress(LedgerError, OSError):  # then it is swept
            await self.books.drop(*ask.brought)

    async def files(self, key: Key, ask: Ask) -> tuple[list[str], list[bytes]]:
        """The pictures and clips that a request names, by id, and their bytes. `Refused` for what is not this key's,
        or stands where it does not belong; LoRAs are looked up, and read by those who draw with them."""
        found: dict[str, bytes] = {}
        for name, place in files_of(ask.request).items():
            if name in ask.brought:
                found[name] = ask.brought[name][1]
                continue
            upload = await self.books.write(self.ledger.upload, key.id, name)
            if upload is None:
                raise file_gone(name, place)
            if (upload.format == LORA) != (place == LORAS):
                what = f"the LoRA {name}" if place == LORAS else f"{place} {name}"
                raise bad(f"{what} is a file of the format {upload.format}", place)
            if place != LORAS:
                found[name] = await self.floor.bytes_of(name, place)
        return list(found), list(found.values())

    async def answered(self, record: Record) -> None:
        """A job's client has what was drawn: who says that he tries again means another one."""
        with contextlib.suppress(LedgerError):
            await self.books.write(self.ledger.answered, record.id)

    async def expected(self, ask: Ask, files: Sequence[str], parts: Sequence[bytes]) -> dict[str, Any]:
        """What a worker says that a request will take, memory planned; `Refused` if it cannot be drawn."""
        return await self._asked("check", ask, files, parts)

    async def preflight(self, ask: Ask, files: Sequence[str], parts: Sequence[bytes]) -> dict[str, Any]:
        """What of a request will not survive the model's autoencoder."""
        return (await self._asked("preflight", ask, files, parts))["preflight"]

    async def _asked(
        self, what: str, ask: Ask, files: Sequence[str], parts: Sequence[bytes]
    ) -> dict[str, Any]:
        """A worker's answer; `Refused` if it says no, or none answers."""
        if ask.model not in {model.name for model in self.settings.models}:
            known = ", ".join(model.name for model in self.settings.models)
            raise Refused(
                404,
                "model_not_found",
                f"there is no model {checks.shown(ask.model)}; there is {known}",
                param="model",
            )
        message = {
            "do": what, "model": ask.model, "kind": ask.kind, "request": ask.request, "files": list(files),
            "format": ask.format, "loras": await self.floor.places_of(loras_of(ask.request)),
        }  # fmt: skip
        for _ in range(2):
            device = await self.floor.some_device()
            with contextlib.suppress(Broken):
                try:
                    return await device.check(message, parts)
                except TimeoutError:
                    raise Refused(503, "busy", "the workers do not answer in time", retry_after=5) from None
        raise Refused(503, "worker_lost", "the worker was lost; try again", retry_after=5)

    def price(self, model: str, expected: dict[str, Any]) -> int:
        """What a job may cost, in millionths."""
        return self.prices.most(model, work_of(expected, expected["seconds"]))

    async def stopped(self, live: Live) -> None:
        """Have a job end as cancelled, and wait a little until it has."""
        self.floor.stop(live, "cancelled")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCELLING):
                await live.ended.wait()

    async def find(self, tenant: str, job: str) -> tuple[Record, Live | None]:
        """A tenant's job. `Refused` if there is none."""
        live = self.floor.live.get(job)
        if live is not None:
            if live.record.tenant != tenant:
                raise not_found("job", job)
            return live.record, live
        record = await self.books.write(self.ledger.job, tenant, job)
        if record is None:
            raise not_found("job", job)
        return record, None
