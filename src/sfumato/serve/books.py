"""The ledger and the store for the front, which must not wait: one thread does what blocks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from sfumato.serve.job import now
from sfumato.serve.ledger import Ledger, Upload
from sfumato.serve.refusals import Refused
from sfumato.serve.store import Store, new_id

MOST_KEPT = 2 * 2**30  # bytes of uploads that a tenant may have
RETRY_WINDOW = 600.0  # seconds in which a client that tries again is joined onto its job
T = TypeVar("T")


def no_room() -> Refused:
    return Refused(
        413,
        "storage_quota",
        f"a key may keep {MOST_KEPT:,} bytes of files; GET /v1/files lists them, and DELETE /v1/files/ID forgets one",
    )


@contextlib.contextmanager
def room_on_disk() -> Iterator[None]:
    """Where a disk's refusal is the client's to hear."""
    try:
        yield
    except OSError:
        raise Refused(503, "storage_full", "the file cannot be kept now", retry_after=60) from None


class Books:
    """What must survive. One thread for the ledger, in whose order transactions happen, two for files, and one to look
    at what is large."""

    def __init__(self, ledger: Ledger, store: Store):
        self.ledger, self.store = ledger, store
        self._ledger = ThreadPoolExecutor(1, "ledger")
        self._files = ThreadPoolExecutor(2, "files")
        self._looks = ThreadPoolExecutor(1, "looks")
        self._arriving: dict[str, int] = {}  # by tenant, bytes of files that are not whole yet

    async def write(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """A method of the ledger, read or write."""
        return await asyncio.get_running_loop().run_in_executor(self._ledger, lambda: call(*args, **kwargs))

    async def work(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Anything with files, or with pictures, that takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._files, lambda: call(*args, **kwargs))

    async def keep(self, upload: Upload, data: bytes, *, alone: bool = False) -> None:
        """Keep a tenant's file; alone: for the one job that it came with, as if it had not been sent, neither listed
        nor counted. `Refused` where there is no room."""
        await asyncio.shield(self._keep(upload, data, alone))

    async def _keep(self, upload: Upload, data: bytes, alone: bool) -> None:
        with room_on_disk():
            await self.work(self.store.put, upload.id, data)
        if not alone:
            await self._enter(upload)

    async def room(self, tenant: str) -> int:
        """Bytes that a tenant may still send."""
        return MOST_KEPT - await self.write(self.ledger.kept, tenant) - self._arriving.get(tenant, 0)

    async def receive(
        self, tenant: str, format: str, chunks: AsyncIterator[bytes], most: int, look: Callable[[Path], None]
    ) -> Upload:
        """Keep a file that is written down as it comes and never in memory whole. most: bytes that it may have. look:
        raises what is wrong with it. `Refused` where there is no room. Of what is not kept nothing stays; what is
        whole is kept, whether or not its client still waits."""
        name, size = new_id("file"), 0
        kept = await self.write(self.ledger.kept, tenant)
        arriving = self.store.arriving(name)
        try:
            with room_on_disk():
                path = await self.work(arriving.__enter__)
                try:
                    with path.open("wb") as stream:
                        async for data in chunks:
                            size += len(data)
                            self._arriving[tenant] = self._arriving.get(tenant, 0) + len(data)
                            if size > most:
                                raise Refused(413, "too_large", f"such a file may have {most:,} bytes")
                            if kept + self._arriving[tenant] > MOST_KEPT:
                                raise no_room()
                            await self.work(stream.write, data)
                    await asyncio.get_running_loop().run_in_executor(self._looks, look, path)
                except BaseException as error:
                    await asyncio.shield(
                        self.work(arriving.__exit__, type(error), error, error.__traceback__)
                    )
                    raise
                upload = Upload(name, tenant, format, size, 0, 0, now())
                await asyncio.shield(self._arrived(arriving, upload))
        finally:
            self._arriving[tenant] = self._arriving.get(tenant, 0) - size
            if not self._arriving[tenant]:
                del self._arriving[tenant]
        return upload

    async def _arrived(self, arriving: AbstractContextManager[Path], upload: Upload) -> None:
        await self.work(arriving.__exit__, None, None, None)
        await self._enter(upload)

    async def _enter(self, upload: Upload) -> None:
        """Write down whose a file is that is on the disk; else it is gone."""
        entered = False
        try:
            entered = await self.write(self.ledger.add_upload, upload, MOST_KEPT)
        finally:
            if not entered:
                await self.drop(upload.id)
        if not entered:
            raise no_room()

    async def drop(self, *names: str) -> None:
        """Forget files; they are gone from the disk even where the ledger fails."""
        for name in names:
            await self.work(self.store.drop, name)
        for name in names:
            await self.write(self.ledger.drop_upload, name)

    async def sweep(self, keep: float, needed: Collection[str] = ()) -> None:
        """Remove files older than so many seconds but those needed, and what only those who try again need."""
        await self.write(self.ledger.drop_answers, now() - RETRY_WINDOW)
        old = await self.write(self.ledger.old_uploads, now() - keep)
        await self.drop(*(name for name in old if name not in needed))
        await self.work(self.store.sweep, keep, needed)

    def close(self) -> None:
        self._looks.shutdown()
        self._files.shutdown()
        self._ledger.shutdown()
        self.ledger.close()
