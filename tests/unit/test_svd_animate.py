"""Stable Video Diffusion on the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from helpers import tiny_folder
from sfumato.cli.app import run
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS
from sfumato.receipts.clips import read_recipe
from sfumato.video.read import read_clip
from sfumato.video.write import staged, write_clip
from small_svd import SIZE, SMALL, frames_of, original, picture, write

LIGHT = ["--steps", "2", "--frames", "4", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return write("svd", tmp_path_factory.mktemp("svd") / "model")


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """The small kinds in place of the published ones, and a folder with a picture alone."""
    monkeypatch.chdir(tmp_path)
    for kind, system in SMALL.items():
        monkeypatch.setitem(SYSTEMS, kind, system)
    picture((100, 60)).save("photo.png")
    return tmp_path


def animated(capsys, model: Path | str, *arguments: str) -> dict:
    assert run(["animate", "-m", str(model), *LIGHT, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    assert run(["animate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("out", ["out.mp4", "frames"])
def test_animate(small, place, capsys, out):
    answer = animated(capsys, place, "--image", "photo.png", "-o", out, "--seed", "9", "--motion", "60")
    assert (
        answer["files"] == [out] and answer["seeds"] == [9] and answer["frames"] == 4 and answer["fps"] == 7
    )
    clip = read_clip(out, fps=7)
    assert len(clip.frames) == 4 and clip.size == SIZE
    request = read_recipe(out)["request"]
    assert (request["seed"], request["motion"]["bucket"], request["guidance_first"]) == (9, 60, 1.0)
    assert sorted(os.listdir()) == sorted(["photo.png", out])


@pytest.mark.full
def test_animate_says_where_it_cropped_and_names_the_file(small, place, capsys):
    assert run(["animate", "-m", str(place), *LIGHT, "--image", "photo.png", "--guidance", "2:4"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out.mp4\n"
    assert "photo.png is 100x60 and is cropped to the shape of 64x48" in captured.err
    request = read_recipe("out.mp4")["request"]
    assert (request["guidance_first"], request["guidance"], request["fit"]) == (2.0, 4.0, "cover")
    assert (
        run(["animate", "-m", str(place), *LIGHT, "--image", "photo.png", "--fit", "stretch", "-o", "b.gif"])
        == 0
    )
    assert capsys.readouterr().err == ""


@pytest.mark.full
def test_a_clip_like_another(small, place, capsys):
    animated(capsys, place, "--image", "photo.png", "--seed", "5", "--fps", "12", "-o", "a.webp")
    assert run(["animate", "-m", str(place), "--dtype", "fp32", "--like", "a.webp", "--image", "photo.png",
                "-o", "b.webp"]) == 0  # fmt: skip
    a, b = read_clip("a.webp"), read_clip("b.webp")
    assert [f.tobytes() for f in a.frames] == [f.tobytes() for f in b.frames]
    capsys.readouterr()
    assert "began with a picture; give that one" in refused(capsys, "-m", str(place), "--like", "a.webp")
    assert "carries no recipe of ours" in refused(capsys, "-m", str(place), "--like", "photo.png")


def test_animate_a_single_file(small, capsys):
    save_file(original(), "svd.safetensors")
    answer = animated(capsys, "svd.safetensors", "--image", "photo.png", "-n", "2", "-o", "x.gif")
    assert answer["files"] == ["x-0.gif", "x-1.gif"] and answer["seeds"] == [0, 1]


def test_animate_refuses_in_one_line(small, place, capsys, tmp_path_factory):
    svd = ["-m", str(place), "--dtype", "fp32"]
    assert "sets a picture in motion; give an --image" in refused(capsys, *svd)
    assert "does not exist" in refused(capsys, *svd, "--image", "none.png")
    assert "reads no `prompt`" in refused(capsys, "a cat", *svd, "--image", "photo.png")
    still = ["-m", str(tiny_folder(tmp_path_factory.mktemp("still")))]
    assert "draws pictures and no clips" in refused(capsys, "a cat", *still, "-o", "x.gif")
    assert "must end in .mp4" in refused(capsys, *svd, "--image", "photo.png", "-o", "x.png")
    assert "--frames must be 2 or more" in refused(capsys, *svd, "--image", "photo.png", "--frames", "1")
    assert "frames must be a whole number, not 'x'" in refused(capsys, *svd, "--frames", "x")
    assert "guidance must be a number, not 'a'" in refused(capsys, *svd, "--guidance", "a:3")
    assert "motion must be a whole number" in refused(capsys, *svd, "--motion", "lots")
    Path("text.png").write_text("hello")
    assert "text.png" in refused(capsys, *svd, "--image", "text.png")
    assert sorted(os.listdir()) == ["photo.png", "text.png"]
    assert run(["generate", "a", "-m", str(place)]) == 2
    assert "draws clips and no pictures; use sfumato animate" in capsys.readouterr().err


@pytest.mark.full  # a minute each
def test_animate_plans(small, place, capsys):
    svd = ["animate", "-m", str(place), "--dtype", "fp32", "--image", "photo.png"]
    assert run([*svd, "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan["stages"]) == {"load", "text", "denoise", "decode"} and plan["fits"]
    assert run([*svd, "--memory", "1MB", "--offload", "sequential"]) == 2
    assert "drawing 14 frames of 64x48 needs" in capsys.readouterr().err
    assert os.listdir() == ["photo.png"]


@pytest.mark.full  # a minute each
def test_convert_there_and_back(small, place, capsys):
    assert run(["convert", str(place), "svd.safetensors"]) == 0
    assert run(["convert", "svd.safetensors", "back"]) == 0
    assert sorted(p.name for p in Path("back").iterdir()) == [
        "feature_extractor", IMAGE_ENCODER, "model_index.json", "scheduler", "unet", "vae",
    ]  # fmt: skip
    assert run(["convert", "back", "svd.safetensors"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.full
def test_an_interrupt_leaves_nothing(small, place):
    """Ctrl-C while it draws: exit code 130, one line, no file."""
    code = (
        "import signal, sys; sys.path[:0] = sys.argv.pop(1).split(':')\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell in the background has it ignored
        "from sfumato.families.svd.shapes import SYSTEMS\nfrom small_svd import SMALL\n"
        "SYSTEMS.update(SMALL)\nfrom sfumato.cli.app import run\nsys.exit(run(sys.argv[1:]))"
    )
    tests = Path(__file__).resolve().parents[1]
    places = f"{tests}:{tests.parent / 'src'}"
    child = subprocess.Popen(
        [sys.executable, "-c", code, places, "animate", "-m", str(place), "--dtype", "fp32", "--image",
         "photo.png", "--fit", "cover", "--steps", "1000", "--frames", "40", "-o", "out.mp4", "--preview"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(1200):
        if Path("out-preview.png").exists() or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "stopped\n")
    assert os.listdir() == ["photo.png"]


@pytest.mark.full
def test_pictures_in_files_of_other_forms(small, place, capsys):
    Image.new("RGBA", (70, 50), (10, 20, 30, 0)).save("clear.webp")
    animated(capsys, place, "--image", "clear.webp", "-o", "a.gif")
    Image.new("L", (1, 1)).save("dot.png")
    animated(capsys, place, "--image", "dot.png", "-o", "b.gif")


def test_animate_from_a_clip(small, place, capsys):
    with staged("in.gif") as target:
        write_clip(frames_of(5, (80, 60)), target, "gif", {})
    svd = ["-m", str(place), "--dtype", "fp32", "--steps", "4"]
    assert (
        run(["animate", *svd, "--init", "in.gif", "--strength", "0.5", "--frames", "3", "-o", "out.webp"])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out == "out.webp\n" and captured.err == ""
    request = read_recipe("out.webp")["request"]
    assert request["strength"] == 0.5 and len(request["clip"]["frames"]) == 3
    assert read_clip("out.webp").fps == pytest.approx(12, rel=0.05)
    assert "began with a picture" in refused(capsys, *svd, "--like", "out.webp")
    picture((80, 60)).save("photo.png")
    assert "give that one, or a new one, by --init" in refused(
        capsys, *svd, "--like", "out.webp", "--image", "photo.png"
    )
    still = refused(capsys, *svd, "--init", "photo.png")
    assert "init 'photo.png' is a PNG picture, where a clip is right" in still
    assert still.rstrip().endswith("a picture to begin with is given as --image")
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    assert "is a PNG picture, and a damaged one, where a clip is right" in refused(
        capsys, *svd, "--init", "broken.png"
    )
    assert "give a whole PNG, JPEG or WebP" in refused(capsys, *svd, "--image", "broken.png")
    assert "init 'none.mp4' does not exist" in refused(capsys, *svd, "--init", "none.mp4")
