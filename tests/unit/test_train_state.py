"""Checkpoints: the newest whole one is found, another recipe's is refused, and a kill in a save costs nothing."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from sfumato.errors import CheckpointError
from sfumato.train.state import Log, clear_leftovers, has_state, newest_state, save_state


def saved(folder: Path, *steps: int, identity: str = "mine") -> None:
    for step in steps:
        save_state(folder, step, {"w": torch.full((3,), float(step))}, identity)


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    assert newest_state(tmp_path, "mine") is None and not has_state(tmp_path, "mine")
    saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    step, tensors = newest_state(tmp_path, "mine")
    assert step == 3 and tensors["w"].tolist() == [3.0] * 3


@pytest.mark.parametrize("damage", ["state.json", "state.safetensors"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    newest = tmp_path / "step-00000002" / damage
    newest.write_bytes(newest.read_bytes()[:-9])
    assert newest_state(tmp_path, "mine")[0] == 1


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1, identity="other")
    for look in (newest_state, has_state):
        with pytest.raises(CheckpointError, match="another recipe"):
            look(tmp_path, "mine")


def test_what_a_kill_left_is_cleared_and_a_checkpoint_set_aside_comes_back(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / ".step-00000001.old.abc").mkdir()
    shutil.move(tmp_path / "step-00000001", tmp_path / ".step-00000001.old.abc" / "old")
    (tmp_path / ".step-00000002.def").mkdir()
    clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_state(tmp_path, "mine")[0] == 1


def test_no_step_stands_twice_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = Log(path, 0)
    for step in (1, 2, 3):
        log.add(step, {"loss": step / 4})
    log.close()
    log = Log(path, 2)
    log.add(3, {"loss": 9.0, "late": 1.0})
    log.close()
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["loss"], row["late"]) for row in rows] == [
        ("1", "0.25", ""),
        ("2", "0.5", ""),
        ("3", "9.0", "1.0"),
    ]
