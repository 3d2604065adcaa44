"""Checkpoints of a run: whole or absent, verified by hash, the old one removed only when the new one is safe."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.storage import atomic_directory, atomic_file, file_hash, load_tensors, read_json, save_tensors

KEPT = 2  # newest checkpoints


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], identity: str) -> Path:
    """Write `step-NNNNNNNN/` with its tensors and their hash, then drop all but the newest two."""
    target = folder / f"step-{step:08d}"
    try:
        with atomic_directory(target) as staging:
            save_tensors(staging / "state.safetensors", tensors)
            card = {"step": step, "identity": identity, "sha256": file_hash(staging / "state.safetensors")}
            (staging / "state.json").write_text(json.dumps(card), encoding="utf-8")
    except OSError as error:
        raise SfumatoError(
            f"the checkpoint of step {step} could not be written ({error}); the one before it is intact"
        ) from None
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_state(
    folder: Path, identity: str, note: Callable[[str], None] | None = None
) -> tuple[int, dict[str, Tensor]] | None:
    """(step, tensors) of the newest checkpoint that verifies, or None when there is none at all.

    A damaged one is passed over for the one before it, and `note` is told its name. `CheckpointError` when the newest
    is of another recipe, or when there are checkpoints but all are damaged.
    """
    damaged = []
    for place, card in _cards(folder, identity):
        weights = place / "state.safetensors"
        with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError, OSError):
            if card is not None and file_hash(weights) == card["sha256"]:
                found = int(card["step"]), load_tensors(weights)
                if damaged and note:
                    note(f"passed over {', '.join(damaged)}, damaged, for {place.name}")
                return found
        damaged.append(place.name)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}); put back a copy of one, or remove that "
            "folder to start anew"
        )
    return None


def has_state(folder: Path, identity: str) -> bool:
    """Whether there is a checkpoint, be it damaged. `CheckpointError` when, by its card, it is of another recipe."""
    return bool(_cards(folder, identity))


def _cards(folder: Path, identity: str) -> list[tuple[Path, dict[str, Any] | None]]:
    """Checkpoints with their cards, None for one that cannot be read; the newest first."""
    found: list[tuple[Path, dict[str, Any] | None]] = []
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            found.append((place, read_json(place / "state.json")))
        except CheckpointError:
            found.append((place, None))
    theirs = [card.get("identity") != identity for _, card in found if card is not None]
    if theirs and theirs[0]:
        raise CheckpointError(
            f"{folder} holds a run of another recipe; give another --out, or remove that folder to start anew"
        )
    return [(place, card) for place, card in found if card is None or card.get("identity") == identity]


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill in the middle of a save left behind; a checkpoint set aside mid-rename comes back.

    For one process alone, before any other looks at the folder.
    """
    if not folder.is_dir():
        return
    for leftover in folder.glob(".step-*.old.*"):
        kept = leftover / "old"
        target = folder / leftover.name[1:].split(".old.")[0]
        if kept.is_dir() and not target.exists():
            kept.rename(target)
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


class Log:
    """One CSV row a step. Rows beyond the checkpoint that a run continues from are dropped: no step stands twice."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.names: list[str] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as stream:
                self.names = next(csv.reader(stream), [])
        self._stream: TextIO | None = None
        self._rewrite(step)

    def add(self, step: int, values: dict[str, float]) -> None:
        row = {"step": str(step)} | {name: repr(float(value)) for name, value in values.items()}
        if not set(row) <= set(self.names):
            self.names += [name for name in row if name not in self.names]
            self._rewrite(step)
        assert self._stream is not None
        csv.DictWriter(self._stream, self.names).writerow(row)
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _rewrite(self, last: int) -> None:
        """Write the file anew under `names`, with its whole rows up to the step `last`, and open it for more."""
        self.close()
        with (
            atomic_file(self.path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self.names or ["step"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in _rows(self.path) if _number(row.get("step")) <= last)
        self._stream = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115 — closed by `close`


def logged(path: Path) -> int:
    """The last step that a log has, 0 where there is none."""
    steps = [_number(row.get("step")) for row in _rows(path)]
    return int(max((step for step in steps if step < float("inf")), default=0))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The whole rows of a log, of which a kill may have cut one."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as stream:
            yield from (row for row in csv.DictReader(stream) if None not in row.values())


def _number(text: str | None) -> float:
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")


@contextlib.contextmanager
def tensorboard(
    log: str, leads: bool, place: Path
) -> Iterator[Callable[[int, dict[str, float]], None] | None]:
    """What writes TensorBoard's files into a folder, if the recipe's `log` asks for them and this process leads.

    From the first step written on, what a run that was killed had written before no longer counts.
    """
    if log != "tensorboard" or not leads:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "log = tensorboard needs the package tensorboard: pip install 'sfumato[logs]'"
        ) from None
    writer: SummaryWriter | None = None

    def write(step: int, values: dict[str, float]) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(place / "tensorboard", purge_step=step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
