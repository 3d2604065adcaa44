"""What the command line says to what people write: names nearly right, empty ones, options of others."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from safetensors.torch import save_file

import small_sd
from helpers import tiny_folder
from sfumato.checkpoint.header import read_header
from sfumato.cli.app import build, run
from sfumato.cli.fields import in_words, option_of
from sfumato.errors import InputError
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.receipts.provenance import read_recipe
from sfumato.storage import load_tensors
from sfumato.wording import worded

LIGHT = ["--size", "32", "--steps", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("tiny") / "m"))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory) -> str:
    """A Stable Diffusion whose scheduler says that it is a Turbo."""
    said = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    return str(small_sd.write("sd1", tmp_path_factory.mktemp("sd") / "m", **said))


@pytest.fixture(autouse=True)
def _small_kinds_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SYSTEMS, "sd1", small_sd.SMALL["sd1"])


def refused(capsys, *arguments: str) -> str:
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("given", "sampler", "schedule"),
    [
        (["--sampler", "DPM++ 2M"], "dpmpp_2m", None),
        (["--sampler", "DPM++ 2M Karras"], "dpmpp_2m", "karras"),
        (["--sampler", "Euler a", "--schedule", "SGM Uniform"], "euler_a", "sgm_uniform"),
    ],
)
def test_labels_of_web_uis_are_names(tiny, given, sampler, schedule):
    assert run(["generate", "x", "-m", tiny, *LIGHT, *given]) == 0
    request = read_recipe("out.png")["request"]
    assert request["sampler"] == sampler and schedule in (None, request["schedule"])


def test_a_name_nearly_right(tiny, capsys):
    asked = "generate", "x", "-m", tiny, *LIGHT
    assert '"dpmp_2m" is unknown, did you mean dpmpp_2m?; use' in refused(
        capsys, *asked, "--sampler", "dpmp_2m"
    )
    assert '"karas" is unknown, did you mean karras?; use' in refused(capsys, *asked, "--schedule", "karas")
    assert '"zzz" is unknown; use one of' in refused(capsys, *asked, "--sampler", "zzz")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "-m", ""], "the model's name is empty"),
        (["generate", "x", "--refiner", ""], "--refiner is empty"),
        (["generate", "x", "--image", ""], "--image is empty"),
        (["generate", "x", "--parts", ""], "--parts is empty"),
        (["inspect", ""], "a path is empty"),
        (["convert", "x", ""], "a path is empty"),
    ],
)
def test_what_is_empty(arguments, said, capsys):
    assert f"error: {said}" in refused(capsys, *arguments)


def test_only_the_field_that_is_wrong_is_called_as_its_option(capsys):
    said = refused(capsys, "generate", "x", "--image", "found by image.png")
    assert "image 'found by image.png' does not exist" in said
    wrong = InputError("clip_skip must be 1, and clip_skip by frames", argument="clip_skip")
    assert words(wrong, clip_skip="--clip-skip") == "--clip-skip must be 1, and clip_skip by frames"
    assert words(wrong, frames="--frames") == str(wrong)
    other = InputError("clip_skip must be 1", argument="model")
    assert words(other, clip_skip="--clip-skip", model="--model") == str(other)


def words(error, **options):
    return worded(str(error), error.argument, lambda field: option_of(field, options))


def test_notes_name_the_options_of_the_verb():
    context = typer.Context(typer.main.get_command(build()).commands["generate"])
    note = "say others by `clip_skip` or `steps`; take the rest with `partial`, or `frames`"
    said = "say others by --clip-skip or --steps; take the rest with --lora-partial, or `frames`"
    assert in_words(note, context) == said


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert "holds neither model.json nor model_index.json" in refused(capsys, "generate", "x", "-m", ".")


def test_options_of_another_family(turbo, capsys):
    said = refused(capsys, "generate", "x", "-m", turbo, "--no-t5", "--no-clip-g")
    assert "error: --without t5 and --without clip_g is for checkpoints of the family sd3 (" in said
    assert said.endswith("is of sd1: leave it out")
    said = refused(capsys, "generate", "x", "-m", turbo, "--text-dtype", "bf16")
    assert "error: --text-dtype is for checkpoints of the family sd3 (" in said


def test_less_memory_than_the_program_takes(turbo, capsys):
    said = refused(capsys, "generate", "x", "-m", turbo, "--memory", "10MB")
    assert "the program alone, before it has read a model, takes" in said and "smaller model" not in said


@pytest.mark.parametrize("name", ["t.ckpt", "t.png", "t.safetensor"])
def test_a_folder_is_not_called_like_a_file(turbo, name, tmp_path, capsys):
    assert "a file must end in .safetensors" in refused(capsys, "convert", turbo, name)
    assert not (tmp_path / name).exists()


def test_a_file_says_that_it_is_a_turbo(turbo, capsys):
    """And a folder that is made of that file says it again."""
    assert run(["convert", turbo, "t.safetensors"]) == 0
    assert read_header("t.safetensors").metadata["modelspec.tags"] == "turbo"
    assert run(["generate", "x", "-m", "t.safetensors", "--size", "32"]) == 0
    recipe = read_recipe("out.png")
    assert recipe["read_as"]["preset"] == "turbo" and recipe["request"]["steps"] == 1
    assert run(["convert", "t.safetensors", "back"]) == 0
    with open("back/scheduler/scheduler_config.json") as file:
        assert json.load(file)["timestep_spacing"] == "trailing"
    assert run(["convert", "back", "again.safetensors"]) == 0
    assert read_header("again.safetensors").metadata["modelspec.tags"] == "turbo"


def test_a_unet_alone_under_original_names(turbo, capsys):
    assert run(["convert", turbo, "whole.safetensors"]) == 0
    unet = {
        k: v for k, v in load_tensors("whole.safetensors").items() if k.startswith("model.diffusion_model.")
    }
    save_file(unet, "unet.safetensors")
    capsys.readouterr()
    assert "--parts" in refused(capsys, "generate", "x", "-m", "unet.safetensors")


def test_conversion_names_the_file_that_is_damaged(turbo, capsys):
    assert run(["convert", turbo, "whole.safetensors"]) == 0
    tensors = load_tensors("whole.safetensors")
    tensors["model.diffusion_model.out.2.bias"][0] = torch.nan
    save_file(tensors, "nan.safetensors")
    capsys.readouterr()
    name = "model.diffusion_model.out.2.bias"  # the file's own
    said = refused(capsys, "convert", "nan.safetensors", "folder")
    assert f"error: nan.safetensors: tensor '{name}' holds NaN" in said
    said = refused(capsys, "generate", "x", "-m", "nan.safetensors", "--size", "32")
    assert f"error: nan.safetensors (unet): {name} holds NaN" in said


def test_help_shows_what_to_install(capsys):
    for verb in ("generate", "serve"):
        assert run([verb, "--help"]) == 0
        assert "sfumato[cluster]" in "".join(capsys.readouterr().out.split("│")).replace("\n", "").replace(
            " ", ""
        )
