"""`sfumato convert` with a real VAE's names and sizes, in eight-bit floats: what it writes, says and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.checkpoint.writer import write_tensors
from sfumato.cli import convert
from sfumato.cli.app import VERBS, run
from sfumato.families.sd import keys


@pytest.fixture(autouse=True)
def _the_verb_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(VERBS, "convert", (convert.convert, convert.EXAMPLE))


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """A VAE alone, as they are published: original names without a prefix."""
    with torch.device("meta"):
        state = AutoencoderKL(KLConfig()).state_dict()
    ours = {
        name: torch.full(tensor.shape, n / 256).to(torch.float8_e4m3fn)
        for n, (name, tensor) in enumerate(state.items())
    }
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    write_tensors(path, keys.vae_map(KLConfig()).to_theirs(ours))
    return str(path)


def test_to_a_folder_and_back_is_the_same_file(vae, tmp_path, capsys):
    assert run(["convert", vae, "folder", "--kind", "sdxl"]) == 0
    out, err = capsys.readouterr()
    assert out == "folder: sdxl, 0.08 GB; tensors: vae 248\n" and err == ""
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 0.13025)
    assert "decoder.up_blocks.0.resnets.0.conv1.weight" in load_file(
        tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    )
    assert run(["convert", "folder", "back.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "target": "back.safetensors",
        "kind": "f8c4",
        "layout": "single",
        "tensors": {"vae": 248},
        "bytes": 83_653_863,
        "dropped": {},
    }
    with open(vae, "rb") as before, open("back.safetensors", "rb") as after:
        assert before.read() == after.read()


def test_in_another_precision(vae, tmp_path, capsys):
    assert run(["convert", vae, "half.safetensors", "--dtype", "fp16", "--layout", "single"]) == 0
    before, after = load_file(vae), load_file(tmp_path / "half.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.half()) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["VAE", "folder"], "f8c4 alone does not say which system it belongs to; give its kind"),
        (["VAE", "x.safetensors", "--dtype", "int8"], "dtype must be one of fp32, fp16, bf16, not 'int8'"),
        (["VAE", "x.safetensors", "--layout", "folder"], "is a folder and must not end in .safetensors"),
        (["VAE", "x", "--layout", "single"], "must end in .safetensors"),
        (["VAE", "x", "--layout", "tar"], "layout must be one of single, folder, not 'tar'"),
        (["VAE", "there", "--kind", "sdxl"], "the target 'there' exists"),
        (["VAE", "x", "--kind", "sd9"], "kind must be one of sd1"),
        (["VAE", "x", "--kind", "sd1", "--prediction", "w"], "prediction must be epsilon or v, not 'w'"),
        (["absent.safetensors", "x"], "absent.safetensors does not exist"),
        (["model.ckpt", "x"], "pickled"),
        (["there", "x"], "holds neither model_index.json nor config.json"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(arguments, said, vae, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    before = sorted(tmp_path.iterdir())
    assert run(["convert", *(vae if a == "VAE" else a for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_help_shows_an_example(capsys):
    assert run(["convert", "--help"]) == 0
    assert "--dtype bf16" in capsys.readouterr().out
