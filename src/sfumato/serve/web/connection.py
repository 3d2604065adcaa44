"""A connection of HTTP/1.1 that nobody can hold by sending nothing, or a little now and then.

uvicorn ends a connection that is silent between two requests, and `guard.py` a body that is too slow. Here is what both
leave open: the first request that never comes, a head that never ends, and the rest of a body that nobody waits for.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sfumato.serve.refusals import Refused
from sfumato.serve.web.guard import error_json


class Connection(H11Protocol):
    """One connection. `HEAD`: seconds that the head of a request may take, from its beginning or the connection's."""

    HEAD = 20.0

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self._until: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._rest()  # a request begins, and its time with it
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    @property
    def _owes(self) -> bool:
        """Whether the client is to say something, and nobody else here looks how long that takes."""
        ours, theirs = self.conn.our_state, self.conn.their_state
        return theirs is h11.IDLE or (ours is h11.DONE and theirs is h11.SEND_BODY)

    def _watch(self) -> None:
        if not self._owes or self.transport.is_closing():
            self._rest()
        elif self._until is None:
            self._until = self.loop.call_later(self.HEAD, self._over)

    def _rest(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None

    def _over(self) -> None:
        self._until = None
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            error = Refused(408, "too_slow", f"the head of a request took longer than {self.HEAD:g} s")
            body = json.dumps(error_json(error)).encode()
            head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
