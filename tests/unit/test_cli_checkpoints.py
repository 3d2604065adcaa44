"""`sfumato generate` with a Stable Diffusion: what its options do and refuse, and that `--like` brings them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from drawn_small import again, draw, parameters, pixels, refused
from sfumato import load
from sfumato.cli import parse
from sfumato.cli.app import run
from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd import folder
from sfumato.families.sd.checkpoint import Checkpoint, completed
from sfumato.receipts import webui
from sfumato.receipts.provenance import read_recipe
from sfumato.storage import data_hash, load_tensors, read_json, tensors_hash, write_json
from sfumato.types import Micro, Request
from small_sd import places_in, stand_for_the_published, write


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return places_in(tmp_path_factory.mktemp)


@pytest.fixture(autouse=True)
def _small_kinds_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_for_the_published(monkeypatch)


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
    assert "knows nothing of --prompt-rules" in refused(capsys, "a", "--prompt-rules", "compel")


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
    assert "knows nothing of --micro aesthetic" in refused(capsys, "a", "-m", model, "--micro", "aesthetic=6")
    assert "knows nothing of --micro crop" in refused(capsys, "a", "-m", places("sd1"), "--micro", "crop=0,0")


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
    with pytest.raises(InputError, match=r"two numbers, left and top") as caught:
        Request(micro=Micro(crop=(1, 2, 3))).validate()
    assert caught.value.argument == "micro.crop"
    with pytest.raises(InputError, match='no field "cropp"'):
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


# --- previews -----------------------------------------------------------------------------------------------------


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
