"""The networks of a checkpoint, opened from its files when they are needed, and what stays of them in memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sfumato.adapters.fold import Folded, Touched
from sfumato.checkpoint.rules import View
from sfumato.memory import check_offload
from sfumato.runtime import give_back
from sfumato.storage import tensors_hash

_HASHES: dict[tuple[Any, ...], str] = {}  # of parts that this process has read


class Networks:
    """Name to network, each opened when it is first asked for. Threads may share it.

    offload, in diffusers' words: "none" keeps all of them; "model" keeps the one that was asked for last, so that the
    text encoders are gone while the U-Net works, and the U-Net while the autoencoder does; "sequential" does the same,
    and the U-Net's layers are read from the file at every call. A network that somebody still works with lives until
    the work is done, and one that is gone is opened again when it is asked for: what is kept changes no number.

    renewers: how a network in memory takes over tensors of its parts that have changed, and whether it can.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Any]],
        offload: str = "none",
        renewers: Mapping[str, Callable[[Any, Touched], bool]] | None = None,
    ):
        check_offload(offload)
        self.openers, self.offload, self.renewers = openers, offload, renewers or {}
        self._held: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        with self._lock:
            if name not in self._held:
                if self.offload != "none" and self._held:
                    self._held.clear()
                    give_back()
                self._held[name] = self.openers[name]()
                give_back()  # opening leaves holes as large as layers
            return self._held[name]

    def held(self) -> tuple[str, ...]:
        """Names of the networks that are kept in memory now."""
        return tuple(self._held)

    def renew(self, touched: Touched) -> None:
        """Bring what is in memory up to date with tensors that have changed; what cannot be is let go.

        A network that fails on the way is let go too: it is opened again, whole, when it is asked for.
        """
        with self._lock:
            for name in list(self._held):
                done = False
                try:
                    done = name in self.renewers and self.renewers[name](self._held[name], touched)
                finally:
                    if not done:
                        del self._held[name]
                        give_back()
            give_back()
        self.open_all()

    def open_all(self) -> None:
        """Open what "none" keeps; of the other levels nothing."""
        if self.offload == "none":
            for name in self.openers:
                self[name]


def part_hash(part: Mapping[str, Tensor]) -> str:
    """SHA-256 of a part's tensors, read once in a process for each state of its files; and of what is added to them."""
    if isinstance(part, Folded):
        own = part_hash(part.base)
        return hashlib.sha256(f"{own} {part.now.key}".encode()).hexdigest() if part.now.key else own
    identity = getattr(part.weights, "identity", None) if isinstance(part, View) else None
    if identity is None:  # not of files
        return tensors_hash(part)
    key = (identity, *part)
    if key not in _HASHES:  # threads that come at once do the same work, and all get its answer
        _HASHES[key] = tensors_hash(part)
    return _HASHES[key]
