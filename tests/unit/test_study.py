"""The compression study: its recipe, its budget counted on the networks, and what results allow to be said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sfumato.cli.app import run
from sfumato.errors import CheckpointError, InputError
from sfumato.flops import count_flops
from sfumato.study.budget import plan, words_of
from sfumato.study.page import text
from sfumato.study.recipe import Arm, read_study
from sfumato.study.results import AGREE, Curve, Results, cheaper, orders, reached_at, read_results
from sfumato.study.run import place_of, run_study
from sfumato.train.autoencoder import autoencoder_loss
from sfumato.train.optim import make_optimizers

SMALL = """
name = "small"
[study]
seeds = [0, 1]
budget = 4e9
points = [0.5, 1.0]
autoencoder = 0.2
token = 8
pictures = 4
steps = 2
[[study.arms]]
name = "pixels"
factor = 1
prediction = "x"
[study.arms.set]
"denoiser.loss.weighting" = "flow"
[[study.arms]]
name = "f8"
factor = 8
channels = 4
[data]
kind = "scenes"
size = 32
count = 16
objects = [1, 1]
[autoencoder]
encoder_width = 32
decoder_width = 32
max_width = 32
encoder_blocks = 1
decoder_blocks = 1
[autoencoder.train]
batch = 4
[denoiser]
width = 32
depth = 1
heads = 1
text_width = 32
text_depth = 1
[denoiser.train]
batch = 4
decay = 0.0
[preset]
steps = 2
size = [32, 32]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def changed(path, old, new):
    assert old in SMALL
    path.write_text(SMALL.replace(old, new))
    return path


def test_arms_share_the_recipe_but_for_what_they_say(recipe):
    study = read_study(recipe)
    pixels, latent = (study.recipe(arm, 5) for arm in study.arms)
    assert (pixels.autoencoder.model.factor, pixels.denoiser.model.patch) == (1, 8)
    assert (latent.autoencoder.model.factor, latent.denoiser.model.patch) == (8, 1)
    assert (pixels.denoiser.model.prediction, latent.denoiser.model.prediction) == ("x", "flow")
    assert (pixels.denoiser.loss.weighting, latent.denoiser.loss.weighting) == ("flow", "plain")
    assert pixels.data == latent.data and pixels.seed == latent.seed == 5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[study]", "[other]", "study.budget is missing"),
        ("budget = 4e9", "budget = -1.0", "budget"),
        ("budget = 4e9", "", "study.budget"),
        ("points = [0.5, 1.0]", "points = [0.5, 0.4, 1.0]", "points"),
        ("points = [0.5, 1.0]", "points = [0.5]", "points"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds"),
        ('name = "f8"', 'name = "pixels"', "name of its own"),
        ('name = "f8"', 'name = "../f8"', "name of its own"),
        ("factor = 8", "factor = 7", "factor"),
        ("decay = 0.0", "decay = 0.5", "decay"),
        ('kind = "scenes"', 'kind = "folder"', "scenes"),
        ('"denoiser.loss.weighting" = "flow"', '"data.size" = 64', "may not set data.size"),
        ('"denoiser.loss.weighting" = "flow"', '"denoiser.deepness" = 64', "deepness"),
        ("objects = [1, 1]", "objects = [0, 9]", "objects"),
        ("steps = 2\n[[study.arms]]", "stepz = 2\n[[study.arms]]", "stepz"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(recipe, old, new, said):
    with pytest.raises(InputError, match=said):
        read_study(changed(recipe, old, new))


def test_the_budget_is_what_the_networks_do(recipe):
    """Each part is counted anew here, of real steps on real tensors, and their sum fits in the budget and fills it."""
    study = read_study(recipe)
    words = words_of(study)
    for arm in study.arms:
        way = plan(study, arm, 0, words)
        own = way.recipe.denoiser.train
        step = own.batch * way.picture
        assert 0 <= study.budget - way.compute[-1] < 1.01 * step
        assert way.compute[0] <= study.budget / 2 and way.steps == tuple(sorted(way.steps))
    assert way.parameters[0] > 0 and (way.numbers, way.tokens) == (4 * 4 * 4, 16)
    from sfumato.autoencoder import Autoencoder

    first = way.recipe.autoencoder
    model, pixels = Autoencoder(first.model), torch.zeros(4, 3, 1, 32, 32)
    scales = [replace(first.loss, equivariance_scales=(s,)) for s in first.loss.equivariance_scales]
    counts = [
        count_flops(lambda one=one: autoencoder_loss(model, pixels, one, torch.Generator(), 1)[0].backward())
        for one in scales
    ]
    assert way.autoencoder == pytest.approx(first.train.steps * sum(counts) / len(counts))
    encode = count_flops(model.encode, pixels[:1])
    assert (
        way.encoding >= 16 * encode * 2 * 0.3
    )  # pictures once to statistics and once to latents, forward alone


def test_muons_products_are_paid_for(recipe):
    plain = read_study(recipe)
    muon = read_study(changed(recipe, "[denoiser.train]", '[denoiser.train]\noptimizer = "muon"'))
    words = words_of(plain)
    one, other = (plan(study, study.arms[0], 0, words) for study in (plain, muon))
    assert other.picture == one.picture and other.steps[-1] < one.steps[-1]
    layer = torch.nn.Module()
    layer.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
    layer.blocks[0](torch.ones(1, 8)).sum().backward()
    steps = make_optimizers(layer, muon.recipe(muon.arms[0], 0).denoiser.train)
    assert count_flops(lambda: [s.step() for s in steps]) > 0


def curve(arm, seed, *points):
    return Curve(
        arm,
        seed,
        tuple({"compute": c, "strict": s, "kernel_distance": k, "seconds": 1.0} for c, s, k in points),
        True,
        None,
        {"autoencoder": 2000.0, "encoding": 500.0},
        {},
    )


def results(recipe, *curves):
    study = read_study(recipe)
    return Results(replace(study, seeds=(0, 1, 2)), curves, {})


def test_an_order_takes_three_seeds_and_no_overlap(recipe):
    a, b = read_study(recipe).arms
    good = [curve(a, s, (1.0, 0.5 + 0.01 * s, 1.0)) for s in range(3)]
    bad = [curve(b, s, (1.0, 0.2, 2.0)) for s in range(3)]
    assert orders(results(recipe, *good, *bad), "strict") == [(a, b)]
    assert orders(results(recipe, *good, *bad), "kernel_distance") == [(a, b)]
    assert orders(results(recipe, *good, *bad[:2]), "strict") == []
    lucky = [*bad[:2], curve(b, 2, (1.0, 0.505, 0.5))]
    assert orders(results(recipe, *good, *lucky), "strict") == []
    unfinished = [*bad[:2], replace(bad[2], complete=False)]
    assert orders(results(recipe, *good, *unfinished), "strict") == []
    chance = (
        [curve(a, s, (1.0, 0.02, 1.0)) for s in range(3)],
        [curve(b, s, (1.0, 0.0, 2.0)) for s in range(3)],
    )
    assert (
        orders(results(recipe, *chance[0], *chance[1]), "strict") == []
    )  # a handful of pictures says nothing


def test_compute_to_a_quality_lies_on_the_curve():
    line = curve(Arm("a", 8), 0, (1e3, 0.0, 8.0), (1e5, 0.4, 4.0))
    assert reached_at(line, "strict", 0.2) == pytest.approx(1e4)
    assert reached_at(line, "kernel_distance", 6.0) == pytest.approx(1e4)
    assert reached_at(line, "strict", 0.4) == pytest.approx(1e5)
    assert reached_at(line, "strict", 0.5) is None
    assert reached_at(line, "kernel_distance", 9.0) == pytest.approx(1e3)


def test_how_much_cheaper_is_read_at_the_quality_that_both_reach(recipe):
    pixel, latent = read_study(recipe).arms
    fast = curve(latent, 0, (1e4, 0.0, 8.0), (1e6, 0.4, 4.0))
    slow = curve(pixel, 0, (1e4, 0.0, 12.0), (1e6, 0.2, 6.0))
    found = cheaper(results(recipe, fast, slow), latent, "strict")
    assert found.ratios == pytest.approx((10.0,)) and found.pixel == pixel
    assert not (found.at_most or found.at_least)
    given = cheaper(results(recipe, fast, slow), latent, "strict", given=True)
    assert given.ratios == pytest.approx((1e6 / (1e5 - 2500),))
    assert cheaper(results(recipe, fast), latent, "strict") is None
    swapped = [
        curve(latent, 0, (1e4, 0.0, 12.0), (1e6, 0.2, 6.0)),
        curve(pixel, 0, (1e4, 0.0, 8.0), (1e6, 0.4, 4.0)),
    ]
    assert cheaper(results(recipe, *swapped), latent, "kernel_distance").ratios == pytest.approx((0.1,))
    nothing = [curve(arm, 0, (1e4, 0.0, 8.0), (1e6, 0.01, 4.0)) for arm in (pixel, latent)]
    assert cheaper(results(recipe, *nothing), latent, "strict") is None


def test_what_was_reached_at_a_first_point_is_a_bound(recipe):
    pixel, latent = read_study(recipe).arms
    slow = curve(latent, 0, (1e4, 0.0, 9.0), (1e6, 0.0, 5.0))
    found = cheaper(
        results(recipe, slow, curve(pixel, 0, (1e4, 0.0, 4.0), (1e6, 0.0, 2.0))), latent, "kernel_distance"
    )
    assert found.ratios == pytest.approx((0.01,)) and found.at_most and not found.at_least
    early = curve(latent, 0, (1e4, 0.0, 5.0), (1e6, 0.0, 5.0))
    both = results(recipe, early, curve(pixel, 0, (1e4, 0.0, 4.0), (1e6, 0.0, 2.0)))
    assert cheaper(both, latent, "kernel_distance") is None


def test_the_page_claims_no_order_before_three_seeds(recipe):
    page = text(results(recipe), "page", [], "sfumato …")
    assert "no order is claimed" in page and "Not all of it is complete" in page and AGREE == 3


class Stop(Exception):
    pass


@pytest.mark.full
def test_a_study_runs_stops_goes_on_and_is_reported(recipe, tmp_path, capsys):
    """Stopped after the first point of its first arm, the same call does what is left, with the same numbers."""
    out = tmp_path / "study"
    study = replace(read_study(recipe), seeds=(0,))

    def stop(text):
        raise Stop

    with pytest.raises(Stop):
        run_study(study, out, device="cpu", told=stop)
    first = json.loads((place_of(out, study.arms[0], 0) / "result.json").read_text())
    assert len(first["points"]) == 1 and not first["complete"]
    told = []
    run_study(study, out, device="cpu", told=told.append)
    found = read_results(study, out)
    assert found.everything() and len(found.curves) == 2 and found.scenes["pictures"] == 4
    assert found.curves[0].points[0] == first["points"][0]
    latent = next(c for c in found.curves if not c.arm.pixels)
    assert latent.ceiling["psnr"] > 5 and latent.points[-1]["compute"] <= study.budget
    assert not (place_of(out, latent.arm, 0) / "latents").exists()
    run_study(study, out, device="cpu", told=told.append)
    assert told[-2:] == ["pixels, seed 0: complete", "f8, seed 0: complete"]

    page = tmp_path / "page.md"
    assert run(["study", "compression", str(recipe), "--out", str(out), "--report", str(page)]) == 0
    written = page.read_text()
    assert "| `f8` | 0 | – |" in written and "no order is claimed" in written
    numbers = json.loads((tmp_path / "page.json").read_text())
    assert [run["points"][-1] for run in numbers["runs"]] == [c.points[-1] for c in found.curves]
    for name in ("page.png", "page.svg", "page-drawn.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 1000
        assert name in written or name.endswith("svg")
    assert str(page) in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="another recipe"):
        read_results(replace(study, budget=study.budget * 2), out)


@pytest.mark.parametrize("name", ["study-cpu", "study-gpu"])
def test_the_recipes_that_ship_are_whole(name, pytestconfig):
    study = read_study(pytestconfig.rootpath / "recipes" / f"{name}.toml")
    assert {arm.factor for arm in study.arms} == {1, 2, 4, 8, 16, 32}
    assert {arm.channels for arm in study.arms if arm.factor == 8} == {4, 8, 16}
    assert {arm.prediction for arm in study.arms if arm.pixels} == {"x", "flow"}
    assert len(study.seeds) >= AGREE


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    path = tmp_path / "plain.toml"
    path.write_text("[data]\n")
    assert run(["study", "compression", str(path)]) == 2
    assert "[study]" in capsys.readouterr().err
