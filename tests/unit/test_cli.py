"""The command line with a real, tiny model: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers import interrupted, tiny_folder
from sfumato import load
from sfumato.cli import fields, parse, show
from sfumato.cli.app import VERBS, run
from sfumato.errors import InputError
from sfumato.receipts.provenance import read_recipe
from sfumato.types import MAX_COUNT

LIGHT = ["--steps", "2", "--size", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels(path: str | Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_a_prompt_becomes_a_file_that_says_how(model, capsys):
    assert run(["generate", "a red cube", "-m", model, "-o", "out.png", "--seed", "7", *LIGHT]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("out.png\n", "")
    request = read_recipe("out.png")["request"]
    assert (request["prompt"], request["seed"], request["steps"], request["size"]) == (
        "a red cube",
        7,
        2,
        [32, 32],
    )
    assert os.listdir() == ["out.png"]


def test_several_pictures_each_as_if_alone(model, capsys):
    arguments = ["generate", "a red cube", "-m", model, "--negative", "blue", "--guidance", "3", *LIGHT]
    assert run([*arguments, "-n", "3", "--seed", "5", "-o", "out.png"]) == 0
    assert capsys.readouterr().out.split() == ["out-0.png", "out-1.png", "out-2.png"]
    assert run([*arguments, "--seed", "6", "-o", "alone.png"]) == 0
    with Image.open("out-1.png") as together, Image.open("alone.png") as alone:
        pairs = zip(together.tobytes(), alone.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1
    assert pixels("out-0.png") != pixels("out-1.png")


def test_json_is_one_object_with_files_seeds_seconds_and_recipe(model, capsys):
    arguments = [
        "generate",
        "a red cube",
        "-m",
        model,
        "-n",
        "2",
        "--seed",
        "3",
        "--json",
        "-o",
        "x.webp",
        *LIGHT,
    ]
    assert run([*arguments, "--sampler", "euler", "--schedule", "linear"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == ["x-0.webp", "x-1.webp"]
    assert answer["seeds"] == [3, 4]
    assert answer["seconds"] > 0
    assert answer["recipe"]["request"]["sampler"] == "euler"


def test_the_recipe_draws_the_picture_again(model, capsys):
    from sfumato import Request, load

    run(["generate", "a cube", "-m", model, "--seed", "18446744073709551615", "-o", "a.png", *LIGHT])
    request = Request.from_dict(read_recipe("a.png")["request"])
    load(model).generate(request).save("b.png")
    assert pixels("a.png") == pixels("b.png")


@pytest.mark.parametrize(
    "prompt", ["", "👩‍👩‍👧 🍎", "كرة حمراء", "a\nb", "--", "a red cube " * 20, "[red]markup[/red]"]
)
def test_any_text_is_a_prompt(model, capsys, prompt):
    assert run(["generate", "-m", model, "-o", "out.png", *LIGHT, "--", prompt]) == 0
    assert read_recipe("out.png")["request"]["prompt"] == prompt


def test_the_preview_is_gone_when_the_picture_is_there(model, capsys):
    seen = []

    class Spy:
        def __init__(self, real):
            self.real, self.name = real, real.name

        def preview(self, latent):
            seen.append(tuple(latent.shape))
            return self.real.preview(latent)

    from sfumato import load
    from sfumato.cli.watch import watcher
    from sfumato.types import Request

    loaded = load(model)
    with show.progress() as bar:
        watch, clean = watcher(bar, Spy(loaded), Path("out.png"))
        loaded.generate(
            Request("a", steps=2, size=(32, 32)),
            on_step=lambda step: (watch(step), seen.append(os.listdir())),
        )
        clean()
    assert seen == [(1, 4, 1, 4, 4), ["out-preview.png"]] * 2
    assert os.listdir() == []
    assert run(["generate", "a", "-m", model, "--preview", *LIGHT]) == 0
    assert os.listdir() == ["out.png"]


def test_a_preview_takes_no_file_of_the_users(model, capsys):
    theirs = Path("out-preview.png")
    theirs.write_text("mine")
    assert run(["generate", "a", "-m", model, "--preview", *LIGHT]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "out-preview.png" in err and err.count("\n") == 1
    assert os.listdir() == ["out-preview.png"] and theirs.read_text() == "mine"
    assert run(["generate", "a", "-m", model, *LIGHT]) == 0  # without a preview the name is of no matter
    assert theirs.read_text() == "mine"


def test_a_run_that_fails_before_its_first_preview_removes_none(model):
    from sfumato.cli.watch import watcher

    with show.progress() as bar:
        _, clean = watcher(bar, None, Path("out.png"))
        Path("out-preview.png").write_text("made by another meanwhile")
        clean()
    assert os.listdir() == ["out-preview.png"]


REFUSED = {
    "no verb of that name": (["draw"], "draw"),
    "no prompt": (["generate"], "prompt"),
    "unknown flag": (["generate", "a", "--stepz", "3"], "--stepz"),
    "two prompts": (["generate", "a", "b"], "b"),
    "flag without value": (["generate", "a", "--seed"], "--seed"),
    "long prompt": (["generate", "x" * 100_000], "prompt has 100000 characters"),
    "more tokens than the model reads": (["generate", "x" * 5000], "tokens"),
    "NUL": (["generate", "a\0b"], "NUL"),
    "half a surrogate pair": (["generate", "a\ud800b"], "surrogate"),
    "NUL in the negative": (["generate", "a", "--negative", "\0"], "negative"),
    "steps -1": (["generate", "a", "--steps", "-1"], "steps must be between 1 and 1000, not -1"),
    "steps 0": (["generate", "a", "--steps", "0"], "steps"),
    "steps 10^9": (["generate", "a", "--steps", "1000000000"], "steps"),
    "steps 2.5": (["generate", "a", "--steps", "2.5"], "steps must be a whole number, not '2.5'"),
    "guidance nan": (["generate", "a", "--guidance", "nan"], "guidance must be between 0 and 100"),
    "guidance inf": (["generate", "a", "--guidance", "inf"], "guidance"),
    "guidance x": (["generate", "a", "--guidance", "x"], "guidance must be a number, not 'x'"),
    "seed -1": (["generate", "a", "--seed", "-1"], "seed must be between 0 and 18446744073709551615, not -1"),
    "seed 2^64": (["generate", "a", "--seed", str(2**64)], "seed must be between"),
    "seed 1.5": (["generate", "a", "--seed", "1.5"], "seed must be a whole number, not '1.5'"),
    "seed x": (["generate", "a", "--seed", "x"], "seed must be a whole number, not 'x'"),
    "seed of 5000 digits": (["generate", "a", "--seed", "1" * 5000], "seed must be a whole number"),
    "count 0": (["generate", "a", "-n", "0"], f"count must be between 1 and {MAX_COUNT}, not 0"),
    "count 65": (["generate", "a", "-n", str(MAX_COUNT + 1)], "count"),
    "count x": (["generate", "a", "-n", "x"], "count must be a whole number"),
    "size x": (["generate", "a", "--size", "big"], "size must be like 128 or 128x96"),
    "size 0": (["generate", "a", "--size", "0"], "--size's width must be between 1 and 4096, not 0"),
    "size 10^6": (["generate", "a", "--size", "32x1000000"], "height must be between"),
    "size 513": (["generate", "a", "--size", "513"], "the nearest legal size is 512x512"),
    "size 33x47": (["generate", "a", "--size", "33x47"], "the nearest legal size is 32x48"),
    "sampler": (["generate", "a", "--sampler", "eular"], "euler"),
    "schedule": (["generate", "a", "--schedule", "karas"], "karras"),
    "reuse 0": (["generate", "a", "--reuse", "0"], "reuse must be between 1 and 10, not 0"),
    "guidance interval": (["generate", "a", "--guidance-interval", "0.5"], "must be like LOW:HIGH"),
    "guidance interval x": (["generate", "a", "--guidance-interval", "a:b"], "must be a number, not 'a'"),
    "guidance interval back": (
        ["generate", "a", "--guidance-interval", "1:0"],
        "must go from low to high, not from 1 to 0",
    ),
    "device": (["generate", "a", "--device", "toaster"], "toaster"),
    "output without extension": (["generate", "a", "-o", "out"], "must end in .png"),
    "output in no folder": (["generate", "a", "-o", "no/where/out.png"], "does not exist"),
    "output a folder": (["generate", "a", "-o", "/"], "must end in"),
    "output too long": (["generate", "a", "-o", "x" * 300 + ".png"], "cannot be written"),
    "output with NUL": (["generate", "a", "-o", "a\0.png"], "null byte"),
    "JPEG too small": (["generate", "é" * 32_000, "-o", "out.jpg"], "too long for a JPEG"),
    "recipe absent": (["train", "absent.toml"], "absent.toml"),
    "recipe a folder": (["train", "."], "recipe"),
    "override": (["train", "a.toml", "--set", "steps"], "--set takes key=value"),
    "override twice": (["train", "a.toml", "--set", "a=1", "--set", "a=2"], "--set gives a twice"),
    "scenes 0": (["scenes", "--out", "s", "-n", "0"], "count"),
    "scenes size": (["scenes", "--out", "s", "--size", "x"], "size"),
    "scenes size 0": (["scenes", "--out", "s", "--size", "0"], "size"),
    "scenes seed -1": (["scenes", "--out", "s", "--seed", "-1"], "seed"),
    "scenes split": (["scenes", "--out", "s", "--split", "nine"], "nine"),
    "scenes into a file": (["scenes", "--out", "/dev/null"], "no folder"),
    "scenes below a file": (["scenes", "--out", "/dev/null/x"], "no folder"),
    "scenes with a long name": (["scenes", "--out", "x" * 300], "out"),
    "train into a file": (["train", "a.toml", "--out", "/dev/null"], "no folder"),
    "scenes without a folder": (["scenes"], "--out"),
    "evaluate no number": (["evaluate", "--per-group", "x"], "per-group"),
    "evaluate nothing": (["evaluate", "--per-group", "0"], "per-group must be between 1 and"),
    "evaluate copies of nothing": (["evaluate", "--training", "x.toml"], "--distribution"),
    "evaluate unknown group": (["evaluate", "--group", "nine"], "nine"),
    "cost steps": (["cost", "--steps", "0"], "steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_exit_2_and_no_file(model, capsys, case):
    arguments, said = REFUSED[case]
    needs_model = arguments[0] in ("generate", "evaluate", "cost") and len(arguments) > 1
    code = run([*arguments, "-m", model] if needs_model and case != "flag without value" else arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert said in err
    assert len(err) < 1000
    assert os.listdir() == []


@pytest.mark.parametrize("verb", ["generate", "evaluate", "cost"])
def test_models_that_are_none(model, capsys, verb):
    prompt = ["a"] if verb == "generate" else []
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/model.json").write_text("{")
    Path("strange").mkdir()
    Path("strange/model.json").write_text('{"family": "../x"}')
    Path("pickle.ckpt").write_bytes(b"\x80\x04")
    for name in ("absent", "empty", "broken", "strange", "pickle.ckpt", "a\0b", "", "https://example.org/x"):
        assert run([verb, *prompt, "-m", name]) == 2, name
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")


def test_a_model_whose_weights_are_damaged_is_named(model, capsys):
    import shutil

    shutil.copytree(model, "copy")
    [weights] = Path("copy").glob("denoiser*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(["generate", "a", "-m", "copy", *LIGHT]) == 2
    assert "denoiser.safetensors" in capsys.readouterr().err


def test_the_full_disk_is_an_error_of_one_line(model, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    from sfumato.receipts import provenance

    real = provenance._save

    def to_full(image, file, suffix, recipe):
        with open("/dev/full", "wb") as sink:
            sink.write(b"x" * 100_000)
        real(image, file, suffix, recipe)

    provenance._save = to_full
    try:
        assert run(["generate", "a", "-m", model, *LIGHT]) == 1
    finally:
        provenance._save = real
    assert capsys.readouterr().err == "error: out.png could not be written: No space left on device\n"
    assert os.listdir() == []


def test_an_unexpected_failure_is_one_line_and_debug_shows_where(capsys, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(fields, "given", broken)
    assert run(["generate", "a"]) == 1
    err = capsys.readouterr().err
    assert err == "error: ZeroDivisionError: two lines (set SFUMATO_DEBUG=1 to see where)\n"
    monkeypatch.setenv("SFUMATO_DEBUG", "1")
    assert run(["generate", "a"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interruption_leaves_the_old_file_and_exits_130(model):
    Path("out.png").write_text("old")
    command = ["generate", "a", "-m", model, "--steps", "1000", "--size", "256", "--preview"]
    code, err = interrupted(command, sign=Path("out-preview.png"))
    assert code == 130 and err.splitlines()[-1] == "stopped" and "Traceback" not in err
    assert os.listdir() == ["out.png"]
    assert Path("out.png").read_text() == "old"


def test_a_process_with_bytes_that_are_no_text_in_its_arguments(model):
    command = [sys.executable.encode(), b"-m", b"sfumato.cli", b"generate"]
    bad = subprocess.run([*command, b"a\xff"], capture_output=True)
    assert (bad.returncode, bad.stdout) == (2, b"")
    assert bad.stderr.count(b"\n") == 1
    odd = subprocess.run(
        [*command, b"a", b"-m", model.encode(), b"-o", b"n\xffe.png", b"--steps", b"1", b"--size", b"32"],
        capture_output=True,
    )
    assert odd.returncode == 0, odd.stderr
    assert os.listdir(b".") == [b"n\xffe.png"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(capsys, verb):
    assert run([verb, "--help"]) == 0
    assert f"Example: sfumato {verb}" in capsys.readouterr().out


def test_without_a_verb_it_helps_and_it_knows_its_version(capsys):
    assert run([]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in VERBS)
    assert run(["--version"]) == 0
    import sfumato

    assert capsys.readouterr().out == f"sfumato {sfumato.__version__}\n"


def test_models_lists_what_can_be_asked_for(capsys):
    assert run(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["default"] in listed["models"]
    assert {"euler", "dpmpp_2m", "unipc", "lcm"} <= set(listed["samplers"])
    assert {"karras", "linear"} <= set(listed["schedules"])
    assert set(listed["presets"]) >= {"pocket", *listed["checkpoints"]}
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    preset = load("pocket", "cpu").preset
    (pocket,) = [line for line in lines if line.startswith("  pocket ")]
    assert f"{preset['steps']} steps, guidance {preset['guidance']:g}, {preset['sampler']}" in pocket
    assert "(default)" in pocket
    assert any(line.startswith("  dpmpp_2m ") and "DPM++ 2M" in line and "sd1" in line for line in lines)


def test_a_picture_much_larger_than_the_model_s_is_told_of(model, capsys):
    usual = load(model).preset["size"][0]
    for factor, told in ((1, False), (3, True)):
        size = str(usual * factor)
        assert run(["generate", "a", "-m", model, "--steps", "1", "--size", size, "-o", "out.png"]) == 0
        err = capsys.readouterr().err
        assert err.count("\n") == told and (f"{size}x{size} is much larger" in err) == told


@pytest.mark.parametrize(("width", "parts"), [("40", 2), ("200", 1)])
def test_a_table_too_wide_comes_in_parts(capsys, monkeypatch, width, parts):
    monkeypatch.setenv("COLUMNS", width)
    columns = ["group", "detector", *(f"column {n}" for n in range(2))]
    show.table("a [title]", columns, [["one", "two", "[0.25]", "0.75"]], keys=2)
    out = capsys.readouterr().out
    assert "a [title]" in out and "[0.25]" in out and "0.75" in out and "…" not in out
    assert out.count("detector") == parts and max(map(len, out.splitlines())) <= int(width)


def test_cost_compares_latents_with_pixels(model, capsys):
    assert run(["cost", "-m", model, "--steps", "2", "--pixels", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    latent, pixel = report["latent"], report["pixel"]
    width, height = report["size"]
    assert latent["numbers"] == 4 * (width // 8) * (height // 8)
    assert pixel["numbers"] == 3 * width * height
    assert latent["tokens"] == pixel["tokens"] == (width // 8) * (height // 8)
    assert pixel["flops"]["decode"] == 0
    for part in (latent, pixel):
        flops = part["flops"]
        assert flops["picture"] == flops["text"] + 2 * flops["step"] + flops["decode"]
        assert 0 < part["tensor_bytes"] < part["peak_bytes"]
        assert part["weight_bytes"] >= 4 * part["parameters"]
    assert run(["cost", "-m", model, "--steps", "1", "--pixels"]) == 0
    assert "pixel twin" in capsys.readouterr().out


def test_scenes_are_a_captioned_folder_or_nothing(capsys):
    assert run(["scenes", "--out", "s", "-n", "3", "--size", "32", "--seed", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"out": "s", "count": 3, "size": 32, "seed": 4, "split": "train"}
    assert [Image.open(f"s/0000{k}.png").size for k in range(3)] == [(32, 32)] * 3
    assert all(Path(f"s/0000{k}.txt").read_text().strip() for k in range(3))
    before = pixels("s/00000.png")
    assert run(["scenes", "--out", "s", "-n", "3", "--size", "32"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert pixels("s/00000.png") == before


def test_values_of_the_command_line():
    assert parse.size("128") == (128, 128)
    assert parse.size(" 96x128 ") == (96, 128)
    assert parse.whole("seed", "+7") == 7
    given = parse.overrides(
        ["a.b=3", "c=3e-4", "d=true", "e=[0.9, 0.95]", "f=adamw", 'g="x=y"', "h=", "i=1\nj=2"]
    )
    assert given == {
        "a.b": 3, "c": 3e-4, "d": True, "e": [0.9, 0.95], "f": "adamw", "g": "x=y", "h": "", "i": "1\nj=2",
    }  # fmt: skip
    for pair in ("a", "=1", "a..b=1", ".=1"):
        with pytest.raises(InputError):
            parse.overrides([pair])


def test_json_has_no_nan(capsys):
    show.answer({"a": [float("nan"), 1.5, {"b": float("inf")}], "c": ("é", None, True)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, {"b": None}], "c": ["é", None, True]}


def test_half_blocks_show_two_rows_in_one():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    text = show.half_blocks(image, columns=4)
    assert text.plain == "▀▀▀▀\n▀▀▀▀\n"
    first, last = text.spans[0].style, text.spans[-1].style
    assert tuple(first.color.triplet) == tuple(first.bgcolor.triplet) == (255, 0, 0)
    assert tuple(last.color.triplet) == tuple(last.bgcolor.triplet) == (0, 0, 255)
