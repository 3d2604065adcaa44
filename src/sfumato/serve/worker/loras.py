"""LoRAs that clients sent, open in a model while requests need them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sfumato.adapters.fold import Adapters
from sfumato.errors import CheckpointError, InputError

IDLE = 4  # that stay open for the next request, of a model


@dataclass
class _Lora:
    """users: who need it now. turn: to open its file, which may be long."""

    users: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)


class Sent:
    """Those of one model, called by their ids. Threads may share it, and wait for nothing but what they need."""

    def __init__(self, adapters: Adapters | None):
        self._adapters = adapters
        self._known: dict[str, _Lora] = {}  # those that are open or about to be, the latest used last
        self._turn = threading.Lock()  # to count their users

    @contextlib.contextmanager
    def opened(self, files: Mapping[str, str]) -> Iterator[None]:
        """While inside, the model knows these. `InputError` for one that does not fit it, or is not there."""
        adapters = self._adapters
        if adapters is None or not files:  # that a model takes none is said by who completes the request
            yield
            return
        with self._turn:
            wanted = {name: self._known.pop(name, _Lora()) for name in files}
            self._known |= wanted
            for lora in wanted.values():
                lora.users += 1
        try:
            for name, lora in wanted.items():
                with lora.turn:
                    if name not in adapters.opened:
                        _open(adapters, name, files[name])
            yield
        finally:
            with self._turn:
                for lora in wanted.values():
                    lora.users -= 1
                self._trim(adapters)

    def _trim(self, adapters: Adapters) -> None:
        """Forget those that nobody uses, but for a few that are open."""
        idle = [name for name, lora in self._known.items() if not lora.users]
        kept = [name for name in idle if name in adapters.opened][-IDLE:]
        for name in set(idle).difference(kept):
            del self._known[name]
            adapters.close(name)


def _open(adapters: Adapters, name: str, path: str) -> None:
    try:
        adapters.open(path, name)
    except CheckpointError as error:
        raise InputError(str(error).replace(path, name), argument="loras") from None
