"""The parts of a run: where its pictures come from, what is said of the autoencoder, what the logs hold."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sfumato.autoencoder import Autoencoder
from sfumato.data.folder import FolderSource
from sfumato.data.scenes import SceneSource
from sfumato.errors import InputError
from sfumato.train import stages
from sfumato.train.job import multiple_of, source_of, training_pictures, with_data
from sfumato.train.recipe import Recipe, parse_recipe, read_recipe
from sfumato.train.stages import ModelJob
from sfumato.train.state import tensorboard

SCENES = {"kind": "scenes", "count": 8, "size": 32}
SMALL = {"encoder_width": 32, "decoder_width": 32, "max_width": 32}


def recipe_of(data: dict[str, object], **tables: object) -> Recipe:
    return parse_recipe({"name": "x", "data": data, "autoencoder": SMALL, **tables})


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Four pictures of 40 × 24 pixels in a folder."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (40, 24), (60 * k, 0, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("red", encoding="utf-8")
    return folder


def test_a_named_folder_stands_in_for_scenes(wide: Path) -> None:
    scenes = recipe_of(SCENES)
    assert with_data(scenes, None) is scenes
    assert isinstance(source_of(scenes, 8), SceneSource)
    source = source_of(with_data(scenes, wide), 8)
    assert isinstance(source, FolderSource) and len(source) == 4
    with pytest.raises(InputError, match="--data"):
        source_of(recipe_of({}), 8)


def test_pictures_looked_at_are_those_trained_on(wide: Path, tmp_path: Path) -> None:
    """The folder given, and in the shape that the model's cells allow: sides of 8 pixels times a patch of 2."""
    path = tmp_path / "scenes.toml"
    path.write_text(
        '[data]\nkind = "scenes"\ncount = 8\nsize = 32\n'
        "[autoencoder]\nfactor = 8\n[denoiser]\npatch = 2\n[preset]\nsize = [32, 32]\n",
        encoding="utf-8",
    )
    found = training_pictures(path, wide, 3)
    assert len(found) == 3 and found.shape[2] % 16 == found.shape[3] % 16 == 0
    assert found[:, 1:].max() == -1  # red squares on nothing, and no scene
    own = read_recipe(path)
    assert multiple_of(own) == 16
    trained = source_of(with_data(own, wide), 16)
    assert found.shape[2:] == max(trained.buckets(), key=lambda size: len(trained.buckets()[size]))


def test_the_pictures_measured_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LATENT_STATISTICS_PICTURES", 4)
    recipe, told = recipe_of(SCENES), []
    run = ModelJob(recipe, tmp_path, torch.device("cpu"), told.append)
    run._measure(Autoencoder(recipe.autoencoder.model).eval(), SceneSource(8, size=32), tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["pictures"] == 4
    assert "(4 pictures)" in told[0].text


def test_tensorboard_is_closed_and_forgets_what_a_kill_undid(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = ModelJob(recipe_of(SCENES, log="tensorboard"), tmp_path, torch.device("cpu"), lambda event: None)
    others = set(threading.enumerate())
    for steps, loss in (
        ((1, 2, 3), 1.0),
        ((3, 4), 9.0),
    ):  # killed after step 3, continued from the end of step 2
        with tensorboard(run.recipe.log, run.world.leads, tmp_path) as log:
            for step in steps:
                log(step, {"loss": loss})
        assert {
            thread for thread in threading.enumerate() if thread.is_alive()
        } <= others  # the writer's own is gone
        time.sleep(1.1)  # files are named by the second and read in the order of their names
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 9.0),
        (4, 9.0),
    ]


def test_a_run_without_tensorboard_has_no_logger(tmp_path: Path) -> None:
    run = ModelJob(recipe_of(SCENES), tmp_path, torch.device("cpu"), lambda event: None)
    with tensorboard(run.recipe.log, run.world.leads, tmp_path) as log:
        assert log is None
    assert list(tmp_path.iterdir()) == []
