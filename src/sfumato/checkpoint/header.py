"""What a safetensors file says of itself: names, types, shapes and places of its tensors, from its header alone.

Eight bytes of length, little-endian, that many bytes of JSON, and the tensors' bytes without a gap
(huggingface/safetensors, README, "Format"). The check is ours and strict, so that a file is refused by name before a
byte of a tensor is read. Nothing here needs torch: a file of any size is described in milliseconds.
"""

from __future__ import annotations

import gc
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

from sfumato.errors import CheckpointError
from sfumato.storage import header_length, open_safetensors, shown, strict_json

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
UNUSABLE = "holds NaN or infinite values; the file is unusable"  # of a tensor
TENSOR_LIMIT = 200_000  # a hundred times the largest model; more would only cost memory
RANK_LIMIT = 32
_MARKS_LIMIT = 16 * TENSOR_LIMIT  # of { [ and , in a header: what a parser makes sixty bytes from


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. dtype: as the file writes it (`F16`). Its bytes are those from `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """tensors: in the order of their bytes. metadata: what the writer noted, text to text. size: bytes of the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file; no byte of a tensor is read.

    `CheckpointError`, with the file and what is wrong: it is absent, pickled, or of another kind; the header is longer
    than 100 MB or than the file, is no JSON, or gives a name twice; a tensor's dtype is unknown, its shape disagrees
    with its bytes or exceeds 2^63; tensors overlap or leave gaps; the file is cut short or goes on after them.
    """
    with open_safetensors(path) as stream:
        return header_of(stream, path)


def header_of(stream: BinaryIO, path: str | os.PathLike[str]) -> Header:
    """The same, of a file that is open; `path` names it in errors."""
    try:
        length = header_length(stream, path)
        size = os.fstat(stream.fileno()).st_size
        raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    collecting = gc.isenabled()
    gc.disable()  # of a great many small tables none is garbage, and looking through them takes thrice the time
    try:
        tensors, metadata = _parse(raw, first=8 + length)
        _check_places(tensors, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    finally:
        if collecting:
            gc.enable()
    return Header(tensors, metadata, size)


def _parse(raw: bytes, first: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors in the order of their bytes, and metadata. `first` is where the tensors' bytes begin in the file."""
    if sum(raw.count(mark) for mark in (b"{", b"[", b",")) > _MARKS_LIMIT:
        raise ValueError(
            f"its header has far more parts than {TENSOR_LIMIT:,} tensors, the most that is read, need"
        )
    parsed = strict_json(raw.decode("utf-8"))
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata of its header must be a table of texts")
    for text in (*parsed, *metadata, *metadata.values()):
        _check_text(text)
    if len(parsed) > TENSOR_LIMIT:
        raise ValueError(
            f"its header lists {len(parsed):,} tensors; the most that is read is {TENSOR_LIMIT:,}"
        )
    tensors = [(name, _tensor(name, entry, first)) for name, entry in parsed.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].stop))
    return dict(tensors), metadata


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"its header holds half a surrogate pair, which is no text: {shown(text)}")


def _tensor(name: str, entry: Any, first: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(
            f"tensor {shown(name)} is of the dtype {shown(str(dtype))}; known are {', '.join(ITEM_BYTES)}"
        )
    if not _whole_numbers(shape) or len(shape) > RANK_LIMIT:
        raise ValueError(f"the shape of tensor {shown(name)} must be at most {RANK_LIMIT} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the offsets of tensor {shown(name)} must be two whole numbers that do not fall")
    if (
        math.prod(filter(None, shape)) * ITEM_BYTES[dtype] >= 2**63
    ):  # zeros left out: no stride may overflow either
        raise ValueError(f"the shape of tensor {shown(name)} exceeds 2^63 bytes")
    needed, given = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise ValueError(
            f"tensor {shown(name)} of shape {tuple(shape)} in {dtype} needs {needed:,} bytes and has {given:,}"
        )
    return TensorInfo(dtype, tuple(shape), first + offsets[0], first + offsets[1])


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_places(tensors: dict[str, TensorInfo], first: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    place = first
    for name, tensor in tensors.items():
        if tensor.start < place:
            raise ValueError(f"tensor {shown(name)} overlaps the one before it")
        if tensor.start > place:
            raise ValueError(f"{tensor.start - place:,} bytes before tensor {shown(name)} belong to none")
        place = tensor.stop
    if place > size:
        raise ValueError(
            f"it is cut short: its tensors end at byte {place:,}, the file at {size:,}; fetch it again"
        )
    if place < size:
        raise ValueError(f"{size - place:,} bytes after its last tensor belong to none")
