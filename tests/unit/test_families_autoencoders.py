"""The autoencoder of a model alone: the same numbers as in the whole model, and no more than is asked for."""

from __future__ import annotations

import pytest
import torch

import small_sd
import small_svd
from helpers import CPU, tiny_folder
from sfumato import load
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.errors import CheckpointError, InputError
from sfumato.families.autoencoders import open_autoencoder
from sfumato.families.sd import folder
from sfumato.families.sd.family import FAMILY
from sfumato.families.svd.family import FAMILY as SVD
from sfumato.fidelity.instrument import open_instrument
from sfumato.storage import save_tensors, write_json

SHOWN = torch.rand(1, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A Stable Diffusion 1 in a folder, which the families know by its small shapes."""
    from dataclasses import replace

    from sfumato import families

    known = (replace(FAMILY, systems=small_sd.SMALL), replace(SVD, systems=small_svd.SMALL))
    monkeypatch.setattr(families, "checkpoint_families", lambda: known)
    monkeypatch.setattr("sfumato.families.autoencoders.checkpoint_families", lambda: known)
    return small_sd.write("sd1", tmp_path / "sd1")


def test_pockets_is_the_whole_models():
    whole = load("pocket", "cpu", dtype=torch.float32)
    alone = open_autoencoder("pocket", CPU, torch.float32)
    assert alone.digest == whole.hashes["autoencoder"]
    assert (alone.factor, alone.channels) == (8, 8)
    with torch.inference_mode():
        theirs = whole.system.decode(whole.system.encode(SHOWN))
        assert torch.allclose(alone.roundtrip(SHOWN), theirs, atol=1e-4)


def test_the_denoiser_is_not_read(tmp_path):
    place = tiny_folder(tmp_path / "tiny")
    for file in place.glob("denoiser*.safetensors"):
        file.write_bytes(b"nothing")
    assert open_autoencoder(place, CPU, torch.float32).factor == 8
    with pytest.raises(CheckpointError):
        load(place)


def test_a_checkpoints_is_the_whole_models(small):
    whole = load(small, "cpu", dtype=torch.float32)
    alone = open_autoencoder(small, CPU, torch.float32)
    assert alone.digest == whole.hashes["autoencoder"] and alone.factor == 4
    with torch.inference_mode():
        assert torch.allclose(
            alone.roundtrip(SHOWN), whole.system.decode(whole.system.encode(SHOWN)), atol=1e-4
        )


def test_that_of_a_film_model_takes_pictures_alone(small, tmp_path):
    """Each as a clip of one frame: what they are shown with does not matter."""
    place = small_svd.write("svd", tmp_path / "svd")
    whole = load(place, "cpu", dtype=torch.float32)
    alone = open_autoencoder(place, CPU, torch.float32)
    assert alone.digest == whole.hashes["autoencoder"]
    with torch.inference_mode():
        theirs = whole.system.decode(whole.system.encode(SHOWN))
        both = alone.roundtrip(torch.cat([SHOWN, -SHOWN]))
        assert torch.allclose(both[:1], theirs, atol=1e-4)


def test_one_alone_and_another_in_its_place(small, tmp_path):
    config = KLConfig(widths=(128, 256, 512, 512), resnets=2)
    torch.manual_seed(1)
    other = AutoencoderKL(config)
    save_tensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", other.state_dict())
    write_json(tmp_path / "vae" / "config.json", folder.vae_config(config, 64))
    alone = open_autoencoder(tmp_path / "vae", CPU, torch.float32)
    assert (alone.factor, alone.channels) == (8, 4)
    placed = open_autoencoder(small, CPU, torch.float32, vae=tmp_path / "vae")
    assert placed.digest == alone.digest
    with torch.inference_mode():
        there = alone.roundtrip(SHOWN[..., :32, :32])
        plain = other.decode(other.encode(SHOWN[..., :32, :32]).mode())
        assert torch.allclose(there, plain, atol=1e-3 * float(plain.abs().max()))
    shown = open_instrument(tmp_path / "vae", "cpu", dtype=torch.float32)
    assert (shown.factor, shown.whole) == (8, True)


def test_what_holds_none_is_refused(small, tmp_path):
    save_tensors(tmp_path / "unknown.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unknown\.safetensors"):
        open_autoencoder(tmp_path / "unknown.safetensors", CPU, torch.float32)
    with pytest.raises(InputError, match="vae is for checkpoints"):
        open_autoencoder("pocket", CPU, torch.float32, vae=small)
    with pytest.raises(CheckpointError, match="there is no model"):
        open_autoencoder(tmp_path / "absent", CPU, torch.float32)
