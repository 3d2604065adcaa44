"""Training as a user meets it: whole recipes in processes of their own, killed, continued, shared, and drawn from."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.data.scenes import SceneSource
from sfumato.data.source import to_float
from sfumato.errors import CheckpointError, InputError
from sfumato.storage import load_tensors
from sfumato.train import run
from sfumato.train.job import training_pictures
from sfumato.train.recipe import parse_recipe, read_recipe

RECIPE = """
name = "tiny"
[data]
size = 32
[autoencoder]
factor = 8
latent_channels = 4
encoder_width = 32
decoder_width = 32
encoder_blocks = 1
decoder_blocks = 1
[autoencoder.train]
steps = 6
batch = 8
microbatch = 4
warmup = 2
save_every = 2
sheet_every = 6
[denoiser]
width = 64
depth = 2
heads = 1
text_width = 64
text_depth = 1
[denoiser.train]
steps = 12
batch = 8
microbatch = 4
optimizer = "muon"
warmup = 2
save_every = 3
sheet_every = 12
precision = "float32"
[preset]
steps = 2
size = [32, 32]
"""
COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
CHILD = """
import sys
from sfumato.train import run
run(sys.argv[1], data=sys.argv[2] or None, out=sys.argv[3], device="cpu",
    on_event=lambda e: print(e.kind, e.stage, e.step, flush=True))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four squares of four colours with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for k in range(24):
        name, color = list(COLORS.items())[k % 4]
        picture = np.full((32, 32, 3), 245, dtype=np.uint8)
        y, x = random.integers(2, 14, 2)
        picture[y : y + 16, x : x + 16] = color
        Image.fromarray(picture).save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"a {name} square", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def start(recipe: Path, pictures: Path | str, out: Path, *command: str) -> subprocess.Popen[str]:
    """A training process of its own; what it says goes to `said.txt` beside its run folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    script, said = out.parent / "child.py", out.parent / "said.txt"
    script.write_text(CHILD, encoding="utf-8")
    with open(said, "w", encoding="utf-8") as stream:
        return subprocess.Popen(
            [*(command or (sys.executable,)), str(script), str(recipe), str(pictures), str(out)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )


def finish(process: subprocess.Popen[str], out: Path) -> None:
    assert process.wait(timeout=300) == 0, (out.parent / "said.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(recipe: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(recipe, pictures, out), out)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((out / "model").glob("*.safetensors")):
        tensors |= {f"{file.stem}/{name}": value for name, value in load_tensors(file).items()}
    assert tensors
    return tensors


def rows(out: Path, stage: str) -> list[dict[str, str]]:
    with open(out / stage / "log.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_model_draws(whole: Path) -> None:
    model = sfumato.load(whole)
    result = model.generate(sfumato.Request("a red square", seed=3))
    assert result.images[0].size == (32, 32)
    assert np.asarray(result.images[0]).std() > 0


def test_loss_falls_and_every_step_is_logged_once(whole: Path) -> None:
    for stage, steps in (("autoencoder", 6), ("denoiser", 12)):
        table = rows(whole, stage)
        assert [int(row["step"]) for row in table] == list(range(1, steps + 1))
    losses = [float(row["l1"]) for row in rows(whole, "autoencoder")]
    assert losses[-1] < losses[0]


def test_killed_runs_end_as_if_never_killed(
    recipe: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    """kill -9 in the autoencoder, in a save, and in the denoiser: the same weights and losses to the bit."""
    out = tmp_path / "run"

    def kill_when(reached: Callable[[str], bool]) -> bool:
        process = start(recipe, pictures, out)
        while process.poll() is None:
            if reached((tmp_path / "said.txt").read_text(encoding="utf-8")):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.0002)
        return False

    assert kill_when(lambda said: "step autoencoder 3" in said)
    saving = out / "denoiser" / "state"
    kill_when(lambda said: any(saving.glob(".step-*")))
    kill_when(lambda said: "step denoiser 8" in said)
    finish(start(recipe, pictures, out), out)
    expected, found = weights(whole), weights(out)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for stage in ("autoencoder", "denoiser"):
        assert rows(whole, stage) == rows(out, stage)
    assert not list(out.rglob(".step-*"))


def test_two_processes_train_the_same_model(
    recipe: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "run"
    finish(start(recipe, pictures, out, *launcher), out)
    for stage in ("autoencoder", "denoiser"):
        for one, two in zip(rows(whole, stage), rows(out, stage), strict=True):
            assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=2e-3), (stage, one["step"])
    expected, found = weights(whole), weights(out)
    for name, value in expected.items():
        assert torch.allclose(value.float(), found[name].float(), atol=2e-2, rtol=2e-2), name


@pytest.mark.full
def test_two_processes_share_scenes(tmp_path: Path) -> None:
    """Rank 0 renders, measures and encodes while the other waits: both must meet at the same points."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    scenes = RECIPE.replace("[data]", '[data]\nkind = "scenes"\ncount = 16').replace(
        "factor = 8", "factor = 1"
    )
    scenes = scenes.replace("steps = 12", "steps = 2").replace("[denoiser]", "[denoiser]\npatch = 8")
    labelled = "label_classes = [7, 11, 3, 3]\n[denoiser.train]"  # a head that nobody asks, too
    own = tmp_path / "scenes.toml"
    own.write_text(scenes.replace("[denoiser.train]", labelled), encoding="utf-8")
    finish(start(own, "", out, *launcher), out)
    assert [int(row["step"]) for row in rows(out, "denoiser")] == [1, 2]
    assert (out / "autoencoder" / "held-out.json").exists()


def test_words_of_a_run_that_never_saved_are_learnt_anew(
    recipe: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (out / "denoiser").mkdir(parents=True)
    (out / "denoiser" / "words.json").write_text('["other", "recipe"]', encoding="utf-8")
    run(recipe, data=pictures, out=out, device="cpu", overrides={"denoiser.train.steps": 1})
    assert "square" in sfumato.load(out).system.config.words


def test_more_steps_continue_a_finished_run(
    recipe: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(recipe, data=pictures, out=out, device="cpu", overrides={"denoiser.train.steps": 3})
    events = []
    run(
        recipe,
        data=pictures,
        out=out,
        device="cpu",
        on_event=events.append,
        overrides={"denoiser.train.steps": 5},
    )
    assert [event.step for event in events if event.kind == "step" and event.stage == "denoiser"] == [4, 5]
    events.clear()
    run(
        recipe,
        data=pictures,
        out=out,
        device="cpu",
        on_event=events.append,
        overrides={"denoiser.train.steps": 5},
    )
    told = [(event.stage, event.text) for event in events if event.kind == "note"]
    assert ("denoiser", "finished, after 5 steps") in told and not any(
        event.kind == "step" for event in events
    )
    assert any(stage == "autoencoder" and text.startswith("finished, after") for stage, text in told)


def test_another_recipe_does_not_continue_a_run(recipe: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    few = {"autoencoder.train.steps": 2, "denoiser.train.steps": 3}
    run(recipe, data=pictures, out=out, device="cpu", overrides=few)
    with pytest.raises(CheckpointError, match="another recipe"):
        run(recipe, data=pictures, out=out, device="cpu", overrides=few | {"denoiser.train.lr": 0.5})


def test_a_denoiser_starts_from_another_models(
    pictures: Path, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    start_there = {"autoencoder.init": str(whole), "denoiser.init": str(whole), "autoencoder.train.steps": 0}
    out = tmp_path / "run"
    run(recipe, data=pictures, out=out, device="cpu", overrides=start_there | {"denoiser.train.steps": 0})
    expected, found = weights(whole), weights(out)
    for name in (name for name in expected if name.startswith("denoiser")):
        assert torch.equal(expected[name], found[name]), name
    assert sfumato.load(out).system.config.words == sfumato.load(whole).system.config.words
    with pytest.raises(InputError, match=r"denoiser\.width is 128 in the recipe, but .* has 64"):
        wider = {"denoiser.width": 128, "denoiser.heads": 2}
        run(recipe, data=pictures, out=tmp_path / "x", device="cpu", overrides=start_there | wider)


def test_the_pictures_of_a_recipe_can_be_looked_at(recipe: Path, pictures: Path, tmp_path: Path) -> None:
    found = training_pictures(recipe, pictures, 20)
    assert found.shape == (20, 3, 32, 32) and found.min() >= -1 and found.max() <= 1
    own = tmp_path / "scenes.toml"
    own.write_text(RECIPE.replace("[data]", '[data]\nkind = "scenes"\ncount = 16'), encoding="utf-8")
    scenes = SceneSource(16, size=32)
    assert torch.equal(training_pictures(own, None, 3), to_float(scenes.pixels([0, 1, 2]))[:, :, 0])
    with pytest.raises(InputError, match="--data"):
        training_pictures(recipe, None, 3)


def test_a_run_passes_over_a_damaged_checkpoint(
    recipe: Path, pictures: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(recipe, data=pictures, out=out, device="cpu", overrides={"denoiser.train.steps": 6})
    newest = out / "denoiser" / "state" / "step-00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    events = []
    run(
        recipe,
        data=pictures,
        out=out,
        device="cpu",
        on_event=events.append,
        overrides={"denoiser.train.steps": 7},
    )
    assert [event.step for event in events if event.kind == "step" and event.stage == "denoiser"] == [
        4,
        5,
        6,
        7,
    ]


def test_the_pixel_baseline_trains_and_draws(recipe: Path, pictures: Path, tmp_path: Path) -> None:
    overrides = {
        "autoencoder.factor": 1,
        "denoiser.patch": 8,
        "denoiser.prediction": "x",
        "denoiser.loss.weighting": "flow",
        "denoiser.train.steps": 3,
    }
    out = run(recipe, data=pictures, out=tmp_path / "run", device="cpu", overrides=overrides)
    model = sfumato.load(out)
    assert model.generate(sfumato.Request("a red square")).images[0].size == (32, 32)
    picture = Image.open(next(iter(pictures.glob("*.png"))))
    rebuilt = model.decode(model.encode(picture))[0]
    assert np.abs(np.asarray(picture, int) - np.asarray(rebuilt, int)).max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"denoiser.train.stepz": 3}, "unknown key 'denoiser.train.stepz'"),
        ({"denoiser.train.batch": "x"}, "denoiser.train.batch must be int"),
        ({"denoiser.train.batch": 9}, "multiple of microbatch"),
        ({"denoiser.train.optimizer": "sgd"}, "adamw or muon"),
        ({"data.kind": "tar"}, "folder or scenes"),
        ({"autoencoder.factor": 3}, "factor"),
        ({"seed": True}, "seed must be int"),
    ],
)
def test_bad_recipes_are_refused_by_name(recipe: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_recipe(recipe, change)


def test_a_recipe_that_trains_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to train"):
        parse_recipe({"name": "x", "data": {}})


def test_a_missing_or_broken_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = = 1", encoding="utf-8")
    with pytest.raises(InputError, match="not a readable TOML"):
        read_recipe(tmp_path / "broken.toml")
