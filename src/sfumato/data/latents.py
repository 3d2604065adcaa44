"""Pictures encoded once, kept by content, and gathered at random faster than any denoiser can ask.

A cache is a folder: `cache.json` names the autoencoder (by the hash of its weights) and the stored dtype;
every `latents-HxW-NNNNN.safetensors` holds rows of one bucket, and in its header the keys of these rows. A
key is a hash of the picture's digest, its size, the autoencoder and the dtype, so a row can never be taken
for another picture's. Shards appear whole or not at all; building again encodes only what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.data.source import Size, Source, to_float
from sfumato.data.store import lock, writing
from sfumato.errors import CheckpointError, DataError, InputError, SfumatoError, StaleCacheError
from sfumato.runtime import DTYPES
from sfumato.storage import check_safetensors, read_json, save_tensors, write_json

FORMAT = "sfumato latents 1"
INDEX = "cache.json"
SHARD_ROWS = 1024  # rows a kill can cost
RAM_BYTES = 4 * 2**30  # up to here the rows are held in memory, beyond it they stay mapped files

Encode = Callable[[Tensor], Tensor]
Write = Callable[["Sequence[Shard]", int, Callable[[int], None]], Iterator[None]]  # shards, batch, told


def latent_key(digest: str, size: Size, autoencoder_hash: str, dtype: str) -> str:
    """What one cached row is filed under: 32 hex digits."""
    text = json.dumps([digest, list(size), autoencoder_hash, dtype])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_latents(
    source: Source,
    encode: Encode,
    autoencoder_hash: str,
    directory: str | os.PathLike[str],
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
    dtype: str = "float16",
    shard_rows: int = SHARD_ROWS,
    write: Write | None = None,
) -> LatentCache:
    """Encode what `directory` does not hold yet, and open it.

    encode: float32 (B, 3, T, H, W) in [−1, 1] → normalised latents (B, C, T, H/f, W/f), on any device.
    on_progress(done, total) is called after each batch and may raise to stop; whole shards stay. Killed and
    started again, the same batches are encoded as without the kill, so the result is the same to the bit.
    write: has other processes write the shards, each by `write_shard`, in place of this one by `encode`.
    Raises `StaleCacheError` when the folder belongs to another autoencoder, `DataError` naming the picture
    whose latent is not finite, `SfumatoError` when a shard cannot be written (what was there before stays).
    """
    directory = Path(directory)
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"latents are stored as float16, bfloat16 or float32, not {dtype}", argument="dtype")
    with lock(directory):
        for leftover in directory.glob(".latents-*"):
            leftover.unlink(missing_ok=True)
        if (directory / INDEX).exists():
            _check_index(directory, autoencoder_hash, dtype)
        else:
            with writing(directory):
                write_json(
                    directory / INDEX, {"format": FORMAT, "autoencoder": autoencoder_hash, "dtype": dtype}
                )
        shards, done, total = _missing(source, autoencoder_hash, directory, dtype, shard_rows)

        def told(rows: int) -> None:
            nonlocal done
            done += rows
            if on_progress:
                on_progress(done, total)

        for _ in (
            write(shards, batch, told) if write is not None else _here(source, encode, shards, batch, told)
        ):
            pass
    return LatentCache(directory, source, autoencoder_hash)


@dataclass(frozen=True)
class Shard:
    """Pictures of one size that are to be one file. indices: of the source. dtype: that is stored."""

    path: Path
    keys: tuple[str, ...]
    indices: tuple[int, ...]
    dtype: str


def write_shard(
    source: Source,
    encode: Encode,
    shard: Shard,
    batch: int = 16,
    told: Callable[[int], None] = lambda rows: None,
) -> int:
    """Encode a shard's pictures and write its file, whole or not at all; told: hears of each batch. Returns rows."""
    parts = []
    for start in range(0, len(shard.indices), batch):
        indices = list(shard.indices[start : start + batch])
        parts.append(_encoded(source, encode, indices, shard.dtype))
        told(len(indices))
    _save(shard.path, torch.cat(parts), list(shard.keys), [source.name(index) for index in shard.indices])
    return len(shard.indices)


def _here(
    source: Source, encode: Encode, shards: Sequence[Shard], batch: int, told: Callable[[int], None]
) -> Iterator[None]:
    for shard in shards:
        write_shard(source, encode, shard, batch, told)
        yield


def _missing(
    source: Source, autoencoder_hash: str, directory: Path, dtype: str, shard_rows: int
) -> tuple[list[Shard], int, int]:
    """(what the folder lacks, rows that it has of those wanted, rows that are wanted)."""
    held = {key for _, keys, _ in _shards(directory) for key in keys}
    total, shards = 0, []
    for size, members in source.buckets().items():
        wanted = {latent_key(source.digest(i), size, autoencoder_hash, dtype): i for i in reversed(members)}
        total += len(wanted)
        rows = {key: wanted[key] for key in reversed(wanted) if key not in held}
        keys, names = list(rows), _free_names(directory, size)
        for start in range(0, len(keys), shard_rows):
            part = tuple(keys[start : start + shard_rows])
            shards.append(Shard(next(names), part, tuple(rows[key] for key in part), dtype))
    return shards, total - sum(len(shard.keys) for shard in shards), total


def rows_in(directory: str | os.PathLike[str]) -> int:
    """How many latents a folder holds. `DataError` for a damaged file."""
    return sum(len(keys) for _, keys, _ in _shards(Path(directory)))


class LatentCache:
    """The latents of every picture of `source`, for reading. Raises `StaleCacheError` unless all are there
    and current.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        source: Source,
        autoencoder_hash: str,
        ram_bytes: int = RAM_BYTES,
    ):
        self.directory = Path(directory)
        self.dtype = _check_index(self.directory, autoencoder_hash, None)
        places: dict[str, tuple[int, int]] = {}
        paths = []
        known: set[str] = set()
        for number, (path, keys, names) in enumerate(_shards(self.directory)):
            paths.append(path)
            known.update(names)
            places |= {key: (number, row) for row, key in enumerate(keys)}
        self._length = len(source)
        self._buckets = source.buckets()
        self._shard = np.full(self._length, -1, dtype=np.int64)
        self._row = np.zeros(self._length, dtype=np.int64)
        self._size = np.zeros((self._length, 2), dtype=np.int64)
        absent = []
        for size, members in self._buckets.items():
            for index in members:
                place = places.get(latent_key(source.digest(index), size, autoencoder_hash, self.dtype))
                self._size[index] = size
                if place is None:
                    absent.append(index)
                else:
                    self._shard[index], self._row[index] = place
        if absent:
            differences = _differences([source.name(i) for i in absent], known)
            raise StaleCacheError(
                f"{self.directory} lacks {len(absent):,} of {self._length:,} pictures as they are now: "
                f"{differences}; encode again, which adds only these"
            )
        used = set(self._shard.tolist())
        self._data = {number: _mapped(path) for number, path in enumerate(paths) if number in used}
        if sum(t.nbytes for t in self._data.values()) <= ram_bytes:
            self._join()

    def __len__(self) -> int:
        return self._length

    def buckets(self) -> dict[Size, list[int]]:
        """Those of the source, in pixels."""
        return self._buckets

    def shape(self, size: Size) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of one bucket."""
        channels, frames, height, width = self._data[int(self._shard[self._buckets[size][0]])].shape[1:]
        return channels, frames, height, width

    def batch(self, indices: Sequence[int]) -> Tensor:
        """float32 (B, C, T, H, W) of pictures of one bucket, in the given order."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= self._length:
            raise InputError(
                f"indices must lie in 0 … {self._length - 1} and be at least one", argument="indices"
            )
        if (self._size[wanted] != self._size[wanted[0]]).any():
            raise InputError("the pictures of one batch must share a bucket", argument="indices")
        shards, rows = self._shard[wanted], torch.from_numpy(self._row[wanted])
        if (shards == shards[0]).all():
            return self._data[int(shards[0])].index_select(0, rows).float()
        first = self._data[int(shards[0])]
        out = torch.empty(len(wanted), *first.shape[1:], dtype=torch.float32)
        for shard in np.unique(shards):
            here = torch.from_numpy(np.flatnonzero(shards == shard))
            out[here] = self._data[int(shard)].index_select(0, rows[here]).float()
        return out

    def _join(self) -> None:
        """Copy the mapped shards into one tensor in memory per bucket."""
        joined: dict[int, Tensor] = {}
        for number, members in enumerate(self._buckets.values()):
            parts, shift = [], {}
            count = 0
            for shard in np.unique(self._shard[members]).tolist():
                shift[shard] = count
                parts.append(self._data[shard])
                count += len(parts[-1])
            if not parts:
                continue
            joined[number] = torch.cat(parts)
            moved = [shift[s] for s in self._shard[members].tolist()]
            self._row[members] += np.asarray(moved, dtype=np.int64)
            self._shard[members] = number
        self._data = joined


def _encoded(source: Source, encode: Encode, indices: list[int], dtype: str) -> Tensor:
    with torch.no_grad():
        latents = encode(to_float(source.pixels(indices)))
    if latents.ndim != 5 or len(latents) != len(indices):
        raise SfumatoError(f"the encoder gave shape {tuple(latents.shape)} for {len(indices)} pictures")
    stored = latents.detach().cpu().to(DTYPES[dtype])
    finite = stored.isfinite().flatten(1).all(1)
    if not finite.all():
        name = source.name(indices[int((~finite).nonzero()[0])])
        raise DataError(f"the latent of {name} is not finite as {dtype}; nothing of its batch was stored")
    return stored


def _save(path: Path, latents: Tensor, keys: list[str], names: list[str]) -> None:
    # one entry, because the library writes several in no fixed order
    header = {"rows": json.dumps({"format": FORMAT, "keys": keys, "names": names})}
    with writing(path.parent):
        save_tensors(path, {"latents": latents}, header)


def _check_index(directory: Path, autoencoder_hash: str, dtype: str | None) -> str:
    """The stored dtype. Raises `StaleCacheError` if the folder is of another autoencoder, dtype or format."""
    if not (directory / INDEX).is_file():
        raise DataError(f"{directory} holds no cached latents ({INDEX} is missing)")
    try:
        index = read_json(directory / INDEX)
    except CheckpointError as error:
        raise StaleCacheError(f"{error}; remove {directory} and encode again") from None
    if index.get("format") != FORMAT:
        raise StaleCacheError(
            f"{directory} is of format {index.get('format')!r}, not {FORMAT!r}; remove it and encode again"
        )
    if index.get("autoencoder") != autoencoder_hash:
        raise StaleCacheError(
            f"{directory} holds latents of the autoencoder {str(index.get('autoencoder'))[:12]}, "
            f"but this one is {autoencoder_hash[:12]}; encode into another folder, or remove this one"
        )
    if dtype is not None and index.get("dtype") != dtype:
        raise StaleCacheError(
            f"{directory} stores {index.get('dtype')}, but {dtype} is asked for; use another folder"
        )
    return str(index["dtype"])


def _shards(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(path, keys of its rows, names of their pictures) of each shard, in name order; a `DataError` if damaged."""
    for path in sorted(directory.glob("latents-*.safetensors")):
        try:
            check_safetensors(path)
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["rows"])
                keys, names = header["keys"], header["names"]
                rows = file.get_slice("latents").get_shape()[0]
        except CheckpointError as error:
            raise DataError(f"{error}; remove it and encode again") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it and encode again") from None
        if rows != len(keys):
            raise DataError(
                f"{path} is damaged: {len(keys)} keys for {rows} rows; remove it and encode again"
            )
        yield path, keys, names


def _differences(absent: list[str], known: set[str]) -> str:
    changed = [name for name in absent if name in known]
    new = [name for name in absent if name not in known]
    parts = [
        f"{len(names):,} {what} (first: {names[0]})"
        for names, what in ((changed, "changed or cropped differently"), (new, "new"))
        if names
    ]
    return ", ".join(parts)


def _mapped(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("latents")


def _free_names(directory: Path, size: Size) -> Iterator[Path]:
    stem = f"latents-{size[0]}x{size[1]}-"
    used = [int(p.stem.rsplit("-", 1)[1]) for p in directory.glob(f"{stem}*.safetensors")]
    for number in itertools.count(max(used, default=-1) + 1):
        yield directory / f"{stem}{number:05d}.safetensors"
