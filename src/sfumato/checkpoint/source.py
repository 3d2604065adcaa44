"""Weights read on demand: names over one or several safetensors files, whose tensors are pages of the files themselves.

A file is mapped into memory in windows of some 64 MiB. A tensor is a view of its window and reads nothing until its
numbers are used; the window goes when the last tensor in it goes. So a network whose weights are kept in the file's
type has them in memory once, and one whose weights are cast holds, beyond the cast ones, a window and not the file.
"""

from __future__ import annotations

import bisect
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from sfumato.checkpoint.header import Header, TensorInfo, header_of, shown
from sfumato.checkpoint.layout import weight_files
from sfumato.errors import CheckpointError
from sfumato.storage import check_hash, file_hash, open_safetensors

WINDOW = 64 * 2**20  # bytes mapped together: enough for a run of small tensors, little beside a network
WINDOWS_PER_FILE = 32  # or twice as many; each costs a file descriptor, of which a process may have but 256
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def open_weights(path: str | os.PathLike[str], sha256: str | None = None) -> Weights:
    """The tensors of one safetensors file; only its header is read, and the whole file if a hash is to be checked.

    `CheckpointError` as `read_header`, and when the file's SHA-256 is not the one given.
    """
    path = Path(path)
    if sha256 is not None:
        check_hash(path, sha256)
    file = _File(path)
    return Weights({name: (file, name) for name in file.header.tensors}, (file,))


def open_folder(
    folder: str | os.PathLike[str],
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Weights:
    """The tensors of one part's folder: `stem[.variant].safetensors`, or the shards that its index lists.

    variant: see `layout.weight_files`. hashes: SHA-256 by name of file, checked where given. `CheckpointError` also
    when shards and index disagree: a tensor in two shards, one that the index does not list, one it lists in vain.
    """
    found = weight_files(folder, stem, variant)
    for path in found.paths:
        if hashes and path.name in hashes:
            check_hash(path, hashes[path.name])
    files = tuple(_File(path) for path in found.paths)
    places: dict[str, tuple[_File, str]] = {}
    for file in files:
        for name in file.header.tensors:
            if name in places:
                raise CheckpointError(
                    f"{file.path} repeats the tensor {shown(name)} of {places[name][0].path.name}"
                )
            places[name] = (file, name)
            if found.index is not None and found.index.get(name) != file.path.name:
                raise CheckpointError(
                    f"{file.path} holds the tensor {shown(name)}, which its index does not place there"
                )
    lost = next((name for name in found.index or () if name not in places), None)
    if lost is not None:
        raise CheckpointError(
            f"{found.folder} lacks the tensor {shown(lost)}, which its index lists; fetch it again"
        )
    return Weights(places, files)


class Weights(Mapping[str, Tensor]):
    """Names to tensors, in the order of their bytes. Nothing of a tensor is read before its numbers are used.

    A tensor may be written to: that changes memory, never the file. Tensors stay valid after `close`, and after the
    file is replaced; not when somebody cuts the file short in place.
    """

    def __init__(self, places: Mapping[str, tuple[_File, str]], files: Sequence[_File]):
        self._places, self._files = places, tuple(files)

    def __getitem__(self, name: str) -> Tensor:
        file, inner = self._places[name]
        return file.tensor(inner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:  # the one of `Mapping` would make the tensor
        return name in self._places

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """(dtype, shape) of a tensor, from the header."""
        file, inner = self._places[name]
        entry = file.header.tensors[inner]
        return DTYPES[entry.dtype], entry.shape

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The tensor, in `dtype` and on `device` where given; else the mapped one itself."""
        return self[name].to(device=device, dtype=dtype)

    def under(self, prefix: str) -> Weights:
        """The tensors whose names begin with `prefix`, named without it."""
        inner = {
            name.removeprefix(prefix): place
            for name, place in self._places.items()
            if name.startswith(prefix)
        }
        return Weights(inner, self._files)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self._files)

    @property
    def identity(self) -> tuple[tuple[str, int, int, int], ...]:
        """What tells the files from others and from themselves after a change: place, inode, size, time of change."""
        return tuple(file.identity for file in self._files)

    @property
    def window(self) -> int:
        """Bytes of the largest window: what reading tensors one by one keeps in memory."""
        return max((file.window for file in self._files), default=0)

    @property
    def metadata(self) -> dict[str, str]:
        """What the writer noted; of shards, all of it, where the first one's word stands."""
        return {key: text for file in reversed(self._files) for key, text in file.header.metadata.items()}

    def hashes(self) -> dict[str, str]:
        """Name of file to SHA-256 of its bytes. Reads the files whole."""
        return {file.path.name: file_hash(file.path) for file in self._files}

    def close(self) -> None:
        """Give the files back. Tensors that were read stay; no other can be."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _File:
    """One file: its header, read once, and the windows through which its tensors are seen.

    The file stays open, so that one which takes its place meanwhile is not mistaken for it.
    """

    header: Header

    def __init__(self, path: Path):
        self.path = path
        self._stream: BinaryIO | None = open_safetensors(path)
        try:
            self.header = header_of(self._stream, path)
        except BaseException:
            self._stream.close()
            raise
        status = os.fstat(self._stream.fileno())
        self.identity = (str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns)
        self._finalizer = weakref.finalize(self, self._stream.close)
        self._starts = _window_starts(self.header, max(WINDOW, self.header.size // WINDOWS_PER_FILE))
        self._windows: dict[int, weakref.ref[mmap.mmap]] = {}
        self._latest: mmap.mmap | None = None  # runs of small tensors share a window; it is kept for the next

    @property
    def window(self) -> int:
        stops = [*self._starts[1:], self.header.size]
        return max((stop - start for start, stop in zip(self._starts, stops, strict=True)), default=0)

    def tensor(self, name: str) -> Tensor:
        entry = self.header.tensors[name]
        dtype = DTYPES[entry.dtype]
        if not entry.count:
            return torch.empty(entry.shape, dtype=dtype)
        window, origin = self._window(entry)
        size, offset = entry.stop - entry.start, entry.start - origin
        raw = torch.frombuffer(window, dtype=torch.uint8, count=size, offset=offset)
        if entry.start % dtype.itemsize:  # some writers do not align, and processors want it
            raw = raw.clone()
        return raw.view(dtype).reshape(entry.shape)

    def _window(self, entry: TensorInfo) -> tuple[mmap.mmap, int]:
        """The window that holds a tensor, and where in the file it begins."""
        place = bisect.bisect_right(self._starts, entry.start) - 1
        origin = self._starts[place] // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        window = self._windows[place]() if place in self._windows else None
        if window is None:
            if self._stream is None:
                raise CheckpointError(f"{self.path} was closed before its tensors were read")
            end = self._starts[place + 1] if place + 1 < len(self._starts) else self.header.size
            # a private copy: pages are the file's until somebody writes to them
            try:
                window = mmap.mmap(
                    self._stream.fileno(), end - origin, access=mmap.ACCESS_COPY, offset=origin
                )
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.path} cannot be mapped into memory: {error}") from None
            self._windows[place] = weakref.ref(window)
        self._latest = window
        return window, origin

    def close(self) -> None:
        self._finalizer()
        self._stream = self._latest = None
        self._windows.clear()


def _window_starts(header: Header, size: int) -> list[int]:
    """Where windows of about `size` bytes begin: always at a tensor, so that each lies in one window."""
    starts: list[int] = []
    for entry in header.tensors.values():
        if entry.start == entry.stop:
            continue
        if not starts or entry.stop - starts[-1] > size:
            starts.append(entry.start)
    return starts
