"""The frames of what was drawn: pictures in memory or, of a long film, on the disk, each read when it is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any, overload

from PIL import Image

from sfumato.errors import SfumatoError

IN_MEMORY = 128 << 20  # bytes of pixels, three each: more go to the disk


def in_memory(frames: int, size: tuple[int, int]) -> bool:
    """Whether so many frames, (width, height) in pixels, are kept as pictures."""
    return 3 * frames * size[0] * size[1] <= IN_MEMORY


class Frames(Sequence[Image.Image]):
    """Pictures of one size, as RGB in a temporary file that goes when this object goes.

    Each is made anew when it is asked for, so what is painted on one is not kept. Threads may share it. Raises
    `SfumatoError` where the disk is full.
    """

    def __init__(self, frames: Iterable[Image.Image]):
        self._lock, self._size, self._count = Lock(), (0, 0), 0
        try:
            self._file = tempfile.TemporaryFile(prefix="sfumato-")  # noqa: SIM115 — goes with this object
            for frame in frames:
                self._size = frame.size
                self._file.write(frame.convert("RGB").tobytes())
                self._count += 1
            self._file.flush()
        except OSError as error:
            raise SfumatoError(
                f"the frames of a long film could not be put down in {tempfile.gettempdir()}: "
                f"{error.strerror or error}; TMPDIR names another folder"
            ) from error

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
        count = 3 * self._size[0] * self._size[1]
        with self._lock:
            self._file.seek(place * count)
            data = self._file.read(count)
        return Image.frombytes("RGB", self._size, data)
