"""Clips on the command line: planned before they are drawn, priced, drawn again, and what they do without."""

from __future__ import annotations

import json
import weakref
from collections import deque
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import noise
from sfumato import load, planning
from sfumato.cli.app import run
from sfumato.flops import count_flops
from sfumato.memory import LiveBytes
from sfumato.receipts.clips import read_recipe
from sfumato.receipts.machine import Machine, Price, write_machine
from sfumato.receipts.replay import difference_of_clips
from sfumato.receipts.work import LARGE, by_stage, work_of
from sfumato.types import Request
from sfumato.video import frames
from small_video import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "model")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def draw(folder, *arguments: str) -> None:
    assert run(["animate", "a red cube rolls", "-m", str(folder), "--steps", "2", *arguments]) == 0


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp", "frames"])
def test_a_clip_drawn_again_is_identical(folder, capsys, name):
    if name.endswith("mp4"):
        pytest.importorskip("av")
    draw(folder, "-o", name, "--seed", "7")
    found = told(capsys, "replay", name, "-m", str(folder), "--verify", "-o", "again.gif")
    assert (found["verdict"], found["frames"], found["changed"]) == ("identical", 9, [])


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.webp", "frames"])
def test_a_film_too_long_for_memory_is_the_same_file(folder, monkeypatch, name):
    """And those that are written frame after frame are never there whole."""
    live: list[weakref.ref] = []
    most, plain = 0, Image.Image.__init__

    def watched(self) -> None:
        nonlocal live, most
        plain(self)
        live = [each for each in live if each() is not None] + [weakref.ref(self)]
        most = max(most, len(live))

    def film(place: str) -> dict[str, bytes]:
        Path(place).mkdir()
        given = ["-o", f"{place}/{name}", "--frames", "37", "--deterministic"]
        try:
            draw(folder, *given)
        finally:
            torch.use_deterministic_algorithms(False)
        return {file.name: file.read_bytes() for file in Path(place).rglob("*") if file.is_file()}

    if name.endswith("mp4"):
        pytest.importorskip("av")
    whole = film("whole")
    monkeypatch.setattr(frames, "IN_MEMORY", 0)
    monkeypatch.setattr(Image.Image, "__init__", watched)
    assert film("streamed") == whole
    assert most <= 6 or name in ("out.gif", "out.webp")


def test_a_film_that_is_stopped_leaves_nothing(folder, tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(frames, "IN_MEMORY", 0)
    read, there = frames.Frames._read, []

    def stopped(self, place: int):
        if place == 5 and list(tmp_path.iterdir()):
            there.extend(tmp_path.iterdir())
            raise KeyboardInterrupt
        return read(self, place)

    monkeypatch.setattr(frames.Frames, "_read", stopped)
    assert run(["animate", "a red cube", "-m", str(folder), "--steps", "1", "-o", "out.mp4"]) == 130
    assert there and not list(tmp_path.iterdir())


def test_a_kind_that_needs_all_frames_is_refused_before_drawing_what_is_too_long(folder, monkeypatch, capsys):
    monkeypatch.setattr("sfumato.video.write.MAX_CLIP_PIXELS", 5 * 32 * 32)
    monkeypatch.setattr("sfumato.cli.watch.drawn", None)
    assert run(["animate", "a cube", "-m", str(folder), "-o", "out.gif", "--frames", "9"]) == 2
    assert "gif is written with all frames in memory, and 9 of 32x32 are too many" in capsys.readouterr().err


def test_what_is_wrong_is_called_by_its_option(folder, capsys):
    """And what is cut off, or no clip at all, is told as such."""
    pytest.importorskip("av")
    noise(32, 32).save("a.png")
    Path("b.txt").write_text("no clip")
    draw(folder, "-o", "c.mp4")
    draw(folder, "--init", "c.mp4", "--strength", "0.5", "-o", "d.mp4")
    Path("cut.mp4").write_bytes(Path("c.mp4").read_bytes()[:1000])
    again = ["replay", "d.mp4", "-m", str(folder)]
    assert run([*again, "--picture", "c.mp4"]) == 0
    capsys.readouterr()
    animate = ["animate", "a cube", "-m", str(folder)]
    for arguments, said in (
        ([*animate, "--init", "a.png"], "--init 'a.png' is a PNG picture"),
        ([*animate, "--image", "c.mp4"], "--image 'c.mp4' is a video"),
        ([*animate, "--init", "."], "give --fps"),
        ([*animate, "--init", "cut.mp4"], "cut off"),
        ([*animate, "--like", "b.txt"], "--like 'b.txt' is no picture or clip; PNG"),
        ([*animate, "--strength", "0.5"], "--strength goes with a --init to begin with"),
        ([*animate, "--frames", "1"], "--frames must be 2 or more"),
        ([*animate, "--augment", "0.1"], "knows nothing of --augment"),
        ([*animate, "-o", "a.png/x.mp4"], "'a.png' is no folder"),
        ([*animate, "--offload", "model"], "all of it stays in memory"),
        (["replay", "b.txt"], "file 'b.txt' is no picture or clip"),
        (["replay", "cut.mp4"], "cut off"),
        (again, "give the clip that it began with by --picture FILE"),
    ):
        assert run(arguments) == 2
        assert said in capsys.readouterr().err
    assert run([*animate, "--init", "c.mp4", "--plan"]) == 0


def test_a_clip_of_other_weights_is_another(folder, tmp_path, capsys):
    from sfumato.families.pocket import save_folder
    from small_video import video_system

    draw(folder, "-o", "out.webp")
    other = video_system()
    with torch.no_grad():
        for parameter in other.video.animator.parameters():
            parameter.mul_(-1)
    save_folder(other, tmp_path / "other")
    assert run(["replay", "out.webp", "-m", str(tmp_path / "other"), "--verify"]) == 3
    out = capsys.readouterr().out
    assert "different:" in out and "changed: weights animator:" in out


def test_a_clip_that_began_with_a_picture_asks_for_it(folder, capsys):
    noise(40, 32).save("first.png")
    draw(folder, "-o", "out.gif", "--image", "first.png")
    capsys.readouterr()
    assert run(["replay", "out.gif", "-m", str(folder)]) == 2
    assert "by --picture FILE" in capsys.readouterr().err
    found = told(capsys, "replay", "out.gif", "-m", str(folder), "--picture", "first.png")
    assert found["verdict"] == "identical"


def test_how_near_two_clips_are():
    clip = [noise(8, 8), noise(8, 8)]
    assert difference_of_clips(clip, clip).verdict == "identical"
    assert difference_of_clips(clip, clip[:1]) is None
    dark = clip[1].point(lambda value: value // 2)
    found = difference_of_clips(clip, [clip[0], dark])
    alone = difference_of_clips([clip[1]], [dark])
    assert found.verdict == "different" and found.most == alone.most
    assert found.mean == pytest.approx(alone.mean / 2)
    one, other = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16))
    other.putpixel((3, 3), (90, 90, 90))  # as another palette may have it, and nothing else
    assert difference_of_clips([one], [other]).verdict == "different"
    assert difference_of_clips([one], [other], palette=True).verdict == "near"
    other.paste((90, 90, 90), (0, 0, 3, 3))
    assert difference_of_clips([one] * 9, [other, *[one] * 8], palette=True).verdict == "different"


def test_the_plan_of_a_clip_is_what_it_allocates(folder):
    model = load(folder)
    request = model.complete(Request("a red cube", frames=9))
    stages = {stage.name: stage for stage in planning.plan_clip(model, request).stages}
    x = torch.randn(1, *model.latent_shape(32, 32, 9))
    denoise = model.denoiser(model.condition(request), request)
    for name, call in (
        ("denoise", lambda: denoise(x, torch.tensor(0.7))),
        ("decode", lambda: deque(model.decode_pieces(x), maxlen=0)),
    ):
        with torch.inference_mode(), model.precision(), LiveBytes() as real:
            call()
        assert real.peak <= stages[name].activations <= 3 * real.peak
    assert set(stages) == {"denoise", "decode"}


def test_a_film_takes_no_more_memory_than_its_pieces(folder, monkeypatch):
    monkeypatch.setattr(frames, "IN_MEMORY", 0)
    model = load(folder)

    def planned(count: int) -> int:
        request = model.complete(Request("a red cube", frames=count))
        return {stage.name: stage for stage in planning.plan_clip(model, request).stages}[
            "decode"
        ].activations

    def held(count: int) -> int:
        x = torch.randn(1, *model.latent_shape(32, 32, count))
        with torch.inference_mode(), model.precision(), LiveBytes() as real:
            deque(model.decode_pieces(x), maxlen=0)
        return real.peak

    latent = 4 * 4 * 4 * 4  # bytes; two copies of each are kept
    assert planned(2001) == planned(49) + 2 * latent * (2001 - 49) // 4
    assert held(97) <= held(49) <= planned(49)


@pytest.mark.parametrize("frames, fewer", [(17, 9), (13, 5), (9, 5)])
def test_a_refused_clip_is_told_how_many_frames_fit(folder, frames, fewer):
    model = load(folder)
    request = model.complete(Request("a red cube", frames=frames))
    said = str(planning.refusal_of_clip(model, request, planning.plan_clip(model, request)))
    assert f"drawing {frames} frames of" in said and f" or `frames` {fewer} (" in said


def test_animate_plans_and_keeps_within_memory(folder, capsys):
    given = ["animate", "a red cube", "-m", str(folder)]
    short, long = (told(capsys, *given, "--plan", "--frames", n) for n in ("5", "33"))
    assert short["fits"] and set(short["stages"]) == {"denoise", "decode"}
    assert long["stages"]["decode"]["activations"] > short["stages"]["decode"]["activations"]
    assert run([*given, "--memory", "1MB", "-o", "out.gif"]) == 2
    assert "drawing 9 frames of 32x32 needs" in capsys.readouterr().err
    assert told(capsys, *given, "--memory", "64GB", "-o", "out.gif")["memory"]["planned"] > 0


def test_a_film_is_limited_and_planned_by_what_must_be_in_memory(folder, capsys):
    """1.6 billion pixels: of a kind that Pillow writes with all frames, and of one that is written as they come."""
    given = ["animate", "a red cube", "-m", str(folder), "--size", "640"]
    film = told(capsys, *given, "--plan", "--frames", "4001")
    assert "write" not in film["stages"]
    assert run([*given, "--frames", "4001", "--plan", "-o", "out.webp"]) == 2
    assert "write mp4 or webm" in capsys.readouterr().err
    shorter = told(capsys, *given, "--frames", "1001", "--plan", "-o", "out.webp")
    assert shorter["stages"]["write"]["activations"] >= 4 * 1001 * 640 * 640


def test_what_a_film_costs_is_told_from_a_few_of_its_pieces(folder):
    model = load(folder)
    request = model.complete(Request("a red cube", frames=101, steps=1))
    assert LARGE * 9 < 101  # so it is traced
    decoded = count_flops(lambda: model.decode_pixels(torch.zeros(1, *model.latent_shape(32, 32, 101))))
    assert by_stage(work_of(model, request))["decode"] == decoded


def test_the_cost_of_a_clip_is_that_of_drawing_it(folder, capsys):
    found = told(capsys, "cost", "-m", str(folder), "--frames", "9", "--steps", "2")
    assert found["frames"] == 9 and found["peak_bytes"] > 0
    model = load(folder)
    request = model.complete(Request("a red metal sphere behind a small blue cube", frames=9, steps=2))
    assert found["flops"] == by_stage(work_of(model, request))
    real = count_flops(lambda: model.generate(request))
    assert sum(found["flops"].values()) == pytest.approx(real, rel=0.02)
    longer = told(capsys, "cost", "-m", str(folder), "--frames", "17", "--steps", "2")
    more = longer["flops"]["denoise"] / found["flops"]["denoise"]
    assert 2 < more < 2.1  # two stretches of nine, and a level for each latent in the second
    assert run(["cost", "-m", str(folder), "--frames", "9", "--pixels"]) == 2


@pytest.mark.parametrize("name", ["out.webp", "out.gif"])
def test_a_clip_carries_its_bill(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    write_machine(Machine(price=Price(per_hour=3.6, watts=10.0)))
    given = ["animate", "a red cube rolls", "-m", str(folder), "--steps", "2", "-o", name]
    bill = told(capsys, *given)["recipe"]["receipt"]
    assert read_recipe(name)["receipt"] == bill
    expected = told(capsys, "cost", "a red cube rolls", "-m", str(folder), "--frames", "9", "--steps", "2")
    for field in ("flops", "pictures", "megapixel_steps"):
        assert bill[field] == expected[field]
    assert bill["megapixel_steps"] == pytest.approx(2 * 9 * 32 * 32 / 1e6)
    assert bill["seconds"].keys() == {"text", "denoise", "decode"} and min(bill["seconds"].values()) > 0
    assert bill["total_seconds"] == pytest.approx(bill["joules"] / 10, abs=1e-3)
    assert bill["money"] == pytest.approx(bill["total_seconds"] * 1e-3, rel=1e-2) and bill["peak_bytes"] > 0
    begun = told(
        capsys, "animate", "a cube", "-m", str(folder), "--steps", "2", "-o", "b.gif", "--init", name
    )
    assert begun["recipe"]["receipt"]["seconds"]["encode"] > 0 < begun["recipe"]["receipt"]["flops"]["encode"]


def test_deterministic_clips_are_equal_files(folder, capsys):
    try:
        draw(folder, "-o", "one.webp", "--deterministic")
        draw(folder, "-o", "two.webp", "--deterministic")
        torch.use_deterministic_algorithms(False)
        found = told(capsys, "replay", "one.webp", "-m", str(folder), "-o", "three.webp")
    finally:
        torch.use_deterministic_algorithms(False)
    assert found["changed"] == [] and found["verdict"] == "identical"
    one, two, three = (Path(f"{name}.webp").read_bytes() for name in ("one", "two", "three"))
    assert one == two == three
    recipe = read_recipe("one.webp")
    assert "stages" not in recipe and recipe["receipt"]["flops"]["denoise"] > 0


def test_loras_and_controlnets_are_refused_in_one_line(folder, capsys):
    for option in ("lora", "controlnet", "control"):
        capsys.readouterr()
        assert run(["animate", "a cube", "-m", str(folder), f"--{option}", "x.safetensors"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--{option} is for pictures (sfumato generate)" in line
