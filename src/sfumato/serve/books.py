"""The ledger and the store for the front, which must not wait: one thread does what blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sfumato.serve.job import now
from sfumato.serve.ledger import Ledger
from sfumato.serve.store import Store

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

    async def sweep(self, keep: float) -> None:
        """Remove files older than so many seconds."""
        for name in await self.write(self.ledger.old_uploads, now() - keep):
            await self.write(self.ledger.drop_upload, name)
            await self.work(self.store.drop, name)
        await self.work(self.store.sweep, keep)

    def close(self) -> None:
        self._files.shutdown()
        self._ledger.shutdown()
        self.ledger.close()
