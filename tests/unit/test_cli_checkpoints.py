"""`sfumato generate` with a Stable Diffusion: what its options do and refuse, and that `--like` brings them back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfumato import load
from sfumato.cli import parse
from sfumato.cli.app import run
from sfumato.diffusion.schedules import beta_levels, beta_table, sigmas_for
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.convert import write_file
from sfumato.families.sd import folder
from sfumato.families.sd.checkpoint import Checkpoint, completed, open_checkpoint
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.receipts import webui
from sfumato.receipts.provenance import read_recipe
from sfumato.storage import data_hash, load_tensors, read_json, tensors_hash, write_json
from sfumato.types import Micro, Request
from small_sd import SMALL, write

LIGHT = ["--steps", "2", "--size", "32", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """kind, seed → the folder of a small model with random weights."""
    known = {}

    def place(kind: str, seed: int = 5) -> str:
        if (kind, seed) not in known:
            known[kind, seed] = write(kind, tmp_path_factory.mktemp(kind) / "model", seed=seed)
        return str(known[kind, seed])

    return place


@pytest.fixture(autouse=True)
def _small_kinds_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, system in SMALL.items():
        monkeypatch.setitem(SYSTEMS, kind, system)


def draw(model: str, *arguments: str, prompt: str = "a cat", out: str = "out.png") -> np.ndarray:
    assert run(["generate", prompt, "-m", model, *LIGHT, *arguments, "-o", out]) == 0
    return pixels(out)


def again(model: str, *arguments: str) -> np.ndarray:
    """The picture like out.png, from the options that name files alone."""
    assert (
        run(["generate", "--like", "out.png", "-m", model, "--dtype", "fp32", *arguments, "-o", "again.png"])
        == 0
    )
    assert read_recipe("again.png")["request"] == read_recipe("out.png")["request"]
    return pixels("again.png")


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def parameters(path: str) -> str:
    with Image.open(path) as image:
        return image.text["parameters"]


def refused(capsys, *arguments: str) -> str:
    """The one line said of a command that exits with 2."""
    assert run(["generate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- textual inversion ---------------------------------------------------------------------------------------------


@pytest.fixture
def learnt(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(1)
    save_file({"emb_params": torch.randn(2, 32, generator=generator)}, tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def test_an_embedding_is_named_by_its_file_or_anew(places, learnt, capsys):
    model = places("sd1")
    plain = draw(model, prompt="a toy")
    named = draw(model, "--embedding", "toy.safetensors", prompt="a toy")
    anew = draw(model, "--embedding", f"cat=./{learnt.name}", prompt="a cat", out="anew.png")
    assert (named != plain).any() and (named == anew).all()
    digest = data_hash(learnt)
    assert read_recipe("out.png")["embeddings"] == {"toy": digest}
    assert read_recipe("anew.png")["embeddings"] == {"cat": digest}
    assert f'TI hashes: "toy: {digest[:12]}"' in parameters("out.png")
    assert (again(model, "--embedding", "toy.safetensors") == named).all()
    capsys.readouterr()
    again(model)
    assert "drawn with the embedding 'toy'; give its file by --embedding" in capsys.readouterr().err
    save_file({"emb_params": torch.ones(1, 32)}, learnt)
    again(model, "--embedding", "toy.safetensors")
    assert "another embedding 'toy'" in capsys.readouterr().err


def test_the_hash_of_an_embedding_is_of_its_numbers(tmp_path):
    """Notes in the header do not change it."""
    numbers = {"emb_params": torch.arange(6.0).reshape(2, 3)}
    save_file(numbers, tmp_path / "a.safetensors")
    save_file(numbers, tmp_path / "b.safetensors", metadata={"author": "somebody"})
    import hashlib

    expected = hashlib.sha256(numbers["emb_params"].numpy().tobytes()).hexdigest()
    assert data_hash(tmp_path / "a.safetensors") == data_hash(tmp_path / "b.safetensors") == expected


def test_embeddings_that_are_none_are_refused(places, learnt, tmp_path, capsys):
    model = places("sd1")
    torch.save({"string_to_param": {"*": torch.zeros(1, 32)}}, tmp_path / "old.pt")
    line = refused(capsys, "a", "-m", model, "--embedding", "old.pt")
    assert "pickled" in line and "use the .safetensors file" in line
    assert "does not exist" in refused(capsys, "a", "-m", model, "--embedding", "absent.safetensors")
    twice = ["--embedding", "toy.safetensors", "--embedding", "toy=other.safetensors"]
    assert "two embeddings are called 'toy'" in refused(capsys, "a", "-m", model, *twice)
    save_file({"emb_params": torch.zeros(1, 48)}, tmp_path / "wide.safetensors")
    assert "width 48" in refused(capsys, "a", "-m", model, "--embedding", "wide.safetensors")
    assert "for checkpoints" in refused(capsys, "a", "-m", "pocket", "--embedding", "toy.safetensors")
    for bad in ("=toy.safetensors", "toy="):
        with pytest.raises(InputError, match="FILE or NAME=FILE"):
            parse.embeddings([bad])
    (tmp_path / "a=b.safetensors").write_bytes(b"")
    assert parse.embeddings(["a=b.safetensors", "c=a=b.safetensors"]) == {
        "a=b": Path("a=b.safetensors"),
        "c": Path("a=b.safetensors"),
    }
    with pytest.raises(InputError, match="two embeddings"):
        load(model, embeddings=[learnt, learnt])


# --- rules ---------------------------------------------------------------------------------------------------------


def test_rules_and_weights_of_prompts(places, capsys):
    model = places("sd1")
    plain = draw(model, prompt="a cat")
    shouted = draw(model, "--prompt-rules", "compel", prompt="a cat++")
    assert (shouted != plain).any()
    request = read_recipe("out.png")["request"]
    assert request["prompt_rules"] == "compel" and "weighting" not in request
    assert (again(model) == shouted).all()
    assert (draw(model, "--prompt-rules", "compel", "--weighting", "none", prompt="a cat++") == plain).all()
    assert (
        draw(model, "--prompt-rules", "none", prompt="a (cat:1.5)") != draw(model, prompt="a (cat:1.5)")
    ).any()
    kept = draw(model, "--weighting", "a1111_no_norm", prompt="a (cat:1.5)")
    assert "Emphasis: No norm" in parameters("out.png") and (again(model) == kept).all()
    assert "known are a1111, comfy, compel, none" in refused(
        capsys, "a", "-m", model, "--prompt-rules", "webui"
    )
    assert "known are a1111, a1111_no_norm" in refused(capsys, "a", "-m", model, "--weighting", "x")
    assert "knows nothing of prompt_rules" in refused(capsys, "a", "--prompt-rules", "compel")


@pytest.mark.parametrize("rules", [None, "a1111", "comfy", "compel", "none"])
@pytest.mark.parametrize("weighting", [None, "a1111", "a1111_no_norm", "comfy", "compel", "none"])
def test_the_web_ui_s_form_of_rules_comes_back(rules, weighting):
    request = Request("a", steps=4, guidance=2.0, prompt_rules=rules, weighting=weighting)
    text = webui.write({"request": request.to_dict()}, "sfumato 9")
    found, ignored = webui.read(text)
    assert (found.get("prompt_rules"), found.get("weighting")) == (rules, weighting) and not ignored


@pytest.mark.parametrize(
    ("emphasis", "expected"),
    [("Original", {}), ("None", {"prompt_rules": "none"}), ("Ignore", {"weighting": "none"}),
     ("No norm", {"weighting": "a1111_no_norm"})],
)  # fmt: skip
def test_the_web_ui_s_emphasis_is_understood(emphasis, expected):
    found, ignored = webui.read(f"a (cat:1.2)\nSteps: 4, Sampler: Euler, Seed: 1, Emphasis: {emphasis}")
    assert {name: found[name] for name in ("prompt_rules", "weighting") if name in found} == expected
    assert ignored == []


# --- sizes and crops -----------------------------------------------------------------------------------------------


def test_what_sdxl_is_told_of_sizes(places, capsys):
    model = places("sdxl")
    plain = draw(model)
    told = ["--micro", "original=4096x2048", "--micro", "crop=0,64", "--micro", "negative-original=64"]
    cropped = draw(model, *told)
    assert (cropped != plain).any()
    assert read_recipe("out.png")["request"]["micro"] == {
        "original": [4096, 2048],
        "crop": [0, 64],
        "negative_original": [64, 64],
    }
    assert "SDXL original: 4096x2048, SDXL crop: 0x64, SDXL negative original: 64x64" in parameters("out.png")
    assert webui.read(parameters("out.png"))[0]["micro"] == {
        "original": (4096, 2048),
        "crop": (0, 64),
        "negative_original": (64, 64),
    }
    assert (again(model) == cropped).all()
    assert run(["generate", "--like", "out.png", "-m", model, "--dtype", "fp32", "--micro", "none"]) == 0
    assert (pixels("out.png") == plain).all()
    # the sizes that are true anyway change nothing
    assert (
        draw(model, "--micro", "original=32", "--micro", "target=32", "--micro", "crop=0,0") == plain
    ).all()
    assert "knows nothing of micro.aesthetic" in refused(capsys, "a", "-m", model, "--micro", "aesthetic=6")
    assert "knows nothing of micro.crop" in refused(capsys, "a", "-m", places("sd1"), "--micro", "crop=0,0")


def test_no_negative_and_an_empty_one_are_two_things_to_sdxl(places):
    model = places("sdxl")
    assert (draw(model, "--negative", "") != draw(model, out="none.png")).any()
    assert read_recipe("out.png")["request"]["negative"] == ""
    assert "negative" not in read_recipe("none.png")["request"]
    assert (draw(places("sd1"), "--negative", "") == draw(places("sd1"))).all()


@pytest.mark.parametrize("bad", ["crop", "crop=1", "crop=1,x", "original=", "size=4x4", "aesthetic=x", "crop=-1,0",
                                 "original=0x4", "aesthetic=11", "target=99999x4"])  # fmt: skip
def test_sizes_that_are_none_are_refused(bad, capsys):
    assert "micro" in refused(capsys, "a", "--micro", bad)


def test_sizes_given_twice_are_refused():
    with pytest.raises(InputError, match="twice"):
        parse.micro(["crop=0,0", "crop=1,1"])
    with pytest.raises(InputError, match=r"\(left, top\)") as caught:
        Request(micro=Micro(crop=(1, 2, 3))).validate()
    assert caught.value.argument == "micro.crop"
    with pytest.raises(InputError, match="no field 'cropp'"):
        Request.from_dict({"micro": {"cropp": [0, 0]}})
    assert Request.from_dict({"micro": {"crop": [1, 2]}}).micro == Micro(crop=(1, 2))


# --- base and refiner ----------------------------------------------------------------------------------------------


def test_a_refiner_finishes_the_picture(places, capsys):
    base, refiner = places("sdxl"), places("sdxl-refiner")
    plain = draw(base, "--steps", "4", "--micro", "crop=0,8")
    refined = draw(
        base, "--steps", "4", "--refiner", f"{refiner}:0.5", "--micro", "crop=0,8", "--micro", "aesthetic=3"
    )
    assert (refined != plain).any()
    recipe = read_recipe("out.png")
    assert recipe["request"]["refine_at"] == 0.5 and recipe["refiner"]["model"] == refiner
    assert (
        recipe["model"] == base and recipe["refiner"]["weights"]["denoiser"] != recipe["weights"]["denoiser"]
    )
    assert "Refiner switch at: 0.5" in parameters("out.png")
    assert (again(base, "--refiner", refiner) == refined).all()
    assert "finished by the refiner" in refused(capsys, "--like", "out.png", "-m", base)
    assert run(["generate", "--like", "out.png", "-m", base, "--dtype", "fp32", "--refiner", "none",
                "--micro", "none", "--micro", "crop=0,8", "-o", "x.png"]) == 2  # fmt: skip
    draw(base, "--refiner", refiner)
    assert read_recipe("out.png")["request"]["refine_at"] == 0.8


LONG = [pytest.param(name, marks=pytest.mark.full) for name in ("euler_a", "lcm", "heun")]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde", *LONG])
def test_a_model_that_hands_over_to_itself_changes_nothing(places, sampler):
    """Levels and noise go on as if there had been no change; so it must be for samplers without memory."""
    model = places("sdxl")
    whole = draw(model, "--steps", "5", "--sampler", sampler, "--schedule", "karras", "-n", "1")
    assert (draw(model, "--steps", "5", "--sampler", sampler, "--schedule", "karras", "--refiner", f"{model}:0.6")
            == whole).all()  # fmt: skip


@pytest.mark.full
def test_handing_over_in_a_mask_and_before_a_second_pass(places):
    model, refiner = places("sdxl"), places("sdxl-refiner")
    random = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(random).save("in.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 4:30] = 255
    Image.fromarray(mask).save("mask.png")
    refine = ["--refiner", f"{refiner}:0.5", "--steps", "4"]
    painted = draw(model, *refine, "--image", "in.png", "--mask", "mask.png")
    assert (painted[mask == 0] == random[mask == 0]).all() and (painted != random).any()
    large = draw(model, *refine, "--hires", "2", "--hires-strength", "0.5")
    assert large.shape == (64, 64, 3)
    assert (again(model, "--refiner", refiner) == large).all()


def test_refiners_that_cannot_take_over_are_refused(places, capsys):
    line = refused(capsys, "a", "-m", places("sd1"), "--refiner", places("sdxl-refiner"))
    assert "does not draw in the latents" in line
    assert "does not draw in the latents" in refused(capsys, "a", "--refiner", places("sd1"))
    line = refused(capsys, "a", "-m", places("sdxl"), "--refiner", places("sdxl-refiner") + ":1.5")
    assert "with a share of the noise levels from 0 to 1, not '1.5'" in line
    with pytest.raises(InputError, match="needs a refiner"):
        load(places("sdxl")).complete(Request(refine_at=0.8))
    model = load(places("sdxl"), refiner=places("sdxl-refiner"))
    with pytest.raises(InputError, match="leave out refine_at"):
        model.generate_pixels(["a"], [0], size=(32, 32), steps=1)
    assert parse.refiner("a/b.safetensors:0.7") == ("a/b.safetensors", 0.7)
    assert parse.refiner("org/name") == ("org/name", None)
    with pytest.raises(InputError, match="refiner must be MODEL or MODEL:SHARE"):
        parse.refiner("a:b")


# --- U-Nets alone --------------------------------------------------------------------------------------------------


def test_a_unet_alone_draws_with_the_parts_of_another(places, tmp_path, capsys):
    whole, other = places("sd1"), places("sd1", 6)
    unet = f"{other}/unet/diffusion_pytorch_model.safetensors"
    expected = draw(other)
    assert (draw(unet, "--parts", other) == expected).all()
    mixed = draw(unet, "--parts", whole)
    assert (mixed != expected).any() and (again(unet, "--parts", whole) == mixed).all()
    weights = {name: read_recipe("out.png")["weights"][name] for name in ("autoencoder", "denoiser")}
    draw(whole)
    assert weights["autoencoder"] == read_recipe("out.png")["weights"]["autoencoder"]
    assert weights["denoiser"] != read_recipe("out.png")["weights"]["denoiser"]
    assert "take them from with --parts" in refused(capsys, "a", "-m", unet)
    assert "whose parts do not go with" in refused(capsys, "a", "-m", unet, "--parts", places("sdxl"))
    assert "is whole" in refused(capsys, "a", "-m", whole, "--parts", other)
    assert "is for checkpoints" in refused(capsys, "a", "-m", "pocket", "--parts", other)
    with pytest.raises(InputError, match="goes with a U-Net; a vae is f8c4 alone"):
        completed(Checkpoint("f8c4", None, {}, alone=True), "a vae", [whole])
    # an inpainting U-Net takes the parts of its plain sibling
    draw(f"{places('sd1-inpaint')}/unet", "--parts", whole)


# --- a folder's own tokenizer --------------------------------------------------------------------------------------


def test_a_folder_s_own_tokenizer_is_used(places, tmp_path):
    """Two words change places in the vocabulary, and so do the pictures."""
    place = write("sd1", tmp_path / "model")
    cat, dog = draw(str(place), prompt="a cat"), draw(str(place), prompt="a dog")
    assert (cat != dog).any()
    vocabulary = read_json(place / "tokenizer" / "vocab.json")
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    write_json(place / "tokenizer" / "vocab.json", vocabulary)
    assert (draw(str(place), prompt="a cat") == dog).all()
    (place / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="vocabulary"):
        load(place)
    for file in (place / "tokenizer").iterdir():
        file.unlink()
    assert (draw(str(place), prompt="a cat") == cat).all()


# --- previews and presets ------------------------------------------------------------------------------------------


def test_a_vae_without_known_colours_is_previewed_by_decoding(tmp_path):
    place = write("sd1", tmp_path / "model")
    config = read_json(place / "vae" / folder.CONFIG) | {"scaling_factor": 0.5}
    write_json(place / "vae" / folder.CONFIG, config)
    draw(str(place), "--preview")
    model = load(place, dtype=torch.float32)
    latent = torch.randn(1, 4, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    assert model.preview(latent).size == (64, 40)  # 16 cells of 4 pixels
    small = torch.randn(1, 4, 1, 8, 6, generator=torch.Generator().manual_seed(0))
    assert model.preview(small).tobytes() == model.decode(small)[0].tobytes()
    assert load(write("sd1", tmp_path / "known")).preview(latent).size == (40, 24)  # one pixel a cell


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


# --- what the recipe says of the weights ---------------------------------------------------------------------------


def test_a_recipe_names_the_weights_of_every_part(places, capsys):
    base, other, refiner = places("sdxl"), places("sdxl", 6), places("sdxl-refiner")
    draw(base, "--refiner", refiner)
    recipe = read_recipe("out.png")
    parts = {"autoencoder", "denoiser", "text_encoder", "text_encoder_2"}
    assert set(recipe["weights"]) == parts and len(set(recipe["weights"].values())) == 4
    assert set(recipe["refiner"]["weights"]) == parts - {"text_encoder"}
    for part, network in (("text_encoder", "text_encoder"), ("autoencoder", "vae")):
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        file = f"{base}/{network}/{name}.safetensors"
        assert recipe["weights"][part] == tensors_hash(load_tensors(file))
    draw(base, "--vae", other)
    mixed = read_recipe("out.png")["weights"]
    assert {part for part in parts if mixed[part] != recipe["weights"][part]} == {"autoencoder"}
    assert mixed["autoencoder"] != recipe["weights"]["autoencoder"] and len(mixed) == 4
    capsys.readouterr()
    again(base)
    line = capsys.readouterr().err
    assert "with other weights of autoencoder" in line and "give it by --vae" in line
    again(other, "--vae", other)
    assert "by other weights, of the model" in capsys.readouterr().err


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
