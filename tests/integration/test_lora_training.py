"""LoRAs trained as a user does it: whole recipes beside small models, stopped, continued, drawn with, refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
import small_sd
import small_sd3
from helpers import CPU, array, tiny_folder
from sfumato.checkpoint.header import read_header
from sfumato.errors import CheckpointError, DataError, InputError, SfumatoError
from sfumato.families.sd import system as sd_system
from sfumato.families.sd3 import system as sd3_system
from sfumato.storage import load_tensors
from sfumato.train import lora as lora_room
from sfumato.train import run
from sfumato.train.recipe import parse_recipe
from small_sd import SIDE

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of three colours, of two shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(9):
        name, color = list(COLORS.items())[k % 3]
        picture = np.full((32, 32 if k < 6 else 48, 3), 245, dtype=np.uint8)
        picture[4 + k : 20 + k, 6:22] = color
        Image.fromarray(picture).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a {name} square", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "model")


def recipe_of(base: Path, train: dict[str, Any] | None = None, data: Any = None, **own: Any):
    train = {"steps": 6, "batch": 4, "microbatch": 2, "lr": 1e-2, "save_every": 2, "sheet_every": 3} | (
        train or {}
    )
    return parse_recipe(
        {
            "name": "tiny",
            "data": {"size": 32, "held_out": 0.3} | (data or {}),
            "lora": {"base": str(base), "rank": 2, "dtype": "float32", "targets": "all", "train": train}
            | own,
        }
    )


def frozen_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


PRIOR = {"prompt": "a square", "count": 5, "steps": 2}


@pytest.fixture(scope="module")
def whole(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted, with a prior and the text encoder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    before = frozen_bytes(base)
    run(recipe_of(base, prior=PRIOR, text=True, train={"ema": 0.5}), data=pictures, out=out, device="cpu")
    assert frozen_bytes(base) == before
    return out


def test_the_file_is_drawn_with(whole: Path, base: Path) -> None:
    header = read_header(whole / "tiny.safetensors")
    assert header.metadata["modelspec.architecture"] == "pocket/lora"
    assert header.metadata["ss_network_dim"] == header.metadata["ss_network_alpha"] == "2"
    assert header.metadata["ss_steps"] == "6"
    model = sfumato.load(base, "cpu")
    request = sfumato.Request("a red square", seed=1, steps=2, size=(32, 32))
    plain = array(model.generate(request).images[0])
    report = model.attach(whole / "tiny.safetensors")
    assert not report.left and any(name.startswith("denoiser.text.") for name in report.matched)
    assert (array(model.generate(request).images[0]) != plain).any()
    model.detach()
    assert (array(model.generate(request).images[0]) == plain).all()


def test_what_lies_beside_the_file(whole: Path) -> None:
    with open(whole / "lora" / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == [str(k) for k in range(1, 7)]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["diffusion"]) + float(row["prior"]), rel=1e-5)
    assert len(list((whole / "prior").glob("*.png"))) == 5
    assert {p.name for p in (whole / "sheets").iterdir()} == {"lora-0000003.png", "lora-0000006.png"}
    measured = json.loads((whole / "lora" / "held-out.json").read_text())
    assert measured["pictures"] > 0 and measured["with"] != measured["without"]
    state = load_tensors(next((whole / "lora" / "state").glob("step-*6")) / "state.safetensors")
    assert {name.split("/")[0] for name in state} == {"average", "weights", "optimizer"}
    assert not any("denoiser/dit/latent_in/weight" in name for name in state)  # nothing of the base is kept


class Stop(Exception):
    pass


@pytest.mark.parametrize("moment", [("prepare", 5), ("save", 2), ("step", 5)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    moment: tuple[str, int], whole: Path, base: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(base, prior=PRIOR, text=True, train={"ema": 0.5})

    def stop(event: Any) -> None:
        if (event.kind, event.step) == moment:
            raise Stop

    with pytest.raises(Stop):
        run(recipe, data=pictures, out=tmp_path / "run", device="cpu", on_event=stop)
    assert moment[0] != "save" or not (tmp_path / "run" / "tiny.safetensors").exists()
    run(recipe, data=pictures, out=tmp_path / "run", device="cpu")
    for name in ("tiny.safetensors", "lora/log.csv", "lora/held-out.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_recipe_does_not_go_on_from_it(whole: Path, base: Path, pictures: Path) -> None:
    with pytest.raises(CheckpointError, match="another recipe"):
        run(recipe_of(base, prior=PRIOR, text=True, dora=True), data=pictures, out=whole, device="cpu")


@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("sdxl", "sd3.5-medium"))]
)
def test_stable_diffusion_from_the_recipe_to_the_file(
    kind: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cached texts and recomputed blocks; in bfloat16 weights where the CPU is fast in them."""
    family, small = (sd3_system, small_sd3) if kind in small_sd3.SMALL else (sd_system, small_sd)
    place = small.write(kind, tmp_path / "model")
    before = frozen_bytes(place)
    own = {"offload": "model", "systems": small.SMALL}
    monkeypatch.setattr(
        lora_room,
        "open_model",
        lambda base, device, dtype, options: family.open_system(base, device, dtype, **own),
    )
    recipe = recipe_of(
        place,
        {"sheet_every": 6},
        {"size": SIDE},
        layout="kohya",
        alpha=1.0,
        trigger="zwx",
        recompute="on",
        samples=["a red square"],
        loss={"weighting": "min_snr", "drop_prompt": 0.5},
    )
    file = run(recipe, data=pictures, out=tmp_path / "run", device="cpu")
    assert frozen_bytes(place) == before
    found = family.open_system(place, CPU, torch.float32, systems=small.SMALL)
    report = found.adapters.attach(file)
    assert not report.left and report.formats == ("kohya",)
    notes = found.adapters.opened["tiny"].metadata
    assert notes["ss_network_alpha"] == "1" and notes["modelspec.trigger_phrase"] == "zwx"
    assert notes["sshs_model_hash"] == found.adapters.opened["tiny"].digest


def test_computing_blocks_twice_changes_no_number(base: Path, pictures: Path, tmp_path: Path) -> None:
    files = []
    for choice in ("on", "off"):
        recipe = recipe_of(base, {"steps": 2, "precision": "float32"}, recompute=choice)
        files.append(run(recipe, data=pictures, out=tmp_path / choice, device="cpu").read_bytes())
    assert files[0] == files[1]


def test_a_loss_that_is_no_number_ends_the_run(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SfumatoError, match=r"of lora became .* lower lora\.train\.lr"):
        run(recipe_of(base, {"lr": 1e30, "warmup": 0}), data=pictures, out=tmp_path / "run", device="cpu")


def test_bad_input_is_told_before_anything_is_made(base: Path, pictures: Path, tmp_path: Path) -> None:
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (InputError, "no layer answers to the target 'unet.nothing'", {"targets": ["unet.nothing"]}),
        (InputError, "layout kohya has no names for pocket", {"layout": "kohya"}),
        (CheckpointError, "there is no model", {"base": tmp_path / "nowhere"}),
    ]
    for kind, text, own in bad:
        recipe = recipe_of(own.pop("base", base), **own)
        with pytest.raises(kind, match=text):
            run(recipe, data=pictures, out=tmp_path / "run", device="cpu")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError):
        run(recipe_of(base), data=empty, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_caption_that_is_too_long_is_named(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.txt").write_text("xyz " * 200, encoding="utf-8")
    with pytest.raises(InputError, match=r"the caption of a\.png cannot be read: .*tokens"):
        run(recipe_of(base, data={"held_out": 0.0}), data=folder, out=tmp_path / "run", device="cpu")


def test_a_folder_of_the_class_that_is_not_there_is_told_first(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        run(recipe_of(base, prior={"path": "nowhere"}), data=pictures, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"rank": 0}, "lora.rank must be from 1 to 4096"),
        ({"targets": []}, "lora.targets must be attention, all, or patterns"),
        ({"layout": "a1111"}, "lora.layout must be diffusers or kohya"),
        ({"train": {"compile": True}}, "lora.train.compile must be false"),
        ({"train": {"optimizer": "muon"}}, "lora.train.optimizer must be adamw"),
        ({"prior": {"prompt": "a", "path": "b"}}, "not both"),
        ({"loss": {"weighting": "flow"}}, "lora.loss.weighting must be plain or min_snr"),
        ({"ranks": 4}, "unknown key 'lora.ranks'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(own: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        parse_recipe({"name": "x", "lora": own})
    with pytest.raises(InputError, match="a recipe of their own"):
        parse_recipe({"name": "x", "lora": {}, "autoencoder": {}})
