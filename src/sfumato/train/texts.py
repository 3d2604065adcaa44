"""Captions encoded once: features of every text that a run will read, kept in a file and fetched by the text."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from sfumato.errors import CheckpointError, DataError
from sfumato.storage import check_safetensors, save_tensors
from sfumato.types import Conditioning

FIELDS = ("tokens", "mask", "vector")
TEXT_ROOM = 2**28  # bytes of features that are remembered: 1,100 captions as Stable Diffusion 1 reads them


class TextCache:
    """Features of texts by the text: call it with texts that it holds. Reads rows from a mapped file."""

    def __init__(self, path: Path, texts: Sequence[str], device: torch.device):
        self.device = device
        self._rows = {text: row for row, text in enumerate(texts)}
        with safe_open(path, framework="pt") as file:
            self._tensors = {name: file.get_tensor(name) for name in FIELDS if name in file.keys()}  # noqa: SIM118

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        rows = torch.tensor([self._rows[text] for text in texts])
        found: dict[str, Tensor] = {
            name: tensor.index_select(0, rows).to(self.device) for name, tensor in self._tensors.items()
        }
        return Conditioning(found["tokens"], found.get("mask"), found.get("vector"))


class Remembered:
    """Features of texts, encoded when they are first asked for and kept while there is room: call it with texts.

    read: some texts to features, a row each. together: texts may be read in one batch, because
    a row does not depend on its neighbours; else each is read alone. So what is kept changes no number. room: bytes.
    """

    def __init__(
        self, read: Callable[[Sequence[str]], Conditioning], *, together: bool, room: int = TEXT_ROOM
    ):
        self.read, self.together, self.room = read, together, room
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()  # the latest used last
        self._bytes = 0

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        lacking = [text for text in dict.fromkeys(texts) if text not in self._rows]
        for some in [lacking] if self.together and lacking else [[text] for text in lacking]:
            told = self.read(some)
            for row, text in enumerate(some):
                own = told.change(lambda rows, row=row: rows[row : row + 1].clone())
                self._rows[text] = own
                self._bytes += _size(own)
        for text in texts:
            self._rows.move_to_end(text)
        rows = [self._rows[text] for text in texts]
        while self._bytes > self.room and len(self._rows) > 1:
            self._bytes -= _size(self._rows.popitem(last=False)[1])
        return _stacked(rows)


def _size(cond: Conditioning) -> int:
    return sum(value.nbytes for value in vars(cond).values() if isinstance(value, Tensor))


def _filled(row: Conditioning, length: int) -> Conditioning:
    more = length - row.tokens.shape[1]
    if not more or row.mask is None:
        return row
    tokens, mask = (
        functional.pad(t, pad) for t, pad in ((row.tokens, (0, 0, 0, more)), (row.mask, (0, more)))
    )
    return replace(row, tokens=tokens, mask=mask)


def _stacked(rows: Sequence[Conditioning]) -> Conditioning:
    """Rows as a batch; where they have masks, shorter ones are filled up with tokens that are not read."""
    longest = max(row.tokens.shape[1] for row in rows)
    rows = [_filled(row, longest) for row in rows]
    told = {
        name: torch.cat([getattr(row, name) for row in rows])
        for name, value in vars(rows[0]).items()
        if isinstance(value, Tensor)
    }
    return Conditioning(**told)


def build_texts(
    texts: Iterable[str],
    read: Callable[[Sequence[str]], Conditioning],
    identity: str,
    folder: Path,
    batch: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, list[str]]:
    """Encode all texts, once each, into a file of `folder`, unless it is there. identity: of the encoders.

    Returns the file and the texts in the order of its rows. `DataError` names a text whose features are not finite.
    """
    ordered = sorted(set(texts))
    listing = hashlib.sha256(json.dumps([identity, ordered]).encode()).hexdigest()
    path = folder / f"texts-{listing[:16]}.safetensors"
    if path.exists():
        try:
            check_safetensors(path)
            return path, ordered
        except CheckpointError:
            path.unlink()
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, len(ordered), batch):
        some = ordered[start : start + batch]
        with torch.no_grad():
            cond = read(some)
        bad = ~cond.tokens.isfinite().flatten(1).all(1)
        if bad.any():
            raise DataError(
                f"the features of {some[int(bad.nonzero()[0])][:60]!r} are not finite; train in float32"
            )
        for name in FIELDS:
            tensor = getattr(cond, name)
            if tensor is not None:
                rows.setdefault(name, []).append(tensor.cpu())
        if on_progress:
            on_progress(min(start + batch, len(ordered)), len(ordered))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {name: torch.cat(parts) for name, parts in rows.items()})
    return path, ordered
