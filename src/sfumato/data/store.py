"""Fixed-size rows of bytes on disk, filled in chunks: what is expensive to make is made once.

A store is a folder: one flat `NAME.u8` per field, and `store.json`, which says what the rows are made from
and which chunks are whole. A chunk is recorded only after its bytes are on the disk, so a kill costs the
chunk in the making.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sfumato.errors import CheckpointError, SfumatoError, StaleCacheError
from sfumato.storage import read_json, write_json

FORMAT = "sfumato rows 1"
INDEX = "store.json"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold a folder against other writers; a second process waits. The lock ends with the process that
    holds it.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = open(directory / ".lock", "w")  # noqa: SIM115
    with handle:
        _wait_for(handle)
        yield


def _wait_for(handle: IO[str]) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    import msvcrt

    while True:
        try:
            return msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:  # another process holds it
            time.sleep(0.1)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into a `SfumatoError` that says what is safe."""
    try:
        yield
    except OSError as error:
        raise SfumatoError(
            f"{directory} cannot be written: {error.strerror or error}; "
            "what it held before is intact, and the same command continues"
        ) from error


def address(identity: Mapping[str, Any]) -> str:
    """16 hex digits that stand for what a store is made from."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class RowStore:
    """`count` rows of each field, uint8. `fields`: name → shape of one row. `identity`: JSON of what the
    rows depend on.

    Opening a folder made for another identity is a `StaleCacheError`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        count: int,
        fields: Mapping[str, tuple[int, ...]],
        chunk: int = 256,
    ):
        self.directory, self.count, self.chunk = Path(directory), count, chunk
        self.fields = {name: tuple(shape) for name, shape in fields.items()}
        self._head = {
            "format": FORMAT,
            "identity": dict(identity),
            "count": count,
            "chunk": chunk,
            "fields": {name: list(shape) for name, shape in self.fields.items()},
        }
        if not (self.directory / INDEX).exists():
            with lock(self.directory), writing(self.directory):
                self._create()
        self.refresh()
        self._rows = {
            name: np.memmap(self._path(name), dtype=np.uint8, mode="r", shape=(count, *shape))
            for name, shape in self.fields.items()
        }

    def _create(self) -> None:
        if (self.directory / INDEX).exists():  # by another process, while this one waited for the lock
            return
        for name, shape in self.fields.items():
            with open(self._path(name), "wb") as stream:
                stream.truncate(self.count * int(np.prod(shape)))
        write_json(self.directory / INDEX, {**self._head, "done": []})

    @property
    def chunks(self) -> int:
        return -(-self.count // self.chunk)

    def span(self, chunk: int) -> tuple[int, int]:
        """First row of a chunk, and the first after it."""
        return chunk * self.chunk, min((chunk + 1) * self.chunk, self.count)

    def missing(self) -> list[int]:
        """Chunks that are not whole yet, ascending."""
        return [c for c in range(self.chunks) if c not in self._done]

    def refresh(self) -> None:
        """Read again which chunks are whole: another process may have added some."""
        try:
            index = read_json(self.directory / INDEX)
        except CheckpointError as error:
            raise StaleCacheError(f"{error}; remove {self.directory} and make it again") from None
        done = index.pop("done", [])
        if index != json.loads(json.dumps(self._head)):
            raise StaleCacheError(
                f"{self.directory} was made from something else; remove it or use another folder"
            )
        for name, shape in self.fields.items():
            size = self.count * int(np.prod(shape))
            if not self._path(name).is_file() or self._path(name).stat().st_size != size:
                raise StaleCacheError(
                    f"{self._path(name)} is missing or not of {size:,} bytes; remove {self.directory}"
                )
        self._done = set(done)

    def put(self, chunk: int, rows: Mapping[str, np.ndarray]) -> None:
        """Write the rows of one chunk through to the disk. It counts only once `record` has been called."""
        start, stop = self.span(chunk)
        with writing(self.directory):
            for name, shape in self.fields.items():
                array = np.ascontiguousarray(rows[name])
                if array.dtype != np.uint8 or array.shape != (stop - start, *shape):
                    raise ValueError(
                        f"{name} must be uint8 {(stop - start, *shape)}, not {array.dtype} {array.shape}"
                    )
                with open(self._path(name), "rb+") as stream:
                    stream.seek(start * int(np.prod(shape)))
                    stream.write(array.data)
                    stream.flush()
                    os.fsync(stream.fileno())

    def record(self, chunk: int) -> None:
        """Count a chunk as whole. Only the process that holds `lock(directory)` may call it."""
        with writing(self.directory):
            write_json(self.directory / INDEX, {**self._head, "done": sorted(self._done | {chunk})})
        self._done.add(chunk)

    def holds(self, indices: Sequence[int]) -> bool:
        """Whether all these rows are there."""
        return all(int(i) // self.chunk in self._done for i in indices)

    def rows(self, name: str, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, …): a copy of the given rows, which must be there."""
        return np.asarray(self._rows[name][np.asarray(indices, dtype=np.int64)])

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.u8"
