"""The ledger and the store for the front, which must not wait: one thread does what blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sfumato.serve.job import now
from sfumato.serve.ledger import Ledger, Upload
from sfumato.serve.refusals import Refused
from sfumato.serve.store import Store

MOST_KEPT = 2 * 2**30  # bytes of uploads that a tenant may have
RETRY_WINDOW = 600.0  # seconds in which a client that tries again is joined onto its job
T = TypeVar("T")


class Books:
    """What must survive. One thread for the ledger, in whose order transactions happen, and two for files."""

    def __init__(self, ledger: Ledger, store: Store):
        self.ledger, self.store = ledger, store
        self._ledger = ThreadPoolExecutor(1, "ledger")
        self._files = ThreadPoolExecutor(2, "files")

    async def write(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """A method of the ledger, read or write."""
        return await asyncio.get_running_loop().run_in_executor(self._ledger, lambda: call(*args, **kwargs))

    async def work(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Anything with files, or with pictures, that takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._files, lambda: call(*args, **kwargs))

    async def keep(self, upload: Upload, data: bytes, *, alone: bool = False) -> None:
        """Keep a tenant's file; alone: for the one job that it came with, as if it had not been sent, neither listed
        nor counted. `Refused` where there is no room."""
        try:
            await self.work(self.store.put, upload.id, data)
        except OSError:
            raise Refused(503, "storage_full", "the file cannot be kept now", retry_after=60) from None
        if not alone and not await self.write(self.ledger.add_upload, upload, MOST_KEPT):
            await self.work(self.store.drop, upload.id)
            raise Refused(
                413,
                "storage_quota",
                f"a key may keep {MOST_KEPT:,} bytes of files; GET /v1/files lists them, and DELETE /v1/files/ID "
                "forgets one",
            )

    async def drop(self, *names: str) -> None:
        """Forget files; they are gone from the disk even where the ledger fails."""
        for name in names:
            await self.work(self.store.drop, name)
        for name in names:
            await self.write(self.ledger.drop_upload, name)

    async def sweep(self, keep: float) -> None:
        """Remove files older than so many seconds, and what only those who try again need."""
        await self.write(self.ledger.drop_answers, now() - RETRY_WINDOW)
        await self.drop(*await self.write(self.ledger.old_uploads, now() - keep))
        await self.work(self.store.sweep, keep)

    def close(self) -> None:
        self._files.shutdown()
        self._ledger.shutdown()
        self.ledger.close()
