"""LoRAs that clients sent, open in a model while requests need them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

from sfumato.adapters.fold import Adapters
from sfumato.errors import CheckpointError, InputError

IDLE = 4  # that stay open for the next request, of a model
ADVICE = "; take the rest with --lora-partial"  # to who sits at the command line


class Sent:
    """Those of one model, called by their ids. Threads may share it."""

    def __init__(self, adapters: Adapters | None):
        self._adapters = adapters
        self._users: dict[str, int] = {}  # those that are open, the latest used last
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def opened(self, files: Mapping[str, str]) -> Iterator[None]:
        """While inside, the model knows these. `InputError` for one that does not fit it, or is not there."""
        if (
            self._adapters is None or not files
        ):  # that a model takes none is said by who completes the request
            yield
            return
        with self._turn:
            for name, path in files.items():
                if name not in self._users:
                    self._open(name, path)
                    self._users[name] = 0
            for name in files:
                self._users[name] = self._users.pop(name) + 1
        try:
            yield
        finally:
            with self._turn:
                for name in files:
                    self._users[name] -= 1
                idle = [name for name, users in self._users.items() if not users]
                for name in idle[:-IDLE]:
                    del self._users[name]
                    self._adapters.close(name)

    def _open(self, name: str, path: str) -> None:
        assert self._adapters is not None
        try:
            self._adapters.open(path, name)
        except CheckpointError as error:
            raise InputError(str(error).replace(path, name).removesuffix(ADVICE), argument="loras") from None
