"""Recipes are checked before anything runs: each impossible value is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.errors import InputError
from sfumato.train import run
from sfumato.train.job import data_identity, source_of
from sfumato.train.recipe import parse_recipe, read_recipe

WEIGHTS = ("l1", "gradient", "haar", "spectral", "kl", "equivariance", "adversarial")
STAGES = {"data": {"path": "x"}, "autoencoder": {}, "denoiser": {}}


def parsed(change: dict[str, object]):
    values = {"name": "x"} | {stage: dict(table) for stage, table in STAGES.items()}
    for key, value in change.items():
        *parents, last = key.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return parse_recipe(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("log", "paper"),
        ("autoencoder.train.microbatch", -2),
        ("autoencoder.train.crop", -8),
        ("denoiser.train.precision", "int32"),
        ("denoiser.train.lr", -1e-3),
        ("denoiser.train.lr", float("nan")),
        ("denoiser.train.ema", 1.5),
        ("denoiser.train.betas", [0.9]),
        ("denoiser.train.betas", [0.9, 1.0]),
        ("denoiser.train.steps", -1),
        ("denoiser.train.save_every", 0),
        ("denoiser.loss.density", "normal"),
        ("denoiser.loss.weighting", "heavy"),
        ("denoiser.loss.shift", 0.0),
        ("denoiser.loss.drop_prompt", -0.1),
        ("denoiser.loss.drop_prompt", 1.5),
        ("denoiser.train.clip", 0.0),
        ("autoencoder.train.clip", -1.0),
        ("autoencoder.train.optimizer", "muon"),
        *((f"autoencoder.loss.{weight}", -0.1) for weight in WEIGHTS),
        ("autoencoder.loss.gradient_scales", 0),
        ("autoencoder.loss.spectral_block", 0),
        ("autoencoder.loss.equivariance_scales", [2, 0]),
        ("autoencoder.loss.equivariance_share", 0.0),
        ("autoencoder.loss.equivariance_share", 1.5),
        ("autoencoder.loss.adversarial_limit", -1.0),
        ("denoiser.prediction", "eps"),
    ],
)
def test_a_value_that_cannot_work_is_named(key: str, value: object) -> None:
    parsed({})
    with pytest.raises(InputError) as caught:
        parsed({key: value})
    assert key.rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_need_their_classes() -> None:
    parsed({"denoiser.loss.labels": 0.1, "denoiser.label_classes": [7, 11, 3, 3]})
    with pytest.raises(InputError, match="label_classes"):
        parsed({"denoiser.loss.labels": 0.1})


def test_microbatches_make_up_the_batch() -> None:
    train = parsed({"denoiser.train.batch": 12, "denoiser.train.microbatch": 4}).denoiser.train
    assert train.parts == 3
    assert parsed({"denoiser.train.batch": 12}).denoiser.train.parts == 1


def test_a_size_that_the_model_cannot_draw_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = parsed({"denoiser.patch": 2, "preset.size": [128, 120]})
    with pytest.raises(InputError, match="multiple of 32"):
        run(recipe, out=tmp_path / "run", device="cpu")


def test_overrides_belong_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="overrides"):
        run(parsed({}), out=tmp_path / "run", device="cpu", overrides={"seed": 1})


def test_what_is_no_recipe_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "bytes.toml", "a\0b.toml"):
        with pytest.raises(InputError):
            read_recipe(path)


def test_objects_of_scenes_are_asked_for_and_change_no_run_that_does_not():
    tables = {"name": "a", "data": {"kind": "scenes", "count": 3, "size": 32}, "autoencoder": {"factor": 1}}
    plain = parse_recipe(tables)
    assert "objects" not in data_identity(plain.data)
    few = parse_recipe({**tables, "data": {**tables["data"], "objects": [1, 1]}})
    assert data_identity(few.data)["objects"] == (1, 1)
    assert {len(source_of(few, 1).scene(i).objects) for i in range(3)} == {1}
    for wrong in ([0, 2], [3, 2], [1, 6], [2]):
        with pytest.raises(InputError, match=r"data\.objects"):
            parse_recipe({**tables, "data": {**tables["data"], "objects": wrong}})
