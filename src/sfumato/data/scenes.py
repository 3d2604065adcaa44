"""The procedural world as a `Source`: scene k of a seed, rendered once, described anew in every epoch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sfumato.data.buckets import raw_bits
from sfumato.data.source import Size
from sfumato.data.store import RowStore, address, lock
from sfumato.errors import InputError, SfumatoError

RENDERER = 1  # to be raised whenever `sfumato.scenes` makes another picture of the same seed
MOTION = 2  # the same of clips
CHUNK = 256  # scenes a kill can cost
BATCH = 16  # scenes per call of the renderer


class SceneSource:
    """`count` scenes of one split, `frames` pictures each of `size` × `size` pixels.

    cache: folder under which the rendered rows are kept, by what decides them; None renders at every call.
    style: how captions are phrased (see `sfumato.scenes.describe`). options: further arguments of `sample_scene`.
    chunk: scenes rendered and kept at a time.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        split: str = "train",
        size: int = 128,
        frames: int = 1,
        *,
        cache: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        style: str = "mixed",
        options: dict[str, Any] | None = None,
        chunk: int = CHUNK,
    ):
        for name, value in (("count", count), ("size", size), ("frames", frames), ("chunk", chunk)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}", argument=name)
        self.count, self.seed, self.split, self.size, self.frames = count, seed, split, size, frames
        self.device, self.style, self.options = device, style, dict(options or {})
        self.chunk = chunk
        self._scene = lru_cache(maxsize=4096)(self._sample)
        self.store: RowStore | None = None
        self.cache = None if cache is None else os.fspath(cache)
        if self.cache is not None:
            identity = {**self._identity(), "count": count}
            fields = {"rgb": (frames, size, size, 3), "instances": (frames, size, size)}
            self.store = RowStore(
                Path(self.cache) / f"scenes-{address(identity)}", identity, count, fields, chunk
            )

    def __len__(self) -> int:
        return self.count

    def buckets(self) -> dict[Size, list[int]]:
        return {(self.size, self.size): list(range(self.count))}

    def scene(self, index: int) -> Any:
        """The `sfumato.scenes.Scene` of an index."""
        return self._scene(self._checked(index))

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3), or (B, T, H, W, 3) when frames > 1."""
        rgb = self._rows("rgb", indices)
        return rgb[:, 0] if self.frames == 1 else rgb

    def instances(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, T, H, W): 0 where nothing stands, k where object k − 1 of the scene does."""
        return self._rows("instances", indices)

    def caption(self, index: int, epoch: int = 0, frames: int | None = None) -> str:
        return self.described(index, epoch, frames)[0]

    def described(self, index: int, epoch: int = 0, frames: int | None = None) -> tuple[str, Any]:
        """The caption of an epoch, and the `Statement` of what it claims. frames: of its first ones alone."""
        return self.words_for(self.scene(index), frames, index, epoch)

    def words_for(self, scene: Any, frames: int | None, *key: object) -> tuple[str, Any]:
        """As `described`, of a `Scene` that may be one of these turned; `key` decides how it is phrased."""
        from sfumato.scenes import describe

        if frames is not None:
            scene = replace(scene, frames=frames)
        return describe(scene, _seed("caption", self.seed, self.split, *key), style=self.style)

    def stills(self) -> list[int]:
        """Clips whose first frame, as a picture, is of the same split."""
        from sfumato.scenes import split_of

        return [i for i in range(self.count) if split_of(replace(self.scene(i), frames=1)) == self.split]

    def digest(self, index: int) -> str:
        return address({**self._identity(), "index": self._checked(index)})

    def name(self, index: int) -> str:
        return f"scene {index} of seed {self.seed} ({self.split})"

    def labels(self, indices: Sequence[int], factor: int) -> Tensor | None:
        """int64 (B, A, H/factor, W/factor), see `sfumato.scenes.cell_labels`; None if the scenes move."""
        if self.frames > 1:
            return None
        from sfumato.scenes import cell_labels

        masks = torch.from_numpy(np.ascontiguousarray(self.instances(indices)))
        return cell_labels([self.scene(i) for i in indices], masks, factor)

    def prepare(
        self, processes: int | None = None, on_progress: Callable[[int, int], None] | None = None
    ) -> SceneSource:
        """Render what the cache lacks, in several processes of one thread each (default: one per core);
        return self.

        on_progress(done, total) counts scenes and may raise to stop; whole chunks stay, and the next call
        goes on.
        """
        store = self.store
        if store is None:
            return self
        with lock(store.directory):
            store.refresh()
            chunks = store.missing()
            workers = min(processes or os.cpu_count() or 1, len(chunks)) if self.device == "cpu" else 1
            state = {"done": self.count - sum(np.subtract(*store.span(c)[::-1]) for c in chunks)}

            def finished(chunk: int) -> None:
                store.record(chunk)
                start, stop = store.span(chunk)
                state["done"] += stop - start
                if on_progress:
                    on_progress(int(state["done"]), self.count)

            if workers <= 1:
                for chunk in chunks:
                    self.render_chunk(chunk)
                    finished(chunk)
            else:
                self._render_in_processes(workers, chunks, finished)
        return self

    def render_chunk(self, chunk: int) -> None:
        """Render the scenes of one chunk into the store, without counting it as whole."""
        if self.store is None:
            raise InputError("rendering in chunks needs a cache folder", argument="cache")
        self.store.put(chunk, self._render(range(*self.store.span(chunk))))

    def _rows(self, field: str, indices: Sequence[int]) -> np.ndarray:
        wanted = [self._checked(i) for i in indices]
        if self.store is None:
            return self._render(wanted)[field]
        if not self.store.holds(wanted):
            with lock(self.store.directory):
                self.store.refresh()
                for chunk in sorted({i // self.store.chunk for i in wanted} & set(self.store.missing())):
                    self.render_chunk(chunk)
                    self.store.record(chunk)
        return self.store.rows(field, wanted)

    def _render(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        from sfumato.scenes import render

        rgb, instances = [], []
        with torch.no_grad():
            for start in range(0, len(indices), BATCH):
                scenes = [self.scene(i) for i in indices[start : start + BATCH]]
                made = render(scenes, size=self.size, device=self.device)
                bytes_ = made.rgb.mul(255.0).round_().clamp_(0, 255).to(torch.uint8)
                rgb.append(bytes_.permute(0, 2, 3, 4, 1).cpu().numpy())  # (B, T, H, W, 3)
                instances.append(made.instances.to(torch.uint8).cpu().numpy())
        return {"rgb": np.concatenate(rgb), "instances": np.concatenate(instances)}

    def _render_in_processes(self, workers: int, chunks: list[int], finished: Callable[[int], None]) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(_import_path()),
        }
        arguments = json.dumps(self._arguments())
        waiting, gate, stopped = iter(chunks), threading.Lock(), threading.Event()
        failures: list[BaseException] = []
        running: list[subprocess.Popen[str]] = []
        drivers = ThreadPoolExecutor(workers, "drive")
        driving: list[Future[None]] = []
        complaints: dict[int, IO[bytes]] = {}

        def drive(process: subprocess.Popen[str]) -> None:
            try:
                said = arguments + "\n"
                while not stopped.is_set():
                    with gate:
                        chunk = next(waiting, None)
                    if chunk is None:
                        break
                    answer = _ask(process, f"{said}{chunk}\n")
                    if answer is None:
                        raise SfumatoError(_last_words(process, complaints[process.pid]))
                    if answer != chunk:
                        raise SfumatoError(answer["error"])
                    said = ""
                    with gate:
                        if not stopped.is_set():
                            finished(chunk)
            except BaseException as error:  # carried to the caller's thread
                failures.append(error)
                stopped.set()

        try:
            for _ in range(workers):
                command = [sys.executable, "-P", "-m", "sfumato.data.render_worker"]
                pipe, said = subprocess.PIPE, tempfile.TemporaryFile()  # noqa: SIM115
                process = subprocess.Popen(
                    command, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=said
                )
                running.append(process)
                complaints[process.pid] = said
            driving += [drivers.submit(drive, process) for process in running]
            wait(driving)
        finally:  # also when the caller's thread is interrupted: nobody counts chunks once the store's lock is left
            stopped.set()
            for process in running:
                process.kill()
            wait(driving)  # an interrupted join of a thread would take it for stopped
            drivers.shutdown()
            for process in running:
                process.wait()
                for stream in (process.stdin, process.stdout, complaints.get(process.pid)):
                    with contextlib.suppress(OSError):  # words an ended process never took
                        if stream:
                            stream.close()
        if failures:
            raise failures[0]

    def _arguments(self) -> dict[str, Any]:
        names = ("count", "seed", "split", "size", "frames", "cache", "device", "style", "options", "chunk")
        return {name: getattr(self, name) for name in names}

    def _identity(self) -> dict[str, Any]:
        """All that decides the pixels of scene k, besides k."""
        names = ("seed", "split", "size", "frames", "device", "options")
        motion = {"motion": MOTION} if self.frames > 1 else {}
        return {"renderer": RENDERER, **motion, **{name: getattr(self, name) for name in names}}

    def _sample(self, index: int) -> Any:
        from sfumato.scenes import sample_scene

        seed = _seed("scene", self.seed, index)
        return sample_scene(seed, split=self.split, frames=self.frames, **self.options)

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise InputError(f"there is no scene {index}; there are {self.count}", argument="indices")
        return int(index)


def _import_path() -> list[str]:
    """Where this process imports from, without the working folder: a file there is no module of ours, whatever its
    name. It stays where it is this package's own home.
    """
    home, here = Path(__file__).resolve().parents[2], Path.cwd()
    places = [Path(place).absolute() for place in sys.path]
    return [str(place) for place in places if place.resolve() == home or place.resolve() != here]


def _ask(process: subprocess.Popen[str], words: str) -> Any:
    """Send `words` to a worker and read its answer; None if it has ended."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(words)
        process.stdin.flush()
    except OSError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _last_words(process: subprocess.Popen[str], complaints: IO[bytes]) -> str:
    code = process.wait()
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    return f"a rendering process ended with status {code}" + (f": {lines[-1]}" if lines else "")


def _seed(*key: object) -> int:
    """A seed in 0 … 2⁶³ − 1 that is a function of `key` alone."""
    return int(raw_bits(1, *key)[0]) >> 1
