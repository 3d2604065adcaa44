"""`sfumato replay`: identical, near or different, and what of the recipe is another."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers import noise, tiny_folder
from sfumato.cli.app import run
from sfumato.receipts.provenance import read_recipe
from sfumato.receipts.replay import changed, difference
from sfumato.storage import save_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def draw(model: Path, *arguments: str) -> None:
    told = ["generate", "a red cube", "-m", str(model), "--steps", "2", *arguments]
    assert run(told) == 0


def again(file: str, *arguments: str, capsys) -> dict:
    capsys.readouterr()
    assert run(["replay", file, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["out.png", "out.webp", "out.jpg"])
def test_it_is_identical(model, capsys, name):
    draw(model, "-o", name, "--seed", "7")
    told = again(name, "-m", str(model), "--verify", "-o", "again.png", capsys=capsys)
    assert told["verdict"] == "identical" and told["changed"] == [] and told["psnr"] is None
    assert read_recipe("again.png")["request"] == read_recipe(name)["request"]


def test_the_model_must_be_given_unless_it_is_ours(model, capsys):
    draw(model, "-o", "out.png")
    capsys.readouterr()
    assert run(["replay", "out.png"]) == 2
    assert "give it by -m" in capsys.readouterr().err
    noise(8, 8).save("plain.png")
    assert run(["replay", "plain.png"]) == 2
    assert "carries no recipe" in capsys.readouterr().err


def test_other_weights_are_named_and_make_another_picture(model, tmp_path, capsys):
    draw(model, "-o", "out.png")
    other = tiny_folder(tmp_path / "other")
    (file,) = other.glob("denoiser*.safetensors")
    from sfumato.storage import load_tensors

    tensors = load_tensors(file)
    save_tensors(file, {k: torch.randn_like(v.float()).to(v.dtype) * 0.3 for k, v in tensors.items()})
    told = again("out.png", "-m", str(other), capsys=capsys)
    assert told["verdict"] == "different"
    assert [each["name"] for each in told["changed"]] == ["weights denoiser"]
    assert run(["replay", "out.png", "-m", str(other), "--verify"]) == 3
    assert "changed: weights denoiser: " in capsys.readouterr().out


def test_pictures_it_began_with_are_found_by_their_pixels(model, capsys):
    noise(32, 32).save("start.png")
    noise(32, 32, 1).save("other.png")
    draw(model, "--image", "start.png", "--strength", "0.5", "-o", "out.png")
    capsys.readouterr()
    assert run(["replay", "out.png", "-m", str(model), "--picture", "other.png"]) == 2
    assert "none that --picture gives is the recipe's" in capsys.readouterr().err
    assert run(["replay", "out.png", "-m", str(model)]) == 2
    assert "give the picture itself by --picture" in capsys.readouterr().err
    told = again(
        "out.png", "-m", str(model), "--picture", "other.png", "--picture", "start.png", capsys=capsys
    )
    assert told["verdict"] == "identical"


@pytest.mark.parametrize("option", ["lora", "embedding", "controlnet", "annotator"])
def test_a_file_that_the_recipe_does_not_name_is_refused(model, capsys, option):
    draw(model, "-o", "out.png")
    Path("nope.safetensors").touch()
    told = f"--{option}", "nope=nope.safetensors"
    assert run(["replay", "out.png", "-m", str(model), "--verify", *told]) == 2
    assert f"the recipe has no {option} 'nope': it has none" in capsys.readouterr().err


def test_the_picture_that_is_replayed_is_not_written_over(model, capsys):
    draw(model, "-o", "out.png")
    before = Path("out.png").read_bytes()
    assert run(["replay", "out.png", "-m", str(model), "-o", "./out.png"]) == 2
    assert "is what is replayed" in capsys.readouterr().err and Path("out.png").read_bytes() == before


def test_a_lora_must_be_given(model, capsys):
    shapes = {"up": (192, 2), "down": (2, 64)}
    factors = {f"dit.blocks.0.attn.qkv.lora_{k}.weight": torch.ones(s) * 0.1 for k, s in shapes.items()}
    save_tensors(Path("ink.safetensors"), factors)
    draw(model, "--lora", "ink.safetensors:0.5", "-o", "out.png")
    capsys.readouterr()
    assert run(["replay", "out.png", "-m", str(model)]) == 2
    assert "was drawn with the LoRA 'ink'" in capsys.readouterr().err
    told = again("out.png", "-m", str(model), "--lora", "ink.safetensors", capsys=capsys)
    assert told["verdict"] == "identical"
    factors["dit.blocks.0.attn.qkv.lora_up.weight"] *= 30
    save_tensors(Path("ink.safetensors"), factors)
    told = again("out.png", "-m", str(model), "--lora", "ink.safetensors", capsys=capsys)
    assert told["verdict"] == "different" and [e["name"] for e in told["changed"]] == ["loras ink"]


def test_deterministic_drawings_are_equal_files(model):
    try:
        draw(model, "-o", "one.png", "--deterministic")
        draw(model, "-o", "two.png", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    recipe = read_recipe("one.png")
    assert "seconds" not in recipe and recipe["kernels"]["deterministic"] is True


def test_a_deterministic_file_is_drawn_again_so(model, capsys):
    try:
        draw(model, "-o", "one.png", "--deterministic")
        torch.use_deterministic_algorithms(False)  # as in a process of its own
        told = again("one.png", "-m", str(model), "-o", "two.png", capsys=capsys)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert told["verdict"] == "identical" and told["changed"] == []
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_the_recipe_names_what_draws_the_noise(model, capsys):
    draw(model, "-o", "out.png")
    recipe = read_recipe("out.png")
    assert recipe["noise"] == {"generator": "philox4x64-10", "normals": "box-muller", "device": "cpu"}
    other = recipe | {"noise": {"generator": "mt19937", "device": "cuda"}}
    assert [each.name for each in changed(other, recipe)] == ["noise generator", "noise device"]


def test_how_near_two_pictures_are():
    one = np.full((10, 10, 3), 100, np.uint8)
    assert difference(Image.fromarray(one), Image.fromarray(one)).verdict == "identical"
    near = one.copy()
    near[:, :5] += 3
    found = difference(Image.fromarray(one), Image.fromarray(near))
    assert (found.verdict, found.most, found.share) == ("near", 3, 0.5)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 / 4.5))
    near[0, 0] += 30  # a pixel at an edge
    assert difference(Image.fromarray(one), Image.fromarray(near)).verdict == "near"
    near[0, 0, 0] = 255
    assert difference(Image.fromarray(one), Image.fromarray(near)).verdict == "different"
    far = one.copy()
    far[0] += 30  # a tenth of the values
    assert difference(Image.fromarray(one), Image.fromarray(far)).verdict == "different"
    assert difference(Image.fromarray(one), Image.fromarray(one[:5])) is None


def test_a_region_that_is_another_is_not_near():
    """Few values of all, and none of them far: a square in a corner, and one that lies across the squares measured."""
    one = np.full((128, 128, 3), 100, np.uint8)
    for top, left in ((0, 0), (111, 111), (53, 60)):
        painted = one.copy()
        painted[top : top + 17, left : left + 17] += 12
        found = difference(Image.fromarray(one), Image.fromarray(painted))
        assert found.far < 0.02 and found.most == 12 and found.patch > 11
        assert found.verdict == "different"
    assert difference(Image.fromarray(one[:3, :5]), Image.fromarray(one[:3, :5] + 3)).patch == 3


def test_pixels_changed_after_drawing_are_told(model, capsys):
    draw(model, "-o", "out.png")
    with Image.open("out.png") as read:
        picture, texts = read.copy(), read.text
    red, *others = picture.getpixel((3, 4))
    picture.putpixel(
        (3, 4), (red ^ 1, *others)
    )  # one value, by one: no rounding could be told from it by its size
    notes = PngInfo()
    for name, text in texts.items():
        notes.add_text(name, text)
    picture.save("edited.png", pnginfo=notes)
    told = again("edited.png", "-m", str(model), capsys=capsys)
    assert told["verdict"] == "different" and told["most"] == 1
    assert [each["name"] for each in told["changed"]] == ["pixels"]
    assert run(["replay", "edited.png", "-m", str(model), "--verify"]) == 3
    assert "changed: the file's pixels, after they were drawn" in capsys.readouterr().out


def test_pixels_of_a_jpeg_changed_after_drawing_are_told(model, capsys):
    draw(model, "-o", "out.jpg")
    with Image.open("out.jpg") as read:
        packet, picture = read.info["xmp"], read.copy()
    picture.paste((255, 0, 0), (0, 0, 9, 9))
    picture.save("edited.jpg", quality=95, subsampling=0, xmp=packet)
    told = again("edited.jpg", "-m", str(model), capsys=capsys)
    assert told["verdict"] == "different" and [each["name"] for each in told["changed"]] == ["pixels"]


def test_a_recipe_changed_after_writing_is_told(model, capsys):
    draw(model, "-o", "out.png", "--seed", "5")
    for change in ({"receipt": None}, {"request": read_recipe("out.png")["request"] | {"seed": 6}}):
        recipe = read_recipe("out.png") | change
        notes = PngInfo()
        notes.add_text("sfumato", json.dumps(recipe))
        with Image.open("out.png") as picture:
            picture.save("edited.png", pnginfo=notes)
        told = again("edited.png", "-m", str(model), capsys=capsys)
        assert told["verdict"] == ("different" if "request" in change else "identical")
        assert [each["name"] for each in told["changed"]] == ["recipe"]
        assert run(["replay", "edited.png", "-m", str(model), "--verify"]) == 3
        assert "changed: the file's recipe, after it was written" in capsys.readouterr().out


def test_files_without_digests_are_drawn_again_as_before(model, capsys):
    draw(model, "-o", "out.png")
    for drawn in (None, "x", {"pixels": 3, "recipe": []}):
        notes = PngInfo()
        recipe = read_recipe("out.png") | {"drawn": drawn}
        notes.add_text("sfumato", json.dumps({k: v for k, v in recipe.items() if v is not None}))
        with Image.open("out.png") as picture:
            picture.save("old.png", pnginfo=notes)
        told = again("old.png", "-m", str(model), "--verify", capsys=capsys)
        assert told["verdict"] == "identical" and told["changed"] == []


@pytest.mark.parametrize("hostile", [None, 3, [], {"weights": 4, "kernels": "x", "refiner": []}])
def test_a_stranger_s_recipe_is_compared_as_far_as_it_goes(hostile):
    before = hostile if isinstance(hostile, dict) else {"weights": hostile}
    now = {"weights": {"denoiser": "a"}, "dtype": "float32", "kernels": {"threads": 2}}
    names = [each.name for each in changed(before, now)]
    assert names == ["weights denoiser"]
    assert "was none and is a" in changed(before, now)[0].describe()
