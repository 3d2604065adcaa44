"""The frames of what was drawn: pictures in memory or, of a long film, on the disk, each read when it is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, overload

from PIL import Image

from sfumato.errors import SfumatoError

IN_MEMORY = 128 << 20  # bytes of pixels, three each: more go to the disk


def on_disk(frames: int, size: tuple[int, int]) -> int:
    """Bytes that so many frames, (width, height) in pixels, have on the disk; 0 where they are kept as pictures."""
    count = 3 * frames * size[0] * size[1]
    return count if count > IN_MEMORY else 0


def in_memory(frames: int, size: tuple[int, int]) -> int:
    """Bytes that they have in memory, four a pixel, as Pillow keeps them; 0 where they go to the disk."""
    return 0 if on_disk(frames, size) else 4 * frames * size[0] * size[1]


class Frames(Sequence[Image.Image]):
    """Pictures of one size, as RGB in a temporary file that goes when this object goes.

    Each is made anew when it is asked for, so what is painted on one is not kept. Threads may share it. Raises
    `SfumatoError` where the disk is full, or does not give back what it was given.
    """

    def __init__(self, frames: Iterable[Image.Image]):
        self._lock, self._size, self._count = Lock(), (0, 0), 0
        with _on_disk("put down"):
            self._file = tempfile.TemporaryFile(prefix="sfumato-", buffering=0)  # noqa: SIM115 — goes with this object
        try:
            for frame in frames:
                self._size = frame.size
                self._put(memoryview(frame.convert("RGB").tobytes()))
                self._count += 1
        except BaseException:
            self._file.close()
            raise

    def _put(self, data: memoryview) -> None:
        with _on_disk("put down"):
            while data:
                data = data[self._file.write(data) :]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...
    def __getitem__(self, index: Any) -> Any:
        places = range(self._count)[index]
        return tuple(map(self._read, places)) if isinstance(index, slice) else self._read(places)

    def _read(self, place: int) -> Image.Image:
        data = bytearray(3 * self._size[0] * self._size[1])
        with self._lock, _on_disk("read"):
            self._file.seek(place * len(data))
            if self._file.readinto(data) != len(data):
                raise OSError("the file is cut short")
        return Image.frombytes("RGB", self._size, bytes(data))


@contextmanager
def _on_disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SfumatoError(
            f"the frames of a long film could not be {what} in {tempfile.gettempdir()}: {error.strerror or error}; "
            "TMPDIR names another folder"
        ) from error
