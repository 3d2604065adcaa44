"""The loop with a network of one matrix: what it does when numbers leave the finite."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.errors import SfumatoError
from sfumato.train.loop import Player, fit
from sfumato.train.recipe import TrainRecipe
from sfumato.train.state import newest_state


class Line:
    """y = w x, whose gradient is made infinite at one step while its loss stays finite."""

    stage = "line"
    flops = 0.0

    def __init__(self, spoilt: int = 0, apart: bool = False):
        torch.manual_seed(0)
        self.recipe = TrainRecipe(steps=6, batch=8, microbatch=2, warmup=1, save_every=1, sheet_every=100)
        net = torch.nn.Linear(3, 1)

        def batch(step: int, part: int) -> torch.Tensor:
            return torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + part))

        def loss(module, x, step, part):
            error = module(x).square().mean()
            if step == spoilt:
                error.register_hook(lambda gradient: gradient * torch.inf)
            return error, {"loss": error}

        self.players = [Player("line", net, self.recipe, batch, loss, apart=apart)]

    def sheet(self, average, step) -> str:
        return ""


def test_weights_that_are_spoilt_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SfumatoError, match=r"grad_norm of line became .* at step 4"):
        fit(Line(spoilt=4), tmp_path, "x", torch.device("cpu"), lambda event: None)
    step, tensors = newest_state(tmp_path / "state", "x")
    assert step == 3
    assert all(value.isfinite().all() for value in tensors.values())


def test_a_run_in_two_pieces_is_the_run_in_one(tmp_path: Path) -> None:
    def quiet(event) -> None:
        pass

    whole = fit(Line(), tmp_path / "whole", "x", torch.device("cpu"), quiet)
    with pytest.raises(SfumatoError):
        fit(Line(spoilt=4), tmp_path / "cut", "x", torch.device("cpu"), quiet)
    pieces = fit(Line(), tmp_path / "cut", "x", torch.device("cpu"), quiet)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert (tmp_path / "whole" / "log.csv").read_text() == (tmp_path / "cut" / "log.csv").read_text()


def test_a_run_that_left_no_checkpoint_is_named_where_it_begins_anew(tmp_path: Path) -> None:
    told: list[str] = []

    def start(spoilt: int = 0) -> None:
        line = Line(spoilt)
        line.recipe = replace(line.recipe, save_every=4)
        fit(
            line,
            tmp_path,
            "x",
            torch.device("cpu"),
            lambda e: told.append(e.text) if e.kind == "note" else None,
        )

    with pytest.raises(SfumatoError):
        start(spoilt=3)
    assert told == []
    start()
    assert told == ["begins at step 0: a run here was stopped at step 2 and left no checkpoint"]
    start()
    assert told[1:] == ["finished, after 6 steps"]


def test_lanes_train_what_one_network_trains(tmp_path: Path) -> None:
    before, turns = torch.get_num_threads(), sys.getswitchinterval()
    quiet, cpu = (lambda event: None), torch.device("cpu")
    try:
        torch.set_num_threads(2)
        alone = fit(Line(), tmp_path / "alone", "x", cpu, quiet)
        twice = [fit(Line(apart=True), tmp_path / name, "x", cpu, quiet) for name in ("one", "two")]
    finally:
        torch.set_num_threads(before)
    for name, weight in alone.items():
        torch.testing.assert_close(twice[0][name], weight)
        assert torch.equal(twice[0][name], twice[1][name])
    assert sys.getswitchinterval() == pytest.approx(turns, abs=2e-6)
