"""The vocabulary of sentencepiece in its own file, `spiece.model`, as a tokenizer of the `tokenizers` library.

The file is a Protocol Buffers message (google/sentencepiece, src/sentencepiece_model.proto): field 1, repeated, is a
piece of text (1), its log probability (2) and its kind (3); field 3 are the rules of normalisation, of which field 2 is
a table that the library reads as it is. Only unigram models are read, which is what T5 has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"  # stands for a space, and for the beginning
EXTRA = 100  # marks `<extra_id_99>` … `<extra_id_0>` that T5 has after the pieces of the file
UNKNOWN, CONTROL = 2, 3  # kinds of pieces; the others are text
UNIGRAM = 1  # trainer_spec.model_type
MOST_BYTES = 64 * 2**20


def read_model(path: Path) -> Tokenizer:
    """The tokenizer of a `spiece.model`, with T5's extra marks. `CheckpointError` when it is no unigram model."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path} is too large for a sentencepiece model")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        pieces, marks, unknown, table = _parsed(data)
        if unknown is None:
            raise ValueError("no piece stands for what is unknown")
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown))
        steps = [normalizers.Precompiled(table)] if table else []
        tokenizer.normalizer = normalizers.Sequence(
            [*steps, normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
        )
    except Exception as error:  # the library has no class of its own
        raise CheckpointError(f"{path} is no unigram model of sentencepiece: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    extra = [f"<extra_id_{number}>" for number in reversed(range(EXTRA))]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in [*marks, *extra]])
    return tokenizer


def _parsed(data: bytes) -> tuple[list[tuple[str, float]], list[str], int | None, bytes]:
    """Pieces with their scores, those that are marks, the place of the unknown one, and the table of normalisation."""
    pieces: list[tuple[str, float]] = []
    marks: list[str] = []
    unknown, table = None, b""
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            inner = dict(_fields(value))
            text, score, kind = inner.get(1, b""), inner.get(2, b"\0" * 4), inner.get(3, 1)
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("a piece is damaged")
            if kind == UNKNOWN:
                unknown = len(pieces)
            if kind in (UNKNOWN, CONTROL):
                marks.append(text.decode("utf-8"))
            pieces.append((text.decode("utf-8"), struct.unpack("<f", score)[0]))
        elif field == 2 and isinstance(value, bytes):
            if dict(_fields(value)).get(3, UNIGRAM) != UNIGRAM:
                raise ValueError("it is a model of another kind")
        elif field == 3 and isinstance(value, bytes):
            found = dict(_fields(value)).get(2, b"")
            table = found if isinstance(found, bytes) else b""
    return pieces, marks, unknown, table


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message: whole numbers, or the bytes of texts, messages and floats."""
    place = 0
    while place < len(data):
        key, place = _whole(data, place)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _whole(data, place)
            yield field, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field {field} has the unknown type {kind}")
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, place = _whole(data, place)
        if place + size > len(data):
            raise ValueError("it is cut short")
        yield field, data[place : place + size]
        place += size


def _whole(data: bytes, place: int) -> tuple[int, int]:
    """The number that begins there, in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if place >= len(data):
            break
        byte = data[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
    raise ValueError("it is cut short")
