"""Messages between a front and its workers: a JSON object and raw bytes, over a socket of two ends.

    4 bytes    length of the JSON, big-endian
    JSON       the message; `parts` holds the lengths of what follows
    parts      bytes, such as pictures

Nothing is ever unpickled, and both ends refuse lengths beyond `MOST_HEAD` and `MOST_PARTS`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

from sfumato.errors import SfumatoError

HEAD = struct.Struct(">I")
MOST_HEAD = 16 * 2**20
MOST_PARTS = 4 * 2**30
Message = tuple[dict[str, Any], list[bytes]]


class Broken(SfumatoError):
    """The other end is gone, or says what it never should."""

    code = "broken"


def packed(message: dict[str, Any], parts: Sequence[bytes] = ()) -> list[bytes]:
    """What goes over the wire, in order."""
    head = json.dumps({**message, "parts": [len(part) for part in parts]}).encode()
    if len(head) > MOST_HEAD:
        raise Broken("the message is too long")
    return [HEAD.pack(len(head)) + head, *parts]


def _opened(head: bytes) -> tuple[dict[str, Any], list[int]]:
    try:
        message = json.loads(head)
        lengths = message.pop("parts")
        if (
            not all(isinstance(length, int) and length >= 0 for length in lengths)
            or sum(lengths) > MOST_PARTS
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Broken("a message is damaged") from None
    return message, lengths


class Line:
    """The worker's end. Any thread may send; one receives."""

    def __init__(self, end: socket.socket):
        self._end = end
        self._stream = end.makefile("rb")
        self._turn = threading.Lock()

    def send(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        with self._turn:
            try:
                for piece in packed(message, parts):
                    self._end.sendall(piece)
            except OSError:
                raise Broken("the front is gone") from None

    def receive(self) -> Message:
        """The next message; `Broken` when the other end is gone."""
        (length,) = HEAD.unpack(self._exactly(HEAD.size))
        if length > MOST_HEAD:
            raise Broken("a message is too long")
        message, lengths = _opened(self._exactly(length))
        return message, [self._exactly(size) for size in lengths]

    def _exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise Broken("the front is gone")
        return data


async def read(stream: asyncio.StreamReader) -> Message:
    """The next message at the front's end; `Broken` when the worker is gone."""
    try:
        (length,) = HEAD.unpack(await stream.readexactly(HEAD.size))
        if length > MOST_HEAD:
            raise Broken("a message is too long")
        message, lengths = _opened(await stream.readexactly(length))
        return message, [await stream.readexactly(size) for size in lengths]
    except (asyncio.IncompleteReadError, OSError):
        raise Broken("the worker is gone") from None


def write(stream: asyncio.StreamWriter, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
    """Send a message from the front's end."""
    for piece in packed(message, parts):
        stream.write(piece)
