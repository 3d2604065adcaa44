"""LoRAs that clients sent, where they are drawn with: open while requests need them, and the model is as before."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from helpers import tiny_system
from sfumato.errors import InputError
from sfumato.generate import Model
from sfumato.serve.store import new_id
from sfumato.serve.worker.loras import IDLE, Sent
from sfumato.serve.worker.models import Opened
from sfumato.types import LoraUse, Request

CPU = torch.device("cpu")
NOTHING = {  # of a module that the model does not have
    "dit.blocks.99.nothing.lora_A.weight": torch.ones(2, 8),
    "dit.blocks.99.nothing.lora_B.weight": torch.ones(8, 2),
}


@pytest.fixture
def model():
    return Model(tiny_system(), CPU, "tiny")


def fitting(model, place, seed: int = 0) -> str:
    """A LoRA for it, as a file without an ending."""
    name = next(
        n
        for n, t in model.system.adapters.base["denoiser"].items()
        if n.startswith("dit.blocks") and t.ndim == 2
    )
    up, down = model.system.adapters.base["denoiser"][name].shape
    generator = torch.Generator().manual_seed(seed)
    module = name.removesuffix(".weight")
    found = {
        f"{module}.lora_A.weight": torch.randn(2, down, generator=generator),
        f"{module}.lora_B.weight": torch.randn(up, 2, generator=generator),
    }
    place.write_bytes(save(found))
    return str(place)


def test_it_is_drawn_as_one_of_the_server_s_and_the_model_is_as_before(model, tmp_path):
    name, path = new_id("file"), fitting(model, tmp_path / "x")
    model.attach(path, 0.0, name="ink")
    model.system.adapters.standing = ()

    def drawn(*uses: LoraUse):
        return model.generate(Request("a cube", steps=2, size=(16, 16), loras=uses))

    opened = Opened("it", model, model, Sent(model.system.adapters))
    plain, named = drawn(), drawn(LoraUse("ink", 0.8))
    with opened.sent.opened({name: path}):
        found = drawn(LoraUse(name, 0.8))
    assert found.recipe["loras"] == {name: named.recipe["loras"]["ink"]}
    pictures = [np.asarray(each.images[0]) for each in (plain, named, found, drawn())]
    assert (pictures[1] == pictures[2]).all() and (pictures[0] == pictures[3]).all()
    assert (pictures[0] != pictures[1]).any()
    assert "flow_dynamic" in (schedules := opened.facts()["schedules"]) and "ays" not in schedules
    assert opened.facts()["loras"] == ["ink"] and opened.facts()["takes_loras"]


def test_nobody_draws_with_another_s_or_hears_of_it(model, tmp_path):
    opened, name = Opened("it", model, model, Sent(model.system.adapters)), new_id("file")
    with opened.sent.opened({name: fitting(model, tmp_path / "x")}):
        assert opened.asked(Request(loras=(LoraUse(name),)), "picture", [name]).loras
        for other in (name, "none"):
            with pytest.raises(InputError, match="there is no LoRA") as error:
                opened.asked(Request(loras=(LoraUse(other),)), "picture", [])
            assert error.value.argument == "loras"
            assert str(error.value).count("file_") == (other == name)


def test_those_in_use_stay_open_and_a_few_more(model, tmp_path):
    found, ids = Sent(model.system.adapters), [new_id("file") for _ in range(IDLE + 3)]
    paths = {name: fitting(model, tmp_path / name, seed) for seed, name in enumerate(ids)}
    with found.opened({ids[0]: paths[ids[0]]}):
        first = model.system.adapters.opened[ids[0]]
        for name in ids[1:]:
            with found.opened({name: paths[name]}):
                pass
        assert list(model.system.adapters.opened) == [ids[0], *ids[-IDLE:]]
        with found.opened({ids[0]: paths[ids[0]]}):
            assert model.system.adapters.opened[ids[0]] is first
    assert len(model.system.adapters.opened) == IDLE


def test_one_that_does_not_fit_is_told_by_its_id(model, tmp_path):
    found, name, good = Sent(model.system.adapters), new_id("file"), new_id("file")
    cross = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k." + k: v for k, v in (
        ("lora_down.weight", torch.ones(2, 768)), ("lora_up.weight", torch.ones(320, 2)))}  # fmt: skip
    (tmp_path / "x").write_bytes(save(cross))
    given = {good: fitting(model, tmp_path / "y"), name: str(tmp_path / "x")}
    with (
        pytest.raises(InputError, match=r"is a LoRA for Stable Diffusion 1 .*this model is pocket") as error,
        found.opened(given),
    ):
        pass
    assert str(error.value).startswith(name) and error.value.argument == "loras"
    (tmp_path / "x").write_bytes(save(NOTHING))
    with pytest.raises(InputError, match="has nothing for this pocket model"), found.opened(given):
        pass
    beside = {"bundle_emb.cat.string_to_param.*": torch.ones(1, 4)}
    (tmp_path / "x").write_bytes(save(load((tmp_path / "y").read_bytes()) | beside))
    with pytest.raises(InputError, match="have no place") as error, found.opened(given):
        pass
    assert "--" not in str(error.value)  # no option of the command line
    with found.opened({good: given[good]}):  # what was open stays so
        assert list(model.system.adapters.opened) == [good]


def test_of_those_that_fail_nothing_stays_beside_the_few(model, tmp_path):
    found, bad = Sent(model.system.adapters), str(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(save(NOTHING))
    good = fitting(model, tmp_path / "good")
    for _ in range(IDLE + 3):
        with pytest.raises(InputError), found.opened({new_id("file"): good, new_id("file"): bad}):
            pass
        assert len(model.system.adapters.opened) <= IDLE
    assert set(found._known) == set(model.system.adapters.opened)


def test_nobody_waits_for_a_file_that_another_opens(model, tmp_path, monkeypatch):
    adapters = model.system.adapters
    found, slow, quick = Sent(adapters), new_id("file"), new_id("file")
    paths = {name: fitting(model, tmp_path / name) for name in (slow, quick)}
    begun, go, opened, really = threading.Event(), threading.Event(), [], adapters.open

    def open_slowly(path, name):
        opened.append(name)
        if name == slow:
            begun.set()
            assert go.wait(60)
        return really(path, name)

    monkeypatch.setattr(adapters, "open", open_slowly)

    def need(name):
        with found.opened({name: paths[name]}):
            assert name in adapters.opened
            return True

    with ThreadPoolExecutor(3) as threads:
        try:
            both = [threads.submit(need, slow) for _ in range(2)]
            assert begun.wait(60) and threads.submit(need, quick).result(60)
        finally:
            go.set()
        assert all(each.result(60) for each in both)
    assert sorted(opened) == sorted([slow, quick])  # each once
