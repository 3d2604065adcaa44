"""What is told of a drawing before it is done, and measured after: work, times of this machine, prices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import noise, tiny_folder
from sfumato import Request, load, planning
from sfumato.cli.app import run
from sfumato.drawing.clips import as_clip
from sfumato.errors import InputError
from sfumato.flops import count_flops
from sfumato.memory import LiveBytes
from sfumato.parts import HiRes
from sfumato.receipts import work
from sfumato.receipts.bill import calibrate, drawn, estimate
from sfumato.receipts.machine import Machine, Price, key_of, machine_file, read_machine, write_machine
from sfumato.receipts.provenance import read_recipe
from sfumato.receipts.work import _counted, by_stage, calls, work_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def _own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_flops_told_before_are_those_done(model, count):
    request = Request("a red cube", steps=3, count=count)
    told = by_stage(work_of(model, request))
    assert sum(told.values()) == count_flops(model.generate, request)


@pytest.mark.parametrize("wanted", [{}, {"guidance": 1.0}, {"image": noise(96, 64)}, {"frames": 5}])
def test_large_ones_are_counted_without_being_done(wanted, monkeypatch):
    pocket = load("pocket", "cpu", dtype=torch.float32)
    request = Request("a cube", **{"size": (96, 64), **wanted})
    request = pocket.complete(as_clip(pocket, request) if "frames" in wanted else request)
    done = _counted(pocket, request, request.size)
    monkeypatch.setattr(work, "LARGE", 0)
    monkeypatch.setattr(work, "count_flops", None)
    assert _counted(pocket, request, request.size) == done


def test_calls_are_those_of_the_sampler(model):
    steps = {name: calls(model, model.complete(Request(steps=8, sampler=name))) for name in ("euler", "heun")}
    assert steps == {"euler": 8, "heun": 15}
    half = model.complete(Request(steps=8, sampler="euler", guidance_interval=(0.0, 0.0)))
    assert calls(model, half) == 4
    second = work_of(model, Request(steps=8, sampler="euler", hires=HiRes(2.0, strength=0.5)))
    assert [(w.stage, w.calls, w.size) for w in second] == [
        ("text", 1, (32, 32)), ("denoise", 8, (32, 32)), ("denoise", 4, (64, 64)), ("decode", 1, (64, 64)),
    ]  # fmt: skip


def test_times_between_points_and_beyond_them(model):
    points = [(1e6, 0.001), (1e8, 0.1)]
    machine = Machine({key_of(model): {"denoise": points, "decode": [(1e6, 0.01)]}})
    assert machine.seconds(model, "denoise", 1e7) == (pytest.approx(0.01), True)
    assert machine.seconds(model, "denoise", 1e9) == (pytest.approx(1.0), True)
    assert machine.seconds(model, "decode", 2e6) == (pytest.approx(0.02), True)
    assert machine.seconds(model, "text", 1e6) is None
    other = replace(model.system, config=replace(model.system.config, words=("a",)))
    assert machine.seconds(type(model)(other, model.device, "o", model.dtype), "decode", 2e6) == (0.02, False)


def test_an_estimate_adds_up_and_a_receipt_has_its_form(model):
    machine = calibrate(model, Machine(price=Price(per_hour=3.6, per_megapixel_step=1.0, watts=10.0)))
    assert {stage: len(points) for stage, points in machine.times[key_of(model)].items()} == {
        "text": 1, "encode": 2, "denoise": 3, "decode": 3,
    }  # fmt: skip
    request = Request("a cube", steps=4, sampler="euler", count=2)
    told = estimate(model, request, machine)
    assert told["basis"] == "measured"
    assert told["total_seconds"] == pytest.approx(sum(told["seconds"].values()), abs=1e-3)
    assert told["megapixel_steps"] == pytest.approx(2 * 4 * 32 * 32 / 1e6)
    assert told["money"] == pytest.approx(told["total_seconds"] * 1e-3 + told["megapixel_steps"], abs=1e-6)
    assert told["joules"] == pytest.approx(10 * told["total_seconds"], abs=0.01)
    write_machine(machine)
    assert read_machine() == machine
    receipt = drawn(model, request).recipe["receipt"]
    assert receipt.keys() == told.keys() - {"basis"}
    assert receipt["flops"] == told["flops"] and receipt["seconds"].keys() == {"text", "denoise", "decode"}
    assert receipt["peak_bytes"] > 0 and receipt["currency"] == "USD"
    assert json.loads(json.dumps(receipt)) == receipt


def test_the_bills_of_files_drawn_together_add_up(model):
    write_machine(Machine(price=Price(per_hour=3.6, per_megapixel_step=1.0, watts=10.0)))
    assert run(["generate", "a cube", "-m", model.name, "-o", "o.png", "--steps", "3", "--count", "3"]) == 0
    recipes = [read_recipe(Path(f"o-{k}.png")) for k in range(3)]
    files = [recipe["receipt"] for recipe in recipes]
    whole = estimate(model, Request("a cube", steps=3, count=3), Machine())
    assert [file["pictures"] for file in files] == [3, 3, 3]
    for stage, flops in whole["flops"].items():
        parts = [file["flops"][stage] for file in files]
        assert sum(parts) == flops and max(parts) - min(parts) <= 1
    assert sum(file["megapixel_steps"] for file in files) == pytest.approx(whole["megapixel_steps"])
    first = files[0]
    for name in ("total_seconds", "joules", "money"):
        assert first[name] == files[1][name] > 0
    assert sum(first["seconds"].values()) == pytest.approx(first["total_seconds"], abs=1e-4)
    assert first["money"] == pytest.approx(first["total_seconds"] * 1e-3 + first["megapixel_steps"], rel=1e-3)
    assert recipes[0]["stages"] == pytest.approx(first["seconds"], abs=1e-4)


def test_a_deterministic_drawing_keeps_what_is_exact(model):
    told = estimate(model, Request("a cube", steps=2), Machine())
    try:
        assert (
            run(["generate", "a cube", "-m", model.name, "-o", "o.png", "--steps", "2", "--deterministic"])
            == 0
        )
    finally:
        torch.use_deterministic_algorithms(False)
    receipt = read_recipe(Path("o.png"))["receipt"]
    exact = {name: told[name] for name in ("pictures", "flops", "megapixel_steps")}
    assert exact == {name: value for name, value in receipt.items() if value is not None}


@pytest.mark.parametrize("request_", [
    Request("a cube"), Request("a cube", size=(128, 64), count=3), Request("a cube", guidance=1.0, count=9),
    Request("a cube", size=(64, 64), image=Image.new("RGB", (64, 64)), strength=0.5),
])  # fmt: skip
def test_the_planned_memory_is_what_is_allocated(model, request_):
    request = replace(request_, steps=2)
    plan = planning.plan_pictures(model, request)
    with LiveBytes() as real:
        model.generate(request)
    assert real.peak <= max(stage.activations for stage in plan.stages) <= 3 * real.peak
    assert estimate(model, request, Machine())["peak_bytes"] == pytest.approx(plan.peak, rel=0.05)


def test_what_is_told_of_a_prompt_is_what_that_prompt_takes(model, capsys):
    told = {}
    for prompt in ("a cube", "a red cube and a red cube and a red cube"):
        assert run(["cost", prompt, "-m", model.name, "--steps", "2", "--json"]) == 0
        told[prompt] = json.loads(capsys.readouterr().out)
        assert run(["generate", prompt, "-m", model.name, "-o", "o.png", "--steps", "2"]) == 0
        capsys.readouterr()
        assert told[prompt]["flops"] == read_recipe(Path("o.png"))["receipt"]["flops"]
        assert told[prompt]["prompt"] == prompt and told[prompt]["peak_bytes"] > 0
    short, long = told.values()
    assert short["flops"]["denoise"] < long["flops"]["denoise"]


def test_the_twin_in_pixels_is_measured_as_asked(model, capsys):
    asked = ["cost", "a cube", "-m", model.name, "--pixels", "--steps", "2"]
    assert run([*asked, "--json"]) == 0
    usual = json.loads(capsys.readouterr().out)
    given = ["--size", "64x32", "--guidance", "2.5", "--sampler", "heun"]
    assert run([*asked, "--json", *given]) == 0
    told = json.loads(capsys.readouterr().out)
    asked_for = {"prompt": "a cube", "size": [64, 32], "guidance": 2.5, "sampler": "heun", "steps": 2}
    assert asked_for.items() <= told.items()
    for side in ("latent", "pixel"):
        assert told[side]["tokens"] == 2 * usual[side]["tokens"]
        assert told[side]["flops"]["picture"] > 2 * usual[side]["flops"]["picture"]
    for option in (["--count", "2"], ["--hires", "2"], ["--calibrate"]):
        assert run([*asked, *option]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert option[0].lstrip("-") in line and "--pixels" in line


def test_what_is_not_known_is_none(model):
    told = estimate(model, Request("a cube"), Machine())
    assert (
        told["seconds"] is told["total_seconds"] is told["money"] is told["joules"] is told["basis"] is None
    )
    assert told["flops"]["denoise"] > 0


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"times": 3}', '{"times": {"a": {"text": [[1]]}}}',
             '{"times": {"a": {"text": [[0, 1]]}}}',
             '{"times": {}, "price": {"per_hour": -1}}', '{"times": {}, "price": {"per_hour": NaN}}',
             '{"times": {}, "price": {"tax": 1}}'],
)  # fmt: skip
def test_a_damaged_file_says_so(text):
    machine_file().parent.mkdir(parents=True)
    machine_file().write_text(text)
    with pytest.raises(InputError, match=r"machine\.json"):
        read_machine()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--per-hour", "-1"], "per-hour must be between"),
        (["--per-hour", "nan"], "per-hour"),
        (["--watts", "x"], "watts"),
        (["--currency", "euros"], "three letters"),
        (["--size", "33x32"], "the nearest"),
    ],
)
def test_bad_input_is_one_line(model, capsys, given, words):
    assert run(["cost", "-m", model.name, *given]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_on_the_command_line(model, capsys):
    assert run(["cost", "-m", model.name, "--per-hour", "0.4", "--currency", "chf", "--keep"]) == 0
    assert "measure this model on this machine by --calibrate" in capsys.readouterr().out
    assert read_machine().price == Price(0.4, currency="CHF")
    assert run(["cost", "-m", model.name, "--calibrate", "--json", "--steps", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["basis"] == "measured" and told["steps"] == 5 and told["currency"] == "CHF" and told["money"] > 0
    )
    assert run(["generate", "a cube", "-m", model.name, "-o", "o.png", "--steps", "2"]) == 0
    assert read_recipe(Path("o.png"))["receipt"]["money"] > 0


@pytest.mark.parametrize("pictures", [1, 3])
def test_a_checkpoint_is_counted_as_it_is_planned(tmp_path, monkeypatch, pictures):
    from sfumato import planning
    from sfumato.families.sd.system import open_system
    from sfumato.generate import Model
    from small_sd import SMALL, write

    path = write("sd1", tmp_path / "sd")
    system = open_system(path, torch.device("cpu"), torch.float32, systems=SMALL, offload="model")
    model = Model(system, torch.device("cpu"), "sd")
    request = model.complete(Request("a cat", steps=2, size=(64, 64), count=pictures))
    plan = planning.plan(model, request, "model")
    ready = planning.follow(model, plan)
    monkeypatch.setattr(type(system), "trace", None)  # it is not asked again
    told = by_stage(work_of(ready, request))
    done = count_flops(lambda: ready.generate(request))
    assert sum(told.values()) == pytest.approx(done, rel=0.02)


def test_what_is_enlarged_is_called_so_and_nothing_is_kept_without_a_price(model, capsys):
    assert run(["cost", "-m", model.name, "--size", "32x32", "--hires", "2", "--steps", "2"]) == 0
    assert "1 of 32x32 enlarged to 64x64" in " ".join(capsys.readouterr().out.split())
    assert run(["cost", "-m", model.name, "--keep"]) == 2
    assert "give one by --per-hour" in capsys.readouterr().err and not machine_file().exists()
