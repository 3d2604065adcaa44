"""`sfumato generate` with pictures: what its options do, what it refuses to read, and what it takes from a picture."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers import interrupted, noise, tiny_folder
from sfumato.cli import parse
from sfumato.cli.app import run
from sfumato.errors import InputError
from sfumato.receipts.provenance import read_recipe

LIGHT = ["--steps", "2", "--seed", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def request_of(path: str) -> dict:
    return read_recipe(path)["request"]


def draw(model: str, *arguments: str, prompt: str = "a red cube") -> None:
    assert run(["generate", prompt, "-m", model, *LIGHT, *arguments]) == 0


# --- what the options do -----------------------------------------------------------------------------------------


def test_a_picture_to_begin_with(model, capsys):
    noise(40, 24).save("in.png")
    draw(model, "--image", "in.png", "--strength", "0.5", "-o", "half.png")
    draw(model, "--image", "in.png", "--strength", "1", "-o", "full.png")
    draw(model, "--size", "40x24", "-o", "free.png")
    assert request_of("half.png")["size"] == [40, 24] and request_of("half.png")["strength"] == 0.5
    assert request_of("half.png")["image"].startswith("sha256:")
    assert (pixels("full.png") == pixels("free.png")).all() and (
        pixels("half.png") != pixels("full.png")
    ).any()


def test_a_mask_leaves_the_rest_to_the_byte(model, capsys):
    noise(32, 32).save("in.webp", lossless=True)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 20, 30))
    mask.save("mask.png")
    draw(model, "--image", "in.webp", "--mask", "mask.png", "--mask-blur", "2", "-o", "out.png")
    outside = np.asarray(mask) == 0
    assert (pixels("out.png")[outside] == pixels("in.webp")[outside]).all()
    assert (pixels("out.png")[~outside] != pixels("in.webp")[~outside]).any()
    draw(model, "--image", "in.webp", "--mask", "mask.png", "--no-paste", "-o", "own.png")
    assert (pixels("own.png")[outside] != pixels("in.webp")[outside]).any()
    noise(75, 51).save("large.png")
    mask.resize((75, 51)).save("mask.png")
    draw(model, "--image", "large.png", "--mask", "mask.png", "--only-masked", "6", "-o", "part.png")
    outside = pixels("mask.png")[..., 0] < 128
    assert (pixels("part.png")[outside] == pixels("large.png")[outside]).all()
    assert request_of("part.png")["inpaint"] == {"blur": 4, "paste": True, "padding": 6}


def test_beyond_the_borders_larger_and_varied(model, capsys):
    noise(16, 16).save("in.png")
    draw(model, "--image", "in.png", "--outpaint", "8,0,16,8", "-o", "out.png")
    assert pixels("out.png").shape == (24, 40, 3)
    assert (pixels("out.png")[:16, 8:24] == pixels("in.png")).all()
    draw(
        model, "--hires", "1.5", "--hires-strength", "0.5", "--upscaler", "latent-bilinear", "-o", "large.png"
    )
    assert pixels("large.png").shape == (48, 48, 3)
    draw(model, "--variation", "9:1", "-o", "varied.png")
    draw(model, "--seed", "9", "-o", "nine.png")
    assert (pixels("varied.png") == pixels("nine.png")).all()
    draw(model, "--sampler", "ddim", "--eta", "1", "-n", "2", "--variation", "9:0.2", "-o", "v.png")
    assert request_of("v-1.png")["variation"] == {"seed": 10, "strength": 0.2}


def test_values_of_the_command_line():
    assert parse.sides("outpaint", "8") == (8, 8, 8, 8)
    assert parse.sides("outpaint", "8, 0,16,+3") == (8, 0, 16, 3)
    assert parse.variation("7:0.25") == {"seed": 7, "strength": 0.25}
    for bad in ("", "8,8", "a", "1,2,3,4,5", "1,2,3,x"):
        with pytest.raises(InputError, match="outpaint"):
            parse.sides("outpaint", bad)
    for bad in ("7", "", ":", "7:", ":0.2", "7:x"):
        with pytest.raises(InputError, match="variation"):
            parse.variation(bad)


# --- what it refuses -------------------------------------------------------------------------------------------------


REFUSED = {
    "no such image": (["--image", "absent.png"], "image 'absent.png' does not exist"),
    "a folder": (["--image", "."], "image '.' is not a file"),
    "a device": (["--image", "/dev/zero"], "is not a file"),
    "strength alone": (["--strength", "0.5"], "strength needs an --image"),
    "mask alone": (["--mask", "ok.png"], "mask needs an --image"),
    "outpaint alone": (["--outpaint", "8"], "outpaint needs an --image"),
    "strength 2": (["--image", "ok.png", "--strength", "2"], "strength must be between 0 and 1, not 2.0"),
    "strength nan": (["--image", "ok.png", "--strength", "nan"], "strength must be between 0 and 1"),
    "too little strength": (["--image", "ok.png", "--strength", "0.1"], "give at least 0.5"),
    "fit": (["--image", "ok.png", "--fit", "crop"], '--fit must be cover, contain or stretch, not "crop"'),
    "another size": (["--image", "ok.png", "--size", "64"], "image is 32x32, but --size asks for 64x64"),
    "odd size": (
        ["--image", "odd.png"],
        "image is 33x31, not a multiple of 8 pixels; the nearest legal size is 32x32",
    ),
    "mask of another size": (["--image", "ok.png", "--mask", "odd.png"], "mask is 33x31 and image 32x32"),
    "black mask": (["--image", "ok.png", "--mask", "black.png"], "mask is black everywhere"),
    "blur alone": (["--image", "ok.png", "--mask-blur", "3"], "--mask-blur needs a --mask, or --outpaint"),
    "blur -1": (
        ["--image", "ok.png", "--mask", "ok.png", "--mask-blur", "-1"],
        "--mask-blur must be between",
    ),
    "outpaint x": (["--image", "ok.png", "--outpaint", "right"], "outpaint must be"),
    "outpaint 0": (["--image", "ok.png", "--outpaint", "0"], "outpaint adds no pixels"),
    "outpaint 3": (["--image", "ok.png", "--outpaint", "3"], "with outpaint 38x38, not a multiple of 8"),
    "hires of odd size": (["--hires", "1.3"], "--hires 1.3 makes 41.6x41.6 of 32x32"),
    "hires x": (["--hires", "big"], "hires must be a number, not 'big'"),
    "hires 0": (["--hires", "0"], "--hires must be between 1 and 16"),
    "hires strength alone": (["--hires-strength", "0.5"], "go with --hires SCALE"),
    "upscaler": (
        ["--hires", "2", "--upscaler", "esrgan"],
        '--upscaler "esrgan" is unknown; use one of latent-nearest',
    ),
    "hires in a mask": (["--image", "ok.png", "--mask", "ok.png", "--hires", "2"], "do one after the other"),
    "variation": (["--variation", "7"], "variation must be like SEED:STRENGTH"),
    "variation 2": (["--variation", "7:2"], "--variation strength must be between 0 and 1"),
    "eta": (["--sampler", "euler", "--eta", "1"], "--eta means nothing to the sampler euler"),
    "clip skip": (["--clip-skip", "2"], "--clip-skip 2 is more than this model's text encoder allows, 1"),
    "like nothing": (["--like", "absent.png"], "like 'absent.png' does not exist"),
    "like a plain picture": (["--like", "ok.png"], "ok.png does not say how it was made"),
    "like no picture": (["--like", "text.png"], "like 'text.png' is not a picture"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_one_line_exit_2_and_no_file(model, capsys, case):
    noise(32, 32).save("ok.png")
    noise(33, 31).save("odd.png")
    Image.new("L", (32, 32)).save("black.png")
    Path("text.png").write_text("hello")
    arguments, said = REFUSED[case]
    assert run(["generate", "a", "-m", model, "-o", "out.png", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert said in err
    assert not Path("out.png").exists()


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + bytes(3 * 32))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


def hostile() -> dict[str, tuple[bytes, str]]:
    """The catalogue's pictures that are refused, and what is said of each."""
    whole = encoded(noise(32, 32))
    return {
        "a bomb": (png(65_500, 65_500), "has 65500×65500 pixels; at most 64,000,000"),
        "a bomb of text": (
            png(32, 32, chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**23)))),
            "a zTXt chunk that unfolds to more than 1,048,576 bytes",
        ),
        "FITS": (b"SIMPLE  =                    T" + bytes(2850), "is a FITS file"),
        "PSD": (b"8BPS\0\1" + bytes(40), "is a Photoshop file"),
        "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is a PostScript file"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "is an SVG"),
        "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "is a HEIC"),
        "GIF": (encoded(noise(32, 32), "GIF"), "is a GIF"),
        "TIFF": (encoded(noise(32, 32), "TIFF"), "is a TIFF"),
        "cut short": (whole[: len(whole) // 2], "is cut short"),
        "a JPEG cut short": (encoded(noise(32, 32), "JPEG")[:700], "is damaged or cut short"),
        "zero bytes": (bytes(5000), "is filled with zero bytes"),
        "empty": (b"", "is an empty file"),
        "a pickle": (b"\x80\x04\x95cos\nsystem", "is not a picture"),
        "a damaged chunk": (whole.replace(b"IDAT", b"IDAU"), "checksum"),
    }


HOSTILE = hostile()


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("option", ["image", "mask", "like"])
def test_hostile_pictures_are_one_line_exit_2_and_no_file(model, capsys, case, option):
    data, said = HOSTILE[case]
    Path("x.png").write_bytes(data)
    noise(32, 32).save("ok.png")
    image = [] if option != "mask" else ["--image", "ok.png"]
    assert run(["generate", "a", "-m", model, *image, f"--{option}", "x.png"]) == 2
    out, err = capsys.readouterr()
    if option == "like" and case == "a JPEG cut short":  # what it says would stand before the cut
        said = "x.png does not say how it was made"
    else:
        assert err.startswith(f"error: --{option} 'x.png' ")
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert said in err and len(err) < 300
    assert sorted(os.listdir()) == ["ok.png", "x.png"]


def unusual() -> dict[str, tuple[bytes, Image.Image]]:
    """The catalogue's pictures that are read, and what they show."""
    turn = Image.Exif()
    turn[0x0112] = 6
    plain = noise(32, 16)
    wide = (np.asarray(plain)[..., :1].astype(np.uint16) * 257)[..., 0]
    grey = plain.getchannel("R")
    frames = [plain, noise(32, 16, 1)]
    script = PngInfo()
    script.add_text("Comment", "<script>alert(1)</script>")
    return {
        "turned": (encoded(plain.transpose(Image.Transpose.ROTATE_90), exif=turn), plain),
        "16 bits": (encoded(Image.fromarray(wide)), grey),
        "moving": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), plain),
        "a moving PNG": (encoded(frames[0], save_all=True, append_images=frames[1:]), plain),
        "a false extension": (encoded(plain, "WEBP", lossless=True), plain),
        "a broken profile": (encoded(plain, icc_profile=b"not a profile" * 9), plain),
        "a script": (encoded(plain, pnginfo=script), plain),
        "a palette": (encoded(plain.quantize(16)), plain.quantize(16).convert("RGB")),
    }


UNUSUAL = unusual()


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_pictures_are_read_as_what_they_show(model, capsys, case):
    data, shows = UNUSUAL[case]
    Path("x.png").write_bytes(data)
    shows.convert("RGB").save("plain.png")
    draw(model, "--image", "x.png", "--strength", "0.5", "-o", "one.png")
    draw(model, "--image", "plain.png", "--strength", "0.5", "-o", "two.png")
    assert Path("one.png").read_bytes().count(b"<script") == 0
    assert (pixels("one.png") == pixels("two.png")).all()
    assert request_of("one.png")["image"] == request_of("two.png")["image"]


def test_a_cmyk_jpeg_is_read_as_its_colours(model):
    inks = Image.new("CMYK", (32, 32), (0, 255, 255, 0))  # magenta and yellow in full: red
    Path("x.jpg").write_bytes(encoded(inks, "JPEG", quality=100))
    shown = np.asarray(parse.picture("image", Path("x.jpg"))).astype(int)
    assert np.abs(shown - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1)])
@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_pictures_of_extreme_shape(model, capsys, size, fit):
    Image.new("RGB", size, "teal").save("x.png")
    draw(model, "--image", "x.png", "--size", "32x16", "--fit", fit, "--strength", "0.5")
    assert pixels("out.png").shape == (16, 32, 3)


# --- like ------------------------------------------------------------------------------------------------------------


def test_like_draws_the_same_again_and_what_is_given_wins(model, capsys):
    draw(
        model,
        "--negative",
        "a",
        "--guidance",
        "2.5",
        "--sampler",
        "euler_a",
        "--size",
        "40",
        "-n",
        "2",
        "-o",
        "a.png",
    )
    capsys.readouterr()
    assert run(["generate", "--like", "a-1.png", "-m", model, "-o", "b.png"]) == 0
    assert capsys.readouterr() == ("b.png\n", "")
    assert request_of("b.png") == request_of("a-1.png") and request_of("b.png")["seed"] == 6
    assert np.abs(pixels("b.png") - pixels("a-1.png")).max() <= 1
    given = ["--seed", "0", "--negative", "", "-n", "1", "--size", "32x24", "--sampler", "heun"]
    assert run(["generate", "a cube", "--like", "a-1.png", "-m", model, *given, "-o", "c.png"]) == 0
    changed = {"prompt": "a cube", "seed": 0, "negative": "", "size": [32, 24], "sampler": "heun"}
    assert request_of("c.png") == request_of("a-1.png") | changed


def test_approximations_are_options_that_like_takes_over_or_leaves(model, capsys):
    draw(model, "--steps", "4", "--reuse", "2", "--guidance-interval", "0.5:1", "-o", "a.png")
    assert request_of("a.png")["reuse"] == 2 and request_of("a.png")["guidance_interval"] == [0.5, 1.0]
    assert run(["generate", "--like", "a.png", "-m", model, "-o", "b.png"]) == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    exact = ["--reuse", "1", "--guidance-interval", "none"]
    assert run(["generate", "--like", "a.png", "-m", model, *exact, "-o", "c.png"]) == 0
    draw(model, "--steps", "4", "-o", "d.png")
    assert (pixels("c.png") == pixels("d.png")).all() and (pixels("c.png") != pixels("a.png")).any()


def test_like_asks_for_the_pictures_it_began_with(model, capsys):
    noise(32, 32).save("in.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (4, 4, 30, 20))
    mask.save("mask.png")
    draw(model, "--image", "in.png", "--mask", "mask.png", "--mask-blur", "1", "-o", "a.png")
    draw(model, "--image", "in.png", "--outpaint", "8", "-o", "o.png")
    for arguments, said in (
        ([], "a.png began with another picture; give that one, or a new one, by --image"),
        (["--image", "in.png"], "a.png was painted inside a mask; give it, or a new one, by --mask"),
    ):
        assert run(["generate", "--like", "a.png", "-m", model, "-o", "b.png", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert (
        run(
            [
                "generate",
                "--like",
                "a.png",
                "-m",
                model,
                "--image",
                "in.png",
                "--mask",
                "mask.png",
                "-o",
                "b.png",
            ]
        )
        == 0
    )
    assert (pixels("b.png") == pixels("a.png")).all()
    assert run(["generate", "--like", "o.png", "-m", model, "--image", "in.png", "-o", "p.png"]) == 0
    assert (pixels("o.png") == pixels("p.png")).all()


def save_with(path: str, text: str) -> None:
    info = PngInfo()
    info.add_text("parameters", text)
    noise(8, 8).save(path, pnginfo=info)


def test_like_a_web_ui_s_picture(model, capsys):
    save_with(
        "fox.png",
        "a red cube\nNegative prompt: a\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2.5, Seed: 77, "
        "Size: 40x32, Model hash: 6ce0161689, Model: v1-5-pruned, Denoising strength: 0.5, Hires upscale: 2, "
        "Hires upscaler: 4x-UltraSharp, ADetailer model: face_yolov8n.pt, Version: v1.10.1",
    )
    assert run(["generate", "--like", "fox.png", "-m", model]) == 2
    assert (
        "the upscaler '4x-UltraSharp', which is not here; choose one of latent-bilinear"
        in capsys.readouterr().err
    )
    assert run(["generate", "--like", "fox.png", "-m", model, "--upscaler", "lanczos", "-o", "a.png"]) == 0
    out, err = capsys.readouterr()
    assert out == "a.png\n"
    assert err == (
        f"note: fox.png was drawn by the model 'v1-5-pruned'; this one is '{model}'\n"
        "note: not taken over from fox.png: ADetailer model\n"
    )
    made = request_of("a.png")
    assert (made["prompt"], made["negative"], made["seed"], made["size"]) == ("a red cube", "a", 77, [40, 32])
    assert (made["sampler"], made["schedule"], made["guidance"]) == ("dpmpp_2m", "karras", 2.5)
    assert made["hires"] == {"scale": 2.0, "strength": 0.5, "upscaler": "lanczos"}
    assert run(["generate", "--like", "fox.png", "-m", model, "--hires", "none", "-o", "b.png"]) == 0
    assert "hires" not in request_of("b.png") and "strength" not in request_of("b.png")


def test_like_names_a_sampler_that_is_not_here(model, capsys):
    save_with("fox.png", "a\nSteps: 2, Sampler: Restart, CFG scale: 2, Seed: 77, Size: 32x32")
    assert run(["generate", "--like", "fox.png", "-m", model]) == 2
    assert "fox.png: it was drawn with the sampler 'Restart', which is not here" in capsys.readouterr().err
    assert run(["generate", "--like", "fox.png", "-m", model, "--sampler", "heun"]) == 0


@pytest.mark.parametrize(
    "recipe",
    [
        {"request": {"prompt": "a", "steps": -1}},
        {"request": {"prompt": "a", "unknown": 1}},
        {"request": {"prompt": "a\0"}},
        {"request": {"prompt": "a", "hires": {"scale": "x"}}},
        {"request": {"prompt": "a", "image": "../../etc/passwd", "strength": 0.5}},
        {"request": []},
        {},
    ],
    ids=lambda recipe: json.dumps(recipe)[:50],
)
def test_hostile_recipes_are_refused(model, capsys, recipe):
    info = PngInfo()
    info.add_text("sfumato", json.dumps(recipe))
    noise(8, 8).save("x.png", pnginfo=info)
    assert run(["generate", "--like", "x.png", "-m", model]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and os.listdir() == ["x.png"]


def test_a_stranger_s_picture_does_not_choose_which_model_is_opened(model, capsys):
    info = PngInfo()
    request = {"prompt": "a", "steps": 1, "size": [32, 32]}
    info.add_text("sfumato", json.dumps({"request": request, "model": model, "weights": {"denoiser": "0"}}))
    noise(8, 8).save("x.png", pnginfo=info)
    assert run(["generate", "--like", "x.png", "-o", "out.png"]) == 0
    assert read_recipe("out.png")["model"] != model
    assert (
        f"x.png was drawn by other weights, of the model '{model}'; choose the model by -m"
        in capsys.readouterr().err
    )


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image", "in.png", "--mask", "in.png", "--size", "256", "--fit", "stretch", "-n", "8"],
        ["--hires", "8", "--hires-steps", "1000", "--hires-strength", "1"],
    ],
    ids=["mask", "second pass"],
)
def test_interruption_leaves_the_old_files_and_nothing_else(model, arguments):
    noise(32, 32).save("in.png")
    Path("out-0.png").write_text("old")
    steps = "1" if "--hires" in arguments else "1000"
    command = ["generate", "a", "-m", model, "--steps", steps, "--preview", *arguments]
    code, err = interrupted(command, sign=Path("out-preview.png"))
    assert code == 130 and err.splitlines()[-1] == "stopped" and "Traceback" not in err
    assert sorted(os.listdir()) == ["in.png", "out-0.png"]
    assert Path("out-0.png").read_text() == "old"


def test_skip_layer_guidance_goes_into_the_recipe_and_comes_back(model, capsys):
    draw(
        model,
        "--skip-layers",
        "0",
        "--skip-scale",
        "3",
        "--skip-interval",
        "0:1",
        "--steps",
        "4",
        "-o",
        "a.png",
    )
    said = {"layers": [0], "scale": 3.0, "interval": [0.0, 1.0]}
    assert request_of("a.png")["skip_layers"] == said
    assert run(["generate", "--like", "a.png", "-m", model, "--skip-scale", "0.5", "-o", "b.png"]) == 0
    assert request_of("b.png")["skip_layers"] == said | {"scale": 0.5}
    assert run(["generate", "--like", "a.png", "-m", model, "--skip-layers", "none", "-o", "c.png"]) == 0
    assert "skip_layers" not in request_of("c.png")
    capsys.readouterr()
    for arguments, message in (
        (["--skip-scale", "3"], "go with --skip-layers, such as 7,8,9"),
        (["--skip-layers", "a"], "skip-layers must be a whole number"),
        (["--skip-layers", "99"], "this model's network has 0 to"),
        (["--no-t5"], "without is for checkpoints"),
        (["--text-dtype", "fp16"], "text-dtype must be one of fp32, bf16, int8"),
        (["--text-length", "77"], "knows nothing of --text-length"),
    ):
        assert run(["generate", "a cube", "-m", model, *arguments, "-o", "d.png"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
