"""The catalogue of hostile weights through the command line: one line, exit 2, no file, whichever option names it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hostile_weights import HOSTILE, entry, file_of
from sfumato.cli.app import run
from sfumato.families.published.convert import write_file
from sfumato.families.sd.checkpoint import open_checkpoint
from sfumato.families.sd.shapes import SYSTEMS
from small_sd import SMALL, write

LIGHT = ["--steps", "1", "--size", "32", "--dtype", "fp32"]
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small model as a single file and as a folder."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, system in SMALL.items():
            patch.setitem(SYSTEMS, kind, system)
        place = tmp_path_factory.mktemp("sound")
        write("sd1", place / "model")
        write_file(open_checkpoint(place / "model"), place / "model.safetensors")
        yield place


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """The one line said of a drawing that exits with 2, and leaves nothing but what was there."""
    before = sorted(os.listdir())
    assert run(["generate", "a", *LIGHT, *arguments, "-o", "out.png"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert len(err) < 2000 and err.strip().isprintable()
    assert sorted(os.listdir()) == before
    return err


@pytest.mark.parametrize("option", ["-m", "--vae", "--embedding", "--refiner"])
@pytest.mark.parametrize(
    "case",
    [
        "empty",
        "header over 100 MB",
        "header of 2^63",
        "overlap",
        "gap",
        "shape is not bytes",
        "shape overflows",
        "truncated",
        "trailing data",
        "duplicate tensors",
    ],
)
def test_hostile_files(sound, capsys, case, option):
    Path("bad.safetensors").write_bytes(HOSTILE[case][0])
    model = [] if option == "-m" else ["-m", str(sound / "model.safetensors")]
    assert "bad.safetensors" in refused(capsys, *model, option, "bad.safetensors")


@pytest.mark.full
def test_a_hundred_thousand_tensors(sound, capsys):
    Path("many.safetensors").write_bytes(file_of({f"t{i}": entry([0], 0, 0) for i in range(100_000)}))
    assert "many.safetensors is of no known kind" in refused(capsys, "-m", "many.safetensors")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin", "x.pt"])
def test_pickles_are_refused_with_what_to_do(sound, capsys, name):
    torch.save({"a": torch.zeros(3)}, "x.zip")
    os.rename("x.zip", name)
    line = refused(capsys, "-m", name)
    assert "safetensors" in line and ("pickle" in line or "PyTorch" in line or "ZIP" in line)
    assert name in refused(capsys, "-m", str(sound / "model"), "--vae", name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        f"{UNET}input_blocks.1.0.in_layers.2.weight",
        "first_stage_model.decoder.conv_in.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
@pytest.mark.parametrize("offload", ["none", "sequential"])
def test_a_number_that_is_none_is_named_with_its_tensor(sound, capsys, value, name, offload):
    tensors = load_file(sound / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, "bad.safetensors")
    line = refused(capsys, "-m", "bad.safetensors", "--offload", offload)
    assert f": {name} " in line and ("NaN" in line or "infinite" in line or "infinity" in line)


def test_missing_keys_are_listed_to_the_tenth(sound, capsys):
    tensors = load_file(sound / "model.safetensors")
    lost = sorted(name for name in tensors if ".output_blocks." in name and name.endswith(".bias"))[:25]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, "bad.safetensors")
    line = refused(capsys, "-m", "bad.safetensors")
    assert sum(name in line for name in lost) == 10 and "25 missing" in line and "and 15 more" in line
    assert "bad.safetensors" in line


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (f"{UNET}input_blocks.1.0.in_layers.2.weight", lambda t: t[:-1], "(31, 32, 3, 3)"),
        (f"{UNET}input_blocks.1.0.in_layers.2.weight", lambda t: t.to(torch.int32), "int32"),
        ("first_stage_model.decoder.conv_in.bias", lambda t: t[None], "(1, 64)"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", lambda t: t.bool(), "bool"),
    ],
)
def test_a_wrong_shape_or_type_is_named(sound, capsys, name, change, said):
    tensors = load_file(sound / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, "bad.safetensors")
    line = refused(capsys, "-m", "bad.safetensors")
    assert said in line and name.rpartition(".")[2] in line


def folder(sound: Path) -> Path:
    shutil.copytree(sound / "model", "model")
    return Path("model")


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/hostname", "a/b.safetensors"])
def test_an_index_stays_in_its_folder(sound, capsys, shard):
    unet = folder(sound) / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (unet / f"{weights.name}.index.json").write_text(json.dumps(index))
    assert "lies outside the folder" in refused(capsys, "-m", "model")


def test_a_shard_that_is_not_there_is_named(sound, capsys):
    unet = folder(sound) / "unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    os.rename(weights, unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    second = "diffusion_pytorch_model-00002-of-00002.safetensors"
    first = second.replace("00002-of", "00001-of")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, first) | {names[-1]: second}}
    (unet / f"{weights.name}.index.json").write_text(json.dumps(index))
    assert second in refused(capsys, "-m", "model")


def test_a_config_that_asks_for_code_is_refused(sound, capsys):
    config = folder(sound) / "unet" / "config.json"
    asked = json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    config.write_text(json.dumps(asked))
    Path("model/unet/evil.py").write_text("open('ran', 'w')")
    line = refused(capsys, "-m", "model")
    assert "code" in line and not Path("ran").exists()
