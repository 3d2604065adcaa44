"""`sfumato generate --control`: what it takes, what it refuses in one line, and that `--like` brings it back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import small_control as small
from helpers import noise
from sfumato.cli import controls
from sfumato.cli.app import run
from sfumato.errors import CheckpointError, InputError
from sfumato.families.control import require_control
from sfumato.receipts.provenance import read_recipe
from small_sd import stand_for_the_published, write

LIGHT = ["--steps", "2", "--size", "32", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _a_small_model_with_pictures_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_for_the_published(monkeypatch)
    write("sd1", Path("m"))
    small.file(Path("canny.safetensors"), "sd1")
    noise(32, 32, seed=1).save("edges.png")
    noise(32, 32, seed=2).save("photo:1.png")


def draw(*arguments: str, out: str = "out.png") -> np.ndarray:
    assert run(["generate", "a cat", "-m", "m", *LIGHT, *arguments, "-o", out]) == 0
    return np.asarray(Image.open(out))


def refused(capsys, *arguments: str) -> str:
    assert run(["generate", "a cat", "-m", "m", *LIGHT, *arguments, "-o", "out.png"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


NET = ["--controlnet", "canny=canny.safetensors"]


def test_a_control_picture_changes_the_drawing_and_like_brings_it_back():
    bare = draw(out="bare.png")
    drawn = draw(*NET, "--control", "canny=photo:1.png:0.8:0-0.5", "--guess")
    assert not np.array_equal(drawn, bare)
    (said,) = read_recipe("out.png")["request"]["controls"]
    assert {k: said[k] for k in said if k != "image"} == {
        "name": "canny", "weight": 0.8, "end": 0.5, "prepare": "canny", "guess": True,
    }  # fmt: skip
    same = ["generate", "--like", "out.png", "-m", "m", "--dtype", "fp32", *NET, "-o", "again.png"]
    assert run([*same, "--control", "canny=photo:1.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), drawn)
    assert run([*same, "--control", "none"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), bare)


def test_replay_takes_no_embedding_for_a_control(capsys):
    draw(*NET, "--control", "canny=edges.png")
    told = ["replay", "out.png", "-m", "m", "--picture", "edges.png", "--embedding", "canny=x.safetensors"]
    assert run([*told, *NET]) == 2
    assert "the recipe has no embedding 'canny': it has none" in capsys.readouterr().err


def test_like_wants_the_control_picture_and_notes_another_network(capsys):
    draw(*NET, "--control", "canny=edges.png")
    assert "give it, or a new one, by --control canny=FILE" in refused(capsys, *NET, "--like", "out.png")
    small.file(Path("other.safetensors"), "sd1", seed=10)
    other = ["--controlnet", "canny=other.safetensors", "--control", "canny=edges.png"]
    assert (
        run(["generate", "--like", "out.png", "-m", "m", "--dtype", "fp32", *other, "-o", "again.png"]) == 0
    )
    assert "drawn with another ControlNet 'canny'" in capsys.readouterr().err


def test_a_ready_picture_is_taken_as_it_is():
    plain = draw(*NET, "--control", "canny=edges.png")
    ready = draw(*NET, "--control", "canny=edges.png", "--control-ready", "canny")
    assert not np.array_equal(plain, ready)
    assert "prepare" not in read_recipe("out.png")["request"]["controls"][0]


def test_other_kinds_are_taken_as_they_are_and_two_act():
    small.file(Path("depth.safetensors"), "sd1", seed=10)
    both = [*NET, "--controlnet", "depth=depth.safetensors", "--control", "canny=edges.png"]
    one = draw(*both)
    two = draw(*both, "--control", "depth=edges.png:0.5")
    assert not np.array_equal(one, two)
    assert [c.get("prepare") for c in read_recipe("out.png")["request"]["controls"]] == ["canny", None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--control", "canny"], "control must be KIND=IMAGE[:WEIGHT[:START-END]], not 'canny'"),
        (["--control", "canny=edges.png:x"], "control canny's weight must be a number, not 'x'"),
        (["--control", "canny=edges.png:nan"], "control canny's weight must be between 0 and 10, not NaN"),
        (["--control", "canny=edges.png:1:0.8-0.2"], "control canny starts at 0.8, after its end at 0.2"),
        (["--control", "canny=edges.png:1:0.8"], "control canny's steps must be like 0-0.6"),
        (["--control", "canny=none-such.png:0.5"], "'none-such.png' does not exist"),
        (["--control", "pose=edges.png"], 'this model has no ControlNet "pose": it has canny'),
        (["--control-ready", "canny"], "control-ready names 'canny', which no --control gives"),
        (["--guess"], "guess goes with --control"),
        (["--controlnet", "canny=edges.png"], "controlnet gives 'canny' twice"),
        (["--annotator", "depth=gone"], "annotator 'gone' does not exist; give a folder or org/name"),
        (["--lora-partial"], "--lora-partial goes with --lora FILE"),
        (["--controlnet", "depth=gone.safetensors"], "controlnet 'gone.safetensors' does not exist"),
        (["--controlnet", "pose=edges.png"], "safetensors"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys, arguments, words):
    assert words in refused(capsys, *NET, *arguments)


def test_pictures_and_files_that_cannot_be_used_are_one_line(capsys):
    noise(48, 32).save("wide.png")
    assert "control canny is 48x32, of another shape" in refused(capsys, *NET, "--control", "canny=wide.png")
    draw(*NET, "--control", "canny=wide.png", "--fit", "contain")
    Path("cut.png").write_bytes(Path("edges.png").read_bytes()[:-40])
    assert "'cut.png' is cut short" in refused(capsys, *NET, "--control", "canny=cut.png")
    whole = Path("canny.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-40])
    assert "cut.safetensors" in refused(capsys, "--controlnet", "canny=cut.safetensors")
    small.file(Path("two.safetensors"), "sd2", dtype=torch.float16)
    assert "is a ControlNet of sd2" in refused(capsys, "--controlnet", "canny=two.safetensors")
    Path("pickled.ckpt").write_bytes(b"\x80\x02")
    assert "pickled" in refused(capsys, "--controlnet", "canny=pickled.ckpt")


def test_what_does_nothing_is_said(capsys):
    bare = draw(out="bare.png")
    assert np.array_equal(draw(*NET), bare)
    assert "note: the ControlNet canny does nothing without its picture" in capsys.readouterr().err
    idle = draw(*NET, "--control", "canny=edges.png:1:0.6-0.9", "--control-ready", "canny")
    assert np.array_equal(idle, bare)
    said = capsys.readouterr().err
    assert "note: control canny does nothing: none of the 2 steps lies between 0.6 and 0.9" in said
    draw(*NET, "--control", "canny=edges.png", "--control-ready", "canny")
    assert not capsys.readouterr().err


def test_controlnets_of_other_families_are_told_by_name(capsys):
    save_file(
        {"pos_embed_input.proj.weight": torch.ones(1), "controlnet_blocks.0.weight": torch.ones(1)},
        "three.safetensors",
    )
    said = refused(capsys, "--controlnet", "canny=three.safetensors")
    assert "is a ControlNet for Stable Diffusion 3; this model is Stable Diffusion 1" in said
    card = {"control": '{"format": "sfumato control 1"}'}
    save_file({"blocks.0.weight": torch.ones(1)}, "ours.safetensors", metadata=card)
    assert "is a ControlNet for pocket; this" in refused(capsys, "--controlnet", "canny=ours.safetensors")
    with pytest.raises(InputError, match=r"for Stable Diffusion 1.*this model is pocket"):
        require_control(Path("canny.safetensors"), "pocket", "pocket")
    Path("folder").mkdir()
    Path("canny.safetensors").rename("folder/diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"folder is a ControlNet for Stable Diffusion 1.*is pocket"):
        require_control(Path("folder"), "pocket", "pocket")
    key = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{key}.lora_up.weight": torch.ones(2, 1)}, "ink.safetensors")
    with pytest.raises(CheckpointError, match="is a LoRA, not a ControlNet; give it by `loras`"):
        require_control(Path("ink.safetensors"), "pocket", "pocket")


def test_a_tensor_that_is_missing_is_named(capsys):
    tensors = load_file("canny.safetensors")
    name = "controlnet_cond_embedding.blocks.0.weight"
    save_file({key: tensors[key] for key in tensors if key != name}, "less.safetensors")
    assert f"lacks {name}" in refused(capsys, "--controlnet", "canny=less.safetensors")


def test_a_controlnet_is_no_model(capsys):
    assert run(["generate", "a cat", "-m", "canny.safetensors", "-o", "out.png"]) == 2
    assert "a ControlNet; it belongs on a model (--controlnet KIND=FILE)" in capsys.readouterr().err


def test_a_file_with_colons_in_its_name_is_found():
    (one,) = controls.given(["canny=photo:1.png"])
    assert (one.file, dict(one.values)) == ("photo:1.png", {})
    (one,) = controls.given(["canny=photo:1.png:0.5:0.1-0.9"])
    assert (one.file, dict(one.values)) == ("photo:1.png", {"weight": 0.5, "start": 0.1, "end": 0.9})


def test_a_controlnet_of_the_hub(tmp_path, monkeypatch, capsys):
    """From the cache alone, as `-m` reads it; what is not there is named with the command that fetches it."""
    from huggingface_hub import constants

    cache, commit = tmp_path / "cache", "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    place = cache / "models--org--edges"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    Path("canny.safetensors").rename(snapshot / "edges.safetensors")
    drawn = draw("--controlnet", "canny=org/edges", "--control", "canny=edges.png")
    small.file(Path("canny.safetensors"), "sd1")
    assert np.array_equal(drawn, draw(*NET, "--control", "canny=edges.png"))
    said = refused(capsys, "--controlnet", "canny=org/gone", "--control", "canny=edges.png")
    assert "org/gone is not in the cache" in said and "hf download org/gone" in said
