"""Checkpoints: the newest whole one is found, another recipe's is refused, and a kill in a save costs nothing."""

from __future__ import annotations

import csv
import shutil
import tracemalloc
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
    notes = []
    assert newest_state(tmp_path, "mine", notes.append)[0] == 1
    assert notes == ["passed over step-00000002, damaged, for step-00000001"]


@pytest.mark.parametrize("damage", ["state.json", "state.safetensors"])
def test_a_run_of_damaged_ones_does_not_begin_anew(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    for place in tmp_path.iterdir():
        (place / damage).write_bytes((place / damage).read_bytes()[:-9])
    assert has_state(tmp_path, "mine")
    with pytest.raises(CheckpointError, match=r"step-00000002, step-00000001.* remove that folder"):
        newest_state(tmp_path, "mine")


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


def test_a_log_holds_its_rows_on_the_disk_alone(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv", 0)
    values = {"loss": 0.1, "rate": 0.2}
    for step in range(1, 101):
        log.add(step, values)
    tracemalloc.start()
    for step in range(101, 3101):
        log.add(step, values)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000  # bytes; rows of dictionaries would take ten times as much
    log.add(3101, values | {"late": 1.0})
    log.close()
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, 3102))
    assert [row["late"] for row in rows[-2:]] == ["", "1.0"]


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n12,0.25\n1", encoding="utf-8")
    Log(path, 12).close()
    assert path.read_text(encoding="utf-8").split() == ["step,loss", "1,0.5", "12,0.25"]


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
