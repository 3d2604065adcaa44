"""ControlNets in training: they begin by changing nothing, learn, go on to the bit, and their files open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_sd3
from helpers import CPU, TINY, apart, noise, tiny_folder
from sfumato import load
from sfumato.autoencoder import AutoencoderConfig
from sfumato.data.folder import FolderSource
from sfumato.errors import CheckpointError, DataError, InputError
from sfumato.families import PACKAGED
from sfumato.families.pocket import build, save_folder
from sfumato.families.pocket.config import DenoiserConfig, Preset
from sfumato.families.sd.system import open_system
from sfumato.families.sd3 import system as sd3
from sfumato.generate import Model
from sfumato.scenes import render, sample_scene
from sfumato.scenes.controls import PICTURES, control_pictures
from sfumato.storage import read_json, save_tensors
from sfumato.train import run
from sfumato.train.control import ControlJob
from sfumato.train.control_data import Folder
from sfumato.train.recipe import DataRecipe, read_recipe
from sfumato.types import Control, Request
from small_sd import SMALL, write

RECIPE = """
name = "c"
[data]
kind = "scenes"
size = 32
count = 16
[control]
kind = "edge"
base = "BASE"
outputs = 1
[control.train]
steps = 4
batch = 8
microbatch = 4
warmup = 0
lr = 3e-3
precision = "float32"
ema = 0.0
save_every = 2
sheet_every = 100
"""


def base_folder(place: Path) -> None:
    """A tiny model with the words of scenes."""
    words = tuple(read_json(PACKAGED["pocket"] / "model.json")["words"])
    denoiser = DenoiserConfig(64, 1, 1, text_width=64, text_depth=1)
    config = replace(
        TINY, autoencoder=AutoencoderConfig(factor=8, latent_channels=4), denoiser=denoiser, words=words,
        preset=Preset(steps=2, size=(32, 32)),
    )  # fmt: skip
    torch.manual_seed(0)
    system = build(config)
    for parameter in system.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_folder(system, place)


@pytest.fixture
def recipe(tmp_path) -> Path:
    base_folder(tmp_path / "base")
    path = tmp_path / "c.toml"
    path.write_text(RECIPE.replace("BASE", str(tmp_path / "base")))
    return path


def base(recipe: Path) -> Model:
    return load(recipe.parent / "base", dtype=torch.float32)


@pytest.mark.parametrize("family", ["own", "sd1", "sdxl", "sd3.5-medium"])
@torch.no_grad()
def test_a_fresh_one_leaves_the_answer_as_it_is(tmp_path, family):
    if family == "own":
        system = load(tiny_folder(tmp_path / "m"), dtype=torch.float32).system
    elif family in small_sd3.SMALL:
        place = small_sd3.write(family, tmp_path / "m")
        system = sd3.open_system(place, CPU, torch.float32, systems=small_sd3.SMALL)
    else:
        system = open_system(write(family, tmp_path / "m"), CPU, torch.float32, systems=SMALL)
    trainee = system.control_trainee(1, 1)
    request = Model(system, CPU, "m").complete(Request("a cat", size=(32, 32)))
    cond = Model(system, CPU, "m").condition(request)
    x = torch.randn(2, *system.latent_shape(1, 32, 32)) if family != "own" else torch.randn(2, 4, 1, 4, 4)
    time = torch.full((2,), 0.5 if family == "own" else 500.0)
    hints = trainee.hint(torch.rand(2, 3, 32, 32))
    added = trainee.adds(trainee.network, x, time, cond, hints)
    assert all(not tensor.any() for tensor in added)
    if family == "own":
        assert torch.equal(trainee.answer(x, time, cond, added), system.network(x, time, cond))
    else:
        plain = trainee.base(x[:, :, 0], time, cond.tokens, cond.vector)
        assert torch.equal(trainee.answer(x, time, cond, added)[:, :, 0], plain)


def test_it_learns_and_its_file_draws(recipe):
    file = run(recipe, out=recipe.parent / "run", overrides={"control.train.steps": 60})
    rows = (recipe.parent / "run" / "control" / "log.csv").read_text().splitlines()
    place = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[place]) for row in rows[1:]]
    assert np.mean(losses[-15:]) < 0.95 * np.mean(losses[:15])
    model = load(recipe.parent / "base", dtype=torch.float32, controlnets={"edge": file})
    assert model.system.controls == ("edge",)
    shown = Request("a cube", controls=(Control("edge", noise(32, 32)),))
    drawn, bare = model.generate(shown), model.generate(Request("a cube"))
    assert apart(drawn.images[0], bare.images[0]) > 0
    assert drawn.recipe["controlnets"] == model.system.control_hashes()


@pytest.mark.full
def test_a_run_that_was_stopped_goes_on_to_the_bit(recipe):
    whole = run(recipe, out=recipe.parent / "whole")
    run(recipe, out=recipe.parent / "parts", overrides={"control.train.steps": 2, "control.train.decay": 0.0})
    run(recipe, out=recipe.parent / "other", overrides={"control.train.decay": 0.0})
    parts = run(recipe, out=recipe.parent / "parts", overrides={"control.train.decay": 0.0})
    assert parts.read_bytes() == (recipe.parent / "other" / "control-edge.safetensors").read_bytes()
    assert whole.read_bytes() != parts.read_bytes()


@pytest.mark.parametrize("kind", ["sd1", "sd3-medium"])
def test_beside_a_stable_diffusion_with_two_folders(recipe, tmp_path, kind):
    for name, seed in (("a", 1), ("b", 2)):
        for place, plus in (("pictures", 0), ("poses", 10)):
            (tmp_path / place).mkdir(exist_ok=True)
            noise(64, 64, seed + plus).save(tmp_path / place / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text("a cat")
    if kind == "sd1":
        systems, system = SMALL, open_system(write(kind, tmp_path / "sd"), CPU, torch.float32, systems=SMALL)
    else:
        systems, place = small_sd3.SMALL, small_sd3.write(kind, tmp_path / "sd")
        system = sd3.open_system(place, CPU, torch.float32, systems=systems)
    told = {"control.kind": "pose", "control.pictures": str(tmp_path / "poses"), "control.train.batch": 2,
            "control.train.microbatch": 0, "control.train.steps": 3}  # fmt: skip
    seen = []

    class Small(type(system)):
        def with_controls(self, files, others=None):
            return super().with_controls(files, systems)

    made = replace(
        read_recipe(recipe, told), data=DataRecipe(path=str(tmp_path / "pictures"), size=64, held_out=0.0)
    )
    job = ControlJob(made, tmp_path / "run", CPU, lambda event: seen.append(event.kind))
    job.model = Model(Small(**vars(system)), CPU, "sd")
    file = job.whole()
    assert "done" in seen and (tmp_path / "run" / "sheets").is_dir()
    drawn = Model(system.with_controls({"pose": file}, systems), CPU, "sd").generate(
        Request("a cat", steps=2, size=(64, 64), controls=(Control("pose", noise(64, 64)),))
    )
    assert drawn.images[0].size == (64, 64)
    (tmp_path / "poses" / "b.png").unlink()
    with pytest.raises(DataError, match=r"holds no control picture b\.png"):
        ControlJob(made, tmp_path / "other", CPU, print).pairs("all")


def test_control_pictures_lie_as_the_pictures_do(tmp_path):
    pictures, controls = tmp_path / "pictures", tmp_path / "controls"
    for number, name in enumerate(("1_a/001", "1_b/001", "1_b/002")):
        for place, plus in ((pictures, 0), (controls, 10)):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            noise(64, 64, number + plus).save(place / f"{name}.png")
    (controls / "1_b" / "002.png").rename(controls / "002.png")  # or all in one place
    source = FolderSource(pictures, 64)
    seen = Folder(source, controls).both([0, 1, 2])[1]
    assert [source.name(k) for k in range(3)] == ["1_a/001.png", "1_b/001.png", "1_b/002.png"]
    for number in range(3):
        assert (seen[number].permute(1, 2, 0).numpy() == np.asarray(noise(64, 64, number + 10))).all()
    noise(96, 64, 3).save(controls / "1_a" / "001.png")
    with pytest.raises(DataError, match=r"001\.png is 96x64 and its picture 1_a/001\.png 64x64"):
        Folder(source, controls)
    (controls / "1_a" / "001.png").rename(controls / "001.png")
    (controls / "1_b" / "001.png").unlink()
    with pytest.raises(DataError, match=r"would be the control picture of 1_a/001\.png and of 1_b/001\.png"):
        Folder(source, controls)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_shapes_are_compared_before_anything_is_learned_as_pictures_stand(tmp_path, ending):
    for place in ("pictures", "controls"):
        (tmp_path / place).mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying, to be shown upright
    noise(64, 96).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a cat")
    source = FolderSource(tmp_path / "pictures", 64)
    noise(96, 64).save(tmp_path / "controls" / f"a.{ending}", exif=turned)
    Folder(source, tmp_path / "controls").both([0])
    noise(64, 96).save(tmp_path / "controls" / f"a.{ending}", exif=turned)
    with pytest.raises(DataError, match=rf"a\.{ending} is 96x64 and its picture a\.png 64x96"):
        Folder(source, tmp_path / "controls")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"control.kind": "pose"}, "control.kind must be one of depth, edge, mask, not 'pose'"),
        ({"control.bocks": 2}, "control has no"),
        ({"control.train.batch": 6}, "must be a multiple of microbatch"),
        ({"control.blocks": 9}, "blocks and outputs must be from 1 to the base's 1 blocks"),
        ({"data.kind": "folder"}, "needs control.pictures"),
        (
            {"data.kind": "folder", "data.path": ".", "control.pictures": "nowhere"},
            "no folder of control pictures 'nowhere'",
        ),
        ({"data.flip": True}, "leave it out"),
        ({"control.drop_prompt": 2.0}, "drop_prompt must be from 0 to 1"),
    ],
)
def test_a_bad_recipe_is_refused(recipe, overrides, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.") if "has no" not in words else "bocks"):
        run(recipe, out=recipe.parent / "run", overrides=overrides)
    assert not (recipe.parent / "run").exists()


def test_a_damaged_or_foreign_file_is_refused(recipe, tmp_path):
    made = base(recipe).system.control_trainee(1, 1)
    state = made.network.state_dict()
    file = made.save(state, tmp_path / "control-edge.safetensors")
    whole = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    save_tensors(tmp_path / "plain.safetensors", state)
    for name in ("cut", "plain"):
        with pytest.raises(CheckpointError, match=name):
            load(recipe.parent / "base", controlnets={"edge": tmp_path / f"{name}.safetensors"})
    with pytest.raises(InputError, match="is a ControlNet for a model of width 64"):
        load("pocket", controlnets={"edge": file})


def test_a_controlnet_opened_beside_a_lora_leaves_the_base_what_it_was(recipe, tmp_path):
    system = base(recipe).system
    before = {name: tensor.clone() for name, tensor in system.denoiser.state_dict().items()}
    change = {"up": (192, 2), "down": (2, 64)}
    save_tensors(
        tmp_path / "lora.safetensors",
        {f"dit.blocks.0.attn.qkv.lora_{role}.weight": torch.ones(shape) for role, shape in change.items()},
    )
    system.adapters.attach(tmp_path / "lora.safetensors")
    assert not torch.equal(system.denoiser.state_dict()["dit.blocks.0.attn.qkv.weight"],
                           before["dit.blocks.0.attn.qkv.weight"])  # fmt: skip
    made = system.control_trainee(1, 1)
    file = made.save(made.network.state_dict(), tmp_path / "control-edge.safetensors")
    other = system.with_controls({"edge": file})
    other.adapters.detach()
    assert all(torch.equal(other.denoiser.state_dict()[name], before[name]) for name in before)


def test_control_pictures_of_scenes_are_the_renderer_s_truth():
    scene = sample_scene(4, split="train")
    made = render([scene], size=64)
    depth = control_pictures(made, "depth")[0, 0].double()
    near = 1 / made.depth[0, 0].double()
    order = torch.corrcoef(torch.stack([depth.flatten(), near.flatten()]))[0, 1]
    assert order > 0.9999 and depth.min() == 0 and depth.max() == 255
    masks = control_pictures(made, "mask")[0, 0]
    assert len(masks.unique()) == len(made.instances.unique())
    assert torch.equal(masks == 0, made.instances[0, 0] == 0)
    edge = control_pictures(made, "edge")[0, 0] > 0
    inst = made.instances[0, 0]
    assert edge[:, :-1][inst[:, 1:] != inst[:, :-1]].all()
    flat = (inst == 0)[:-1, :-1] & (inst[1:, :-1] == 0) & (inst[:-1, 1:] == 0)
    assert not edge[:-1, :-1][flat].any()  # the floor has no edge of its own
    assert set(PICTURES) == {"depth", "edge", "mask"}
    assert Image.fromarray(edge.numpy()).size == (64, 64)
