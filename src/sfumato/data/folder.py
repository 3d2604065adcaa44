"""A person's own pictures as a `Source`: discovered, checked, sorted into aspect-ratio buckets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from sfumato.data.buckets import bucket_sizes, fit, nearest_bucket, raw_bits
from sfumato.data.discover import Entry, discover, listed
from sfumato.data.source import Problem, Size
from sfumato.data.store import RowStore, address, lock, writing
from sfumato.errors import CheckpointError, DataError, InputError
from sfumato.pictures import decode, upright_size
from sfumato.storage import read_json, write_json

HANDFUL = 5  # this many bad members never stop a run
RULES = "fit 1"  # changes when the same bytes would become other pixels
HELD_OUT = 2**32


class FolderSource:
    """Captioned pictures of a folder (see `discover` for the layouts) or a WebDataset tar.

    size: side in pixels of the square that has a bucket's area.
    multiple: of both sides of every bucket: autoencoder factor × patch.
    flip: add each picture's mirror image as a picture of its own.
    crop: "centre", or "random", a place fixed by (seed, picture).
    max_ratio: of the longest bucket; 1 makes everything square.
    enlarge: a picture that would have to grow more than this many times is set aside as too small; one more than
        twice as long as the longest bucket is set aside too.
    part: "all", or "train" / "held_out": the fraction `held_out` is split off by a hash of each picture's bytes.
    captions: as of `discover`.
    allow: the fraction of members that may be set aside (a handful always may) before it is a `DataError`.
    cache: folder in which the outcome of checking each file is remembered (by its size and time of change) and, after
        `prepare`, the cropped pixels: for pictures so large that decoding them in every epoch would slow training.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int = 128,
        seed: int = 0,
        *,
        multiple: int = 8,
        flip: bool = False,
        crop: str = "centre",
        max_ratio: float = 2.0,
        enlarge: float = 4.0,
        part: str = "all",
        held_out: float = 0.0,
        cache: str | os.PathLike[str] | None = None,
        allow: float = 0.05,
        captions: bool = True,
    ):
        if crop not in ("centre", "random"):
            raise InputError(f"crop must be centre or random, not {crop!r}", argument="crop")
        if part not in ("all", "train", "held_out") or not 0.0 <= held_out < 1.0:
            raise InputError(
                f"part must be all, train or held_out, with held_out in [0, 1), not {part!r}", argument="part"
            )
        self.path, self.seed, self.crop = Path(path), seed, crop
        self._sizes = bucket_sizes(size, multiple, max_ratio)
        self._max_ratio, self._enlarge = max_ratio, enlarge
        self._cache = None if cache is None else Path(cache)
        self._stores: dict[Size, tuple[RowStore, dict[int, int]]] = {}
        found = discover(path, captions)
        self.layout, self.passed_over = found.layout, tuple(found.passed_over)
        problems = list(found.problems)
        self._entries: list[Entry] = []
        self._digests: list[str] = []
        self._bucket: list[Size] = []
        for entry, result in zip(found.entries, self._inspect_all(found.entries), strict=True):
            if isinstance(result, Problem):
                problems.append(result)
            elif _belongs(result[0], part, held_out):
                self._entries.append(entry)
                self._digests.append(result[0])
                self._bucket.append(result[1])
        self.problems = tuple(problems)
        self._judge(len(found.entries) + len(found.problems), allow, part)
        self._items = [
            (number, mirrored)
            for mirrored in ((False, True) if flip else (False,))
            for number, entry in enumerate(self._entries)
            for _ in range(entry.repeats)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def buckets(self) -> dict[Size, list[int]]:
        """(height, width) → indices, sizes ascending, only those that have pictures."""
        result: dict[Size, list[int]] = {}
        for index, (number, _) in enumerate(self._items):
            result.setdefault(self._bucket[number], []).append(index)
        return dict(sorted(result.items()))

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3). Raises `DataError` when a file changed or vanished since it was checked."""
        return np.stack([self._picture(*self._items[i]) for i in indices])

    def caption(self, index: int, epoch: int = 0) -> str:
        return self._entries[self._items[index][0]].caption

    def name(self, index: int) -> str:
        return self._entries[self._items[index][0]].name

    def extent(self, index: int) -> Size:
        """(height, width) of the whole picture, by its header."""
        entry = self._entries[self._items[index][0]]
        return upright_size(entry.read(), entry.name)[::-1]

    def digest(self, index: int) -> str:
        number, mirrored = self._items[index]
        rule = f"{RULES} {self._bucket[number]} {self._position(number)} {mirrored} {self._digests[number]}"
        return hashlib.sha256(rule.encode()).hexdigest()

    def labels(self, indices: Sequence[int], factor: int) -> Tensor | None:
        """A folder knows nothing but captions."""
        return None

    def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> FolderSource:
        """With a `cache`, decode and crop what it lacks, in threads; return self. A kill costs one chunk."""
        if self._cache is None:
            return self
        members: dict[Size, list[int]] = {}
        for number, size in enumerate(self._bucket):
            members.setdefault(size, []).append(number)
        done = 0
        for size, numbers in sorted(members.items()):
            places = [f"{self._digests[n]} {self._position(n)}" for n in numbers]
            listing = hashlib.sha256(repr(places).encode()).hexdigest()
            identity = {"rules": RULES, "size": list(size), "pictures": listing}
            folder = self._cache / f"pictures-{address(identity)}"
            store = RowStore(folder, identity, len(numbers), {"rgb": (*size, 3)})
            with lock(folder), _threads() as pool:
                store.refresh()
                missing = set(store.missing())
                for chunk in range(store.chunks):
                    start, stop = store.span(chunk)
                    if chunk in missing:
                        store.put(
                            chunk, {"rgb": np.stack(list(pool.map(self._decoded, numbers[start:stop])))}
                        )
                        store.record(chunk)
                    done += stop - start
                    if on_progress:
                        on_progress(done, len(self._entries))
            self._stores[size] = store, {number: row for row, number in enumerate(numbers)}
        return self

    def _inspect_all(self, entries: list[Entry]) -> list[tuple[str, Size] | Problem]:
        """The outcome of `_inspect` for each entry, remembered in the cache folder where there is one."""
        if self._cache is None:
            with _threads() as pool:
                return list(pool.map(self._inspect, entries))
        rules = {
            "rules": RULES,
            "path": str(self.path.resolve()),
            "sizes": self._sizes,
            "enlarge": self._enlarge,
        }
        rules["ratio"] = self._max_ratio
        path = self._cache / f"checked-{address(rules)}.json"
        try:
            remembered = read_json(path)
        except CheckpointError:  # none yet, or not readable: everything is checked again
            remembered = {}
        stamps = [_stamp(entry) for entry in entries]
        fresh = {stamp: e for e, stamp in zip(entries, stamps, strict=True) if stamp not in remembered}
        with _threads() as pool:
            made = dict(zip(fresh, pool.map(self._inspect, fresh.values()), strict=True))
        results = [
            made[stamp] if stamp in made else _recall(e, remembered[stamp])
            for e, stamp in zip(entries, stamps, strict=True)
        ]
        if fresh:
            lines = ([r.reason] if isinstance(r, Problem) else [r[0], *r[1]] for r in results)
            with writing(self._cache):
                write_json(path, dict(zip(stamps, lines, strict=True)))
        return results

    def _inspect(self, entry: Entry) -> tuple[str, Size] | Problem:
        """Digest and bucket of a picture, or why it is set aside. It is decoded once, whole, here."""
        try:
            data = entry.read()
            picture = decode(data, entry.name)
            return hashlib.sha256(data).hexdigest(), self._place(picture)
        except DataError as error:
            return Problem(entry.name, str(error).removeprefix(f"{entry.name} "))

    def _place(self, picture: Image.Image) -> Size:
        width, height = picture.size
        ratio = max(width / height, height / width)
        bucket = nearest_bucket(height, width, self._sizes)
        if ratio > 2 * self._max_ratio:
            raise DataError(
                f"has an aspect ratio of {ratio:.4g}:1 ({width}×{height}); "
                f"up to {2 * self._max_ratio:g}:1 is used"
            )
        if max(bucket[0] / height, bucket[1] / width) > self._enlarge:
            raise DataError(
                f"is too small: {width}×{height} would be enlarged more than "
                f"{self._enlarge:g} times to {bucket[1]}×{bucket[0]}"
            )
        return bucket

    def _picture(self, number: int, mirrored: bool) -> np.ndarray:
        if self._bucket[number] in self._stores:
            store, rows = self._stores[self._bucket[number]]
            picture = store.rows("rgb", [rows[number]])[0]
        else:
            picture = self._decoded(number)
        return picture[:, ::-1] if mirrored else picture

    def _decoded(self, number: int) -> np.ndarray:
        """uint8 (H, W, 3) of an entry, from its file, which must be as it was when checked."""
        entry = self._entries[number]
        data = entry.read()
        if hashlib.sha256(data).hexdigest() != self._digests[number]:
            raise DataError(f"{entry.name} changed while it was in use; start again to read the folder anew")
        return np.asarray(fit(decode(data, entry.name), self._bucket[number], self._position(number)))

    def _position(self, number: int) -> tuple[float, float]:
        if self.crop == "centre":
            return 0.5, 0.5
        down, across = raw_bits(2, "crop", self.seed, self._digests[number])
        return (int(down) >> 11) / 2**53, (int(across) >> 11) / 2**53

    def _judge(self, seen: int, allow: float, part: str) -> None:
        bad = len(self.problems)
        if bad > max(HANDFUL, allow * seen):
            raise DataError(
                f"{self.path}: {bad:,} of {seen:,} members cannot be used, "
                f"more than {allow:.0%}: {listed(list(self.problems))}",
                argument="path",
            )
        if not self._entries:
            why = f": {listed(list(self.problems))}" if bad else f" in the part {part!r}"
            raise DataError(f"{self.path} ({self.layout}) has no usable picture{why}", argument="path")


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _stamp(entry: Entry) -> str:
    """Which bytes an entry had when it was checked, as a build tool would tell: place, length and time of change."""
    try:
        status = os.stat(entry.file)
    except OSError as error:
        raise DataError(f"{entry.name} cannot be read: {error.strerror}") from None
    return f"{entry.file.resolve()} {entry.offset} {entry.length} {status.st_size} {status.st_mtime_ns}"


def _recall(entry: Entry, line: list) -> tuple[str, Size] | Problem:
    return Problem(entry.name, line[0]) if len(line) == 1 else (line[0], (line[1], line[2]))


def _belongs(digest: str, part: str, held_out: float) -> bool:
    """Whether a picture is of the part; the same bytes are always on the same side."""
    return part == "all" or (int(digest[:8], 16) < held_out * HELD_OUT) == (part == "held_out")
