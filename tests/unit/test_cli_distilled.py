"""How a checkpoint is drawn that says, or of which something says, what it was made for: few steps, other noise."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drawn_small import again, draw, refused
from sfumato import load
from sfumato.cli.app import run
from sfumato.diffusion.schedules import beta_levels, beta_table, sigmas_for
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.convert import write_file
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.receipts.provenance import read_recipe
from small_sd import places_in, stand_for_the_published, write


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return places_in(tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def _small_kinds_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_for_the_published(monkeypatch)


def test_how_distilled_models_draw_when_nothing_is_said(tmp_path):
    def preset(name, kind, **scheduler):
        return load(write(kind, tmp_path / name, **scheduler))

    told = preset("lcm", "sd1-lcm")
    assert told.preset == {"steps": 4, "guidance": 8.0, "sampler": "lcm", "schedule": "lcm", "size": (64, 64)}
    assert told.system.config.distilled == "lcm" and told.system.parameterization.boundary is not None
    fused = preset("fused", "sd1", _class_name="LCMScheduler")
    assert fused.preset["guidance"] == 1.0 and fused.preset["schedule"] == "lcm"
    turbo = preset(
        "turbo", "sdxl", _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing"
    )
    assert turbo.preset == {
        "steps": 1, "guidance": 1.0, "sampler": "euler_a", "schedule": "trailing", "size": (64, 64),
    }  # fmt: skip
    assert preset("turbo2", "sd2", timestep_spacing="trailing").preset["steps"] == 1
    lightning = preset("lightning", "sdxl", timestep_spacing="trailing")
    assert lightning.preset["steps"] == 4 and lightning.preset["sampler"] == "euler"
    assert lightning.system.config.guessed == "timestep_spacing: trailing"
    plain = preset("plain", "sd1")
    assert plain.preset["steps"] == 25 and plain.system.parameterization.boundary is None
    for name, kind, prediction in (
        ("v", "sdxl", "v_prediction"),
        ("v2", "sd2", "v_prediction"),
        ("one", "sd1", "epsilon"),
    ):
        other = preset(name, kind, timestep_spacing="trailing", prediction_type=prediction)
        assert other.preset["steps"] == 25 and other.preset["guidance"] > 1


def test_each_kind_has_its_own_aligned_steps(tmp_path):
    firsts = {"sd1": 6.475, "sdxl": 6.315}
    for kind, second in firsts.items():
        levels = load(write(kind, tmp_path / kind)).system.levels
        assert float(sigmas_for("ays", 10, levels)[1]) == pytest.approx(second)
    levels = load(
        write("sdxl", tmp_path / "zero", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ).system.levels
    with pytest.raises(InputError, match="use karras"):
        sigmas_for("ays", 10, levels)


def single(place: Path | str, to: Path, **metadata: str) -> str:
    """The folder at `place` as a single file with these notes in its header."""
    found = open_checkpoint(place)
    write_file(replace(found, metadata=metadata), to)
    return str(to)


def test_a_file_is_drawn_as_its_notes_call_it(places, tmp_path, capsys):
    notes = {
        "lcm": {"modelspec.title": "Some Model (LCM merged)"},
        "turbo": {"modelspec.title": "sd_xl_turbo_1.0"},
        "lightning": {"modelspec.title": "A Model", "modelspec.tags": "photo, Lightning"},
    }
    for name, metadata in notes.items():
        model = load(single(places("sdxl"), tmp_path / f"{name}.safetensors", **metadata))
        assert model.preset["guidance"] == 1.0 and model.preset["steps"] == (1 if name == "turbo" else 4)
        assert model.system.read_as["preset"] == name
        assert (model.system.parameterization.boundary is not None) == (name == "lcm")
    assert model.preset["sampler"] == "euler" and model.preset["schedule"] == "trailing"
    for metadata in ({"modelspec.title": "Turbine"}, {"modelspec.title": "Turbo, not Lightning"}, {}):
        model = load(single(places("sdxl"), tmp_path / "plain.safetensors", **metadata))
        assert model.preset["steps"] == 25 and model.system.read_as["preset"] == "plain"
        (tmp_path / "plain.safetensors").unlink()
    file = str(tmp_path / "lcm.safetensors")
    draw(file)
    assert "drawn as lcm, guessed from 'Some Model (LCM merged)'" in capsys.readouterr().err
    draw(file, "--preset", "plain")
    assert capsys.readouterr().err == ""


def test_a_preset_is_said_and_comes_back(places, capsys):
    model = places("sd1")
    plain = draw(model)
    said = draw(model, "--preset", "lcm")
    recipe = read_recipe("out.png")
    assert (recipe["request"]["sampler"], recipe["request"]["schedule"]) == ("lcm", "lcm")
    assert recipe["read_as"] == {"prediction": "epsilon", "preset": "lcm"} and (said != plain).any()
    assert (again(model, "--preset", "lcm") == said).all() and capsys.readouterr().err == ""
    again(model)
    assert "with the preset 'lcm' and not 'plain'; give it by --preset" in capsys.readouterr().err
    assert "known are plain, lcm, turbo, lightning" in refused(capsys, "a", "-m", model, "--preset", "fast")
    assert "preset is for checkpoints" in refused(capsys, "a", "-m", "pocket", "--preset", "lcm")


def test_an_lcm_is_told_the_guidance_it_is_asked_for(places):
    model = places("sd1-lcm")
    weak, strong = draw(model, "--guidance", "2"), draw(model, "--guidance", "9")
    assert (weak != strong).any() and (again(model) == strong).all()
    assert json.loads(json.dumps(read_recipe("out.png")["request"]))["schedule"] == "lcm"


def test_the_noise_levels_are_those_that_the_scheduler_says(tmp_path, capsys):
    place = write("sd1", tmp_path / "own", beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    model = load(place)
    assert torch.equal(model.system.levels.sigmas, beta_levels(beta_table("linear", 0.0001, 0.02)).sigmas)
    assert model.system.levels.aligned == ()
    assert run(["convert", str(place), str(tmp_path / "one.safetensors")]) == 2
    assert "its scheduler has betas of its own" in capsys.readouterr().err
    for name, value, message in (
        ("beta_start", "x", "beta_start and beta_end must rise between 0 and 1, not 'x' and 0.012"),
        ("beta_end", 0.0001, "not 0.00085 and 0.0001"),
        ("beta_schedule", "sigmoid", "the beta_schedule 'sigmoid'; known are scaled_linear, linear"),
        ("trained_betas", [0.1, 0.2], "has trained_betas of its own"),
        ("num_train_timesteps", 50, "num_train_timesteps must be 1000, not 50"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load(write("sd1", tmp_path / name, **{name: value}))
