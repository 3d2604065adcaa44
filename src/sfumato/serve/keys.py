"""Who may come in: a file of keys, of which only hashes are kept.

A key is shown once, when it is made. Its 256 random bits make a plain SHA-256 enough: there is nothing to guess that a
slow hash would protect. The file is written whole or not at all. A running server sees a change at its next request.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, InputError
from sfumato.storage import read_json, write_json

PREFIX = "sfk_"
DRAW, WATCH = "draw", "watch"  # roles: what a key is for
LOCAL = "local"  # the tenant of a server without keys


@dataclass(frozen=True)
class Key:
    """One tenant. digest: SHA-256 of the key, hex. made, revoked: seconds since 1970.

    budget: millionths that it may spend in a calendar month (UTC). rate: jobs that it may submit in a minute. queue:
    jobs that it may have open at once. None is no limit but the server's. role: "draw", or "watch" for metrics alone.
    """

    id: str
    name: str
    digest: str = field(repr=False)
    made: float = 0.0
    revoked: float | None = None
    budget: int | None = None
    rate: int | None = None
    queue: int | None = None
    role: str = DRAW


def local() -> Key:
    """Who everybody is on a server without keys, which listens on this machine alone. It may do all."""
    return Key(LOCAL, LOCAL, "")


def add(path: str | os.PathLike[str], name: str, **limits: Any) -> tuple[str, Key]:
    """Make a key of this name: (what its owner is given, what is kept). `InputError` for a name that is taken."""
    if not (1 <= len(name) <= 80 and name.isprintable()):
        raise InputError("a key's name must be 1 to 80 printable characters", argument="name")
    token = PREFIX + secrets.token_urlsafe(32)
    key = Key(f"key_{secrets.token_hex(8)}", name, _digest(token), made=time.time(), **limits)
    with _changing(Path(path)) as known:
        if any(other.name == name and other.revoked is None for other in known):
            raise InputError(
                f"there is a key {name!r} already; revoke it, or take another name", argument="name"
            )
        known.append(key)
    return token, key


def revoke(path: str | os.PathLike[str], name: str) -> Key:
    """Revoke the key of this name or id; its jobs and bills stay. `InputError` if there is none in use."""
    with _changing(Path(path)) as known:
        for place, key in enumerate(known):
            if name in (key.name, key.id) and key.revoked is None:
                known[place] = replace(key, revoked=time.time())
                return known[place]
    raise InputError(f"there is no key {name!r} in use", argument="name")


def read(path: str | os.PathLike[str]) -> list[Key]:
    """The keys of a file, strictly. `InputError` for a file that is none."""
    try:
        table = read_json(path)
    except CheckpointError as error:
        raise InputError(f"keys: {error}", argument="keys") from None
    rows = table.get("keys")
    known = {item.name for item in fields(Key)}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() <= known for row in rows):
        raise InputError(f"{path} is no file of keys; `sfumato keys add` makes one", argument="keys")
    try:
        return [Key(**row) for row in rows]
    except TypeError:
        raise InputError(f"{path} holds a key without id, name or digest", argument="keys") from None


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys, to be changed; written when the block ends well. One at a time, whichever process."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        known = read(path) if path.exists() else []
        yield known
        before = os.umask(0o077)
        try:
            write_json(path, {"keys": [asdict(key) for key in known]})
        finally:
            os.umask(before)
    except OSError as error:
        raise InputError(f"keys {str(path)!r} cannot be written: {error.strerror}", argument="keys") from None
    finally:
        os.close(handle)


class KeyRing:
    """The keys of a file that may change while it is looked into."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._known: dict[str, Key] = {}
        self._look()

    def find(self, token: str) -> Key | None:
        """Whose key it is; None for one that was never given out, or is revoked."""
        with contextlib.suppress(
            InputError
        ):  # a file put there by hand that is none: the last good one counts
            self._look()
        key = self._known.get(_digest(token))
        return None if key is None or key.revoked is not None else key

    def _look(self) -> None:
        try:
            state = os.stat(self.path)
        except OSError:
            self._known, self._stamp = {}, None
            if not self.path.parent.exists():
                raise InputError(f"keys {str(self.path)!r} does not exist", argument="keys") from None
            return
        stamp = (state.st_mtime_ns, state.st_ino, state.st_size)
        if stamp != self._stamp:
            self._known = {key.digest: key for key in read(self.path)}
            self._stamp = stamp


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
