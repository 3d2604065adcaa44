"""The pocket family: its card, its folder, exact round trips, and a name for every damage."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.autoencoder import AutoencoderConfig
from sfumato.errors import CheckpointError, InputError
from sfumato.families import FAMILIES, family_named, family_of
from sfumato.families.pocket import PocketConfig, System, build, open_folder, pixel_twin, save_folder
from sfumato.families.pocket.config import DenoiserConfig, Preset
from sfumato.storage import SHARD_BYTES, load_tensors, save_tensors

CPU = torch.device("cpu")
CONFIG = PocketConfig(
    autoencoder=AutoencoderConfig(4, 4, encoder_width=32, decoder_width=32, max_width=32),
    denoiser=DenoiserConfig(64, 1, 1, text_width=64, text_depth=1, max_tokens=40, label_classes=(3, 5)),
    words=("a", "red", "“cube”", "шар", "👩‍👩‍👧"),
    preset=Preset(
        steps=3, guidance=2.5, sampler="euler", schedule="linear", size=(32, 16), interval=(0.1, 0.9)
    ),
)


def fresh(config: PocketConfig = CONFIG, seed: int = 0) -> System:
    """A system whose every weight is random and none a bfloat16 number."""
    torch.manual_seed(seed)
    system = build(config)
    with torch.no_grad():
        for module in (system.autoencoder, system.denoiser):
            for tensor in module.state_dict().values():
                tensor.uniform_(0.1, 1.1)
    return system


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_folder(fresh(), tmp_path / "model")
    return tmp_path / "model"


def change_card(folder: Path, **values: object) -> None:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | values))


# --- the card ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [CONFIG, PocketConfig(), pixel_twin(CONFIG)], ids=["set", "default", "pixels"]
)
def test_a_config_survives_json(config):
    again = PocketConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    "part, value, said",
    [
        ("denoiser", None, "denoiser"),
        ("denoiser", {"depht": 3}, "depht"),
        ("denoiser", {"width": "wide"}, "width"),
        ("denoiser", {"width": 0}, "width"),
        ("denoiser", {"width": 100, "heads": 3}, "heads"),
        ("denoiser", {"text_width": 200}, "text_width"),
        ("denoiser", {"depth": True}, "depth"),
        ("denoiser", {"depth": 10**9}, "depth"),
        ("denoiser", {"prediction": "noise"}, "prediction"),
        ("denoiser", {"label_classes": [3, "x"]}, "label_classes"),
        ("autoencoder", {"factor": 3}, "factor"),
        ("autoencoder", {"colour": 3}, "colour"),
        ("autoencoder", [], "model card"),
        ("words", 5, "model card"),
        ("words", ["a", 5], "words"),
        ("words", "abc", "words"),
        ("preset", {"steps": "many"}, "steps"),
        ("preset", {"size": [128]}, "size"),
        ("preset", {"size": "big"}, "size"),
        ("preset", {"interval": [0.5]}, "interval"),
        ("preset", {"sampler": "eiler"}, "eiler"),
        ("preset", {"schedule": "karas"}, "karas"),
        ("files", None, "files"),
        ("files", {"autoencoder": ["autoencoder.safetensors"]}, "denoiser"),
        ("files", {"autoencoder": 3, "denoiser": 3}, "autoencoder"),
        ("format", "sfumato model 7", "sfumato model 7"),
    ],
)
def test_a_wrong_card_is_named(folder, part, value, said):
    change_card(folder, **{part: value})
    with pytest.raises(CheckpointError, match=said):
        open_folder(folder, CPU)


@pytest.mark.parametrize("part", ["autoencoder", "denoiser", "words", "preset", "files", "format"])
def test_a_card_without_a_part_is_named(folder, part):
    card = json.loads((folder / "model.json").read_text())
    del card[part]
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=part):
        open_folder(folder, CPU)


def test_a_folder_without_a_card_is_no_model(folder):
    (folder / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.json does not exist"):
        open_folder(folder, CPU)
    with pytest.raises(CheckpointError, match=r"holds neither model\.json nor model_index\.json"):
        family_of(folder)
    with pytest.raises(CheckpointError, match="there is no model"):
        family_of(folder / "nothing")


def test_a_card_names_its_family(folder):
    assert family_of(folder) is family_named("pocket")
    change_card(folder, family="locket")
    with pytest.raises(CheckpointError, match=f"'locket'; known are {', '.join(FAMILIES)}"):
        family_of(folder)
    with pytest.raises(InputError, match="locket"):
        family_named("locket")


def test_the_pixel_twin_sees_as_many_tokens():
    twin = pixel_twin(CONFIG)
    assert twin.multiple == CONFIG.multiple == 4
    assert (twin.autoencoder.channels, twin.denoiser.patch, twin.denoiser.prediction) == (3, 4, "x")
    assert (twin.denoiser.width, twin.words, twin.preset) == (
        CONFIG.denoiser.width,
        CONFIG.words,
        CONFIG.preset,
    )
    with pytest.raises(InputError, match="heads"):
        replace(CONFIG.denoiser, heads=5)


# --- round trips -------------------------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_saved_to_bfloat16(folder):
    system, again = fresh(), open_folder(folder, CPU)
    assert again.config == system.config
    assert again.tokenizer.encode("a red 👩‍👩‍👧") == system.tokenizer.encode("a red 👩‍👩‍👧")
    for name in ("autoencoder", "denoiser"):
        before, after = getattr(system, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        for key, value in before.items():
            exact = key in {"latent_mean", "latent_std"}
            assert torch.equal(after[key], value if exact else value.bfloat16().float()), key
        assert not any(p.requires_grad for p in getattr(again, name).parameters())
        assert not getattr(again, name).training


def test_saving_again_changes_no_byte(folder, tmp_path):
    save_folder(open_folder(folder, CPU), tmp_path / "again")
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_opening_draws_no_random_numbers(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    open_folder(folder, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_builds_the_same_system():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build(CONFIG).denoiser.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_large_weights_lie_in_shards_that_the_card_lists(tmp_path):
    wide = replace(CONFIG.denoiser, width=448, heads=7, depth=4)
    system = fresh(replace(CONFIG, denoiser=wide))
    written = save_folder(system, tmp_path)
    assert sorted(written) == sorted(tmp_path.iterdir())
    shards = sorted(tmp_path.glob("denoiser-*.safetensors"))
    assert [s.name for s in shards] == [f"denoiser-{i:05d}-of-{len(shards):05d}.safetensors" for i in (1, 2)]
    assert all(s.stat().st_size <= SHARD_BYTES for s in shards)
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["files"] == {"autoencoder": ["autoencoder.safetensors"], "denoiser": [s.name for s in shards]}
    again = open_folder(tmp_path, CPU).denoiser.state_dict()
    assert all(torch.equal(again[k], v.bfloat16().float()) for k, v in system.denoiser.state_dict().items())
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=shards[0].name):
        open_folder(tmp_path, CPU)


# --- damage ------------------------------------------------------------------------------------------------------


def damaged(folder: Path, name: str, change) -> None:
    tensors = load_tensors(folder / name)
    change(tensors)
    save_tensors(folder / name, tensors)


def test_missing_and_unexpected_tensors_are_named(folder):
    damaged(folder, "denoiser.safetensors", lambda t: t.update(extra=t.pop("dit.latent_in.bias")))
    with pytest.raises(
        CheckpointError, match=r"1 missing: dit\.latent_in\.bias; 1 unexpected: extra"
    ) as caught:
        open_folder(folder, CPU)
    assert str(folder) in str(caught.value)


def test_a_wrong_shape_is_named(folder):
    damaged(folder, "autoencoder.safetensors", lambda t: t.update(latent_mean=torch.zeros(5)))
    with pytest.raises(CheckpointError, match=r"latent_mean has shape \(5,\), expected \(4,\)"):
        open_folder(folder, CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_named(folder, value):
    damaged(folder, "denoiser.safetensors", lambda t: t["dit.latent_in.weight"].view(-1)[3:4].fill_(value))
    with pytest.raises(CheckpointError, match=r"dit\.latent_in\.weight holds NaN or infinite"):
        open_folder(folder, CPU)


def test_whole_numbers_are_no_weights(folder):
    damaged(folder, "denoiser.safetensors", lambda t: t.update({"dit.latent_in.bias": torch.ones(64).long()}))
    with pytest.raises(CheckpointError, match=r"dit\.latent_in\.bias .*int64"):
        open_folder(folder, CPU)


def test_a_pickle_is_refused_unopened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    for protocol in (2, 4, 5):
        (folder / "denoiser.safetensors").write_bytes(pickle.dumps(Trap(), protocol))
        with pytest.raises(CheckpointError, match=r"denoiser\.safetensors is (a pickled|not a safetensors)"):
            open_folder(folder, CPU)
    torch.save({"w": torch.ones(2)}, folder / "denoiser.safetensors")
    with pytest.raises(CheckpointError, match="pickled"):
        open_folder(folder, CPU)
    assert not (tmp_path / "sprung").exists()


def test_a_file_cut_short_is_refused_at_any_length(folder):
    data = (folder / "autoencoder.safetensors").read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        (folder / "autoencoder.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"autoencoder\.safetensors"):
            open_folder(folder, CPU)


@pytest.mark.parametrize("name", ["../denoiser.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3])
def test_a_shard_outside_the_folder_is_refused(folder, name):
    (folder.parent / "denoiser.safetensors").write_bytes((folder / "denoiser.safetensors").read_bytes())
    change_card(folder, files={"autoencoder": ["autoencoder.safetensors"], "denoiser": [name]})
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_folder(folder, CPU)


def test_a_shard_named_twice_is_refused(folder):
    change_card(
        folder, files={"autoencoder": ["autoencoder.safetensors"], "denoiser": ["denoiser.safetensors"] * 2}
    )
    with pytest.raises(CheckpointError, match="repeats the tensor"):
        open_folder(folder, CPU)


def test_a_card_of_another_shape_is_refused_before_memory_is_taken(folder):
    huge = CONFIG.to_dict()["denoiser"] | {"width": 64 * 1024, "heads": 1024}  # some 200 GB of weights
    change_card(folder, denoiser=huge)
    with pytest.raises(CheckpointError, match="has shape"):
        open_folder(folder, CPU)


# --- saving over an older model ------------------------------------------------------------------------------------

SAVER = """
import os, signal, sys
from pathlib import Path
import torch
from sfumato import storage
from sfumato.families.pocket import open_folder, save_folder
system = open_folder(Path(sys.argv[1]), torch.device("cpu"))
for module in (system.autoencoder, system.denoiser):
    for tensor in module.state_dict().values():
        tensor.fill_(2.0)
calls, replace = int(sys.argv[2]), os.replace
def replace_or_die(*args):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = replace_or_die
save_folder(system, Path(sys.argv[1]))
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_saving_over_an_old_folder_leaves_no_mixture(folder, renames):
    """One rename each for two weight files and the card: dead before any of them, the folder is whole or no model."""
    old = open_folder(folder, CPU).denoiser.state_dict()
    done = subprocess.run([sys.executable, "-c", SAVER, str(folder), str(renames)], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    try:
        survivor = open_folder(folder, CPU)
    except CheckpointError as error:
        assert "model.json does not exist" in str(error)
    else:
        assert all(torch.equal(survivor.denoiser.state_dict()[k], v) for k, v in old.items())
    save_folder(fresh(seed=3), folder)
    assert open_folder(folder, CPU).config == CONFIG


def test_saving_a_smaller_model_over_a_larger_one_leaves_no_old_shard(tmp_path):
    for number in (1, 2):
        (tmp_path / f"denoiser-{number:05d}-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "README.md").write_text("mine")
    save_folder(fresh(), tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["README.md", "autoencoder.safetensors", "denoiser.safetensors", "model.json"]
