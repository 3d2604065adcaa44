"""Checkpoints of a run: whole or absent, verified by hash, the old one removed only when the new one is safe."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from sfumato.errors import CheckpointError, SfumatoError
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


def newest_state(folder: Path, identity: str) -> tuple[int, dict[str, Tensor]] | None:
    """(step, tensors) of the newest checkpoint that verifies, or None when there is none.

    A damaged one is passed over for the one before it. `CheckpointError` when the newest is of another recipe.
    """
    for place, card in _cards(folder, identity):
        weights = place / "state.safetensors"
        with contextlib.suppress(CheckpointError, KeyError, OSError):
            if file_hash(weights) == card["sha256"]:
                return int(card["step"]), load_tensors(weights)
    return None


def has_state(folder: Path, identity: str) -> bool:
    """Whether there is a checkpoint, judged by its card alone. `CheckpointError` when it is of another recipe."""
    return bool(_cards(folder, identity))


def _cards(folder: Path, identity: str) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints with a readable card, the newest first."""
    found = []
    for place in sorted(folder.glob("step-*"), reverse=True):
        with contextlib.suppress(CheckpointError):
            found.append((place, read_json(place / "state.json")))
    if found and found[0][1].get("identity") != identity:
        raise CheckpointError(
            f"{folder} holds a run of another recipe; give another --out, or remove that folder to start anew"
        )
    return [(place, card) for place, card in found if card.get("identity") == identity]


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
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as stream:
                self.rows = [row for row in csv.DictReader(stream) if _number(row.get("step")) <= step]
        self.names: list[str] = list(self.rows[0]) if self.rows else []
        self._stream: TextIO | None = None
        self._rewrite()

    def add(self, step: int, values: dict[str, float]) -> None:
        row = {"step": str(step)} | {name: repr(float(value)) for name, value in values.items()}
        self.rows.append(row)
        if not set(row) <= set(self.names):
            self.names += [name for name in row if name not in self.names]
            self._rewrite()
            return
        assert self._stream is not None
        csv.DictWriter(self._stream, self.names).writerow(row)
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _rewrite(self) -> None:
        self.close()
        with (
            atomic_file(self.path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self.names or ["step"])
            writer.writeheader()
            writer.writerows(self.rows)
        self._stream = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115 — closed by `close`


def _number(text: str | None) -> float:
    try:
        return float(text or "inf")
    except ValueError:
        return float("inf")
