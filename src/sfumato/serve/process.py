"""A worker as a process of this machine, at the other end of a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from sfumato.serve import wire


async def connect(start: dict[str, Any]) -> Process:
    """Start a worker and tell it what to be."""
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sfumato.serve.worker",
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_number(sys.stderr) else None,
            env=os.environ,
        )
    finally:
        theirs.close()
    link = Process(process, *await asyncio.open_connection(sock=ours, limit=2**20))
    link.send({"do": "start", **start})
    return link


class Process:
    """A `devices.Link` to a process."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ):
        self._process, self._reader, self._writer = process, reader, writer

    def send(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        if self._writer.is_closing():
            raise wire.Broken("the worker is gone")
        wire.write(self._writer, message, parts)

    async def receive(self) -> wire.Message:
        return await wire.read(self._reader)

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    async def close(self) -> None:
        self._writer.close()
        self.kill()
        await self._process.wait()


def _has_number(stream: Any) -> bool:
    try:
        stream.fileno()
    except (OSError, AttributeError, ValueError):
        return False
    return True
