"""Preflight: what is found in pictures and prompts, what is foretold of it, and how that is told."""

from __future__ import annotations

import json
import re
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sfumato.drawing.request import check_size
from sfumato.fidelity import room, store, targets
from sfumato.fidelity.chart import Chart
from sfumato.fidelity.heldout import KINDS, held_out
from sfumato.fidelity.instrument import Instrument, open_instrument
from sfumato.fidelity.ocr import Reader
from sfumato.fidelity.predict import Transfer, Waves, measured, predict
from sfumato.fidelity.preflight import keep_mask, preflight
from sfumato.fidelity.prompt import examine, largest_type, score
from sfumato.fidelity.regions.find import find
from sfumato.fidelity.regions.region import shared
from sfumato.fidelity.report import folder_page, picture_page, prompt_page
from sfumato.fidelity.validate import composed, judge, seen
from sfumato.fidelity.words import font
from sfumato.generate import load

IDENTITY = Instrument("identity", 8, 3, lambda x: x, "", torch.device("cpu"))


@pytest.fixture(scope="module")
def pocket() -> tuple[Instrument, Chart]:
    instrument = open_instrument("pocket", "cpu", dtype=torch.float32)
    return instrument, store.find(instrument)


def picture(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.float32) / 255


def page(lines: list[tuple[str, str, int]], side: int = 256) -> np.ndarray:
    """Lines of (text, weight, size), black on white."""
    image = Image.new("RGB", (side, side), "white")
    pen, y = ImageDraw.Draw(image), 10
    for text, weight, size in lines:
        pen.text((12, y), text, fill="black", font=font(weight, size))
        y += round(size * 1.4) + 6
    return picture(image)


def test_lines_of_text_are_found_with_their_size():
    found = find(
        page(
            [
                ("Grand opening today", "regular", 12),
                ("Saturday 7 pm", "bold", 24),
                ("LIBRARY", "regular", 48),
            ]
        )
    )
    assert [region.kind for region in found] == ["text"] * 3
    assert [region.size for region in found] == pytest.approx([12, 24, 48], rel=0.25)


@pytest.mark.parametrize("period", [4, 6, 9])
def test_patterns_are_found_with_their_period(period):
    shown = np.full((192, 192, 3), 0.6)
    shown[32:160, 32:160] = targets.grating(128, 1 / period, 30, contrast=0.6)
    found = [region for region in find(shown) if region.kind == "pattern"]
    assert len(found) == 1
    assert found[0].size == pytest.approx(period, rel=0.15)
    assert found[0].angle == pytest.approx(30, abs=8)
    assert shared(found[0].box, (32, 32, 160, 160)) > 0.8 * 128 * 128


def test_thin_lines_and_small_objects_are_found():
    image = Image.new("RGB", (256, 256), (200, 200, 190))
    pen = ImageDraw.Draw(image)
    pen.line((20, 40, 220, 40), fill=(30, 30, 30), width=2)
    pen.ellipse((100, 120, 116, 136), fill=(180, 40, 40))
    found = {region.kind: region for region in find(picture(image))}
    assert set(found) == {"line", "object"}
    assert found["line"].size == pytest.approx(2, abs=0.6)
    assert found["object"].size == pytest.approx(17, abs=1)


COLOURS = ((0.8, 0.15, 0.15), (0.05, 0.05, 0.05), (1, 1, 1), (0.15, 0.3, 0.8), (0.95, 0.8, 0.1))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", ["disc", "square"])
def test_small_objects_are_found_with_their_size(kind, colour):
    for size in (5, 9, 15, 22, 31, 40, 60):
        mask = targets.shape_mask(128, kind, size)[..., None]
        found = find(mask * np.array(colour) + (1 - mask) * 0.5)
        across = size * (0.9 if kind == "square" else 1)
        assert [region.kind for region in found] == ["object"]
        assert found[0].size == pytest.approx(across, rel=0.15, abs=1)
        left, top, right, bottom = found[0].box
        assert abs(left + right - 128) <= 2 and abs(top + bottom - 128) <= 2


def test_things_side_by_side_are_told_apart():
    image = Image.new("RGB", (128, 128), (120, 130, 140))
    pen = ImageDraw.Draw(image)
    pen.ellipse((20, 50, 39, 69), fill=(250, 240, 230))
    pen.rectangle((48, 50, 67, 69), fill=(20, 20, 60))
    found = find(picture(image))
    assert [(region.kind, region.size) for region in found] == [("object", 20.0), ("object", 20.0)]


def test_plain_pictures_hold_nothing():
    y, x = np.mgrid[:128, :128] / 128
    assert find(np.full((128, 128, 3), 0.4)) == []
    assert find(np.stack([x, y, (x + y) / 2], -1)) == []
    assert find(np.zeros((1, 1, 3))) == []
    assert find(np.random.default_rng(0).random((5, 700, 3))) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_placed_is_found(kind):
    shown = [held_out(kind, number) for number in (30, 31)]
    told = [there for each in shown for _, there in seen(each, find(each.picture))]
    assert np.mean(told) > 0.75


def test_losses_foretold_for_pocket_rank_as_the_measured_ones(pocket):
    """A small part of what `python -m sfumato.fidelity.validate` measures."""
    found = judge(*pocket, composed(2, 70))
    assert found["all"]["regions"] > 60
    assert found["all"]["rank_correlation"] > 0.8


def test_a_larger_picture_loses_less(pocket):
    waves = Waves.of(page([("small print", "regular", 12)])[0:40, 0:120])
    transfer = Transfer.of(pocket[1].sections)
    losses = [predict(waves, transfer, "text", scale) for scale in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0.5 > losses[-1]


def test_nothing_is_lost_where_nothing_changes(pocket):
    report = preflight(page([("unchanged", "regular", 20)]), IDENTITY, pocket[1])
    assert [finding.measured for finding in report.findings] == pytest.approx([0], abs=1e-6)
    assert (report.score, report.count("lost")) == (100, 0)
    plain = np.full((16, 16, 3), 0.5)
    assert measured(plain, plain + 0.001) == 0 == predict(Waves.of(plain), Transfer.of(pocket[1].sections))


def test_the_report_of_a_page_of_small_print(pocket):
    instrument, chart = pocket
    shown = page([("terms and conditions apply", "regular", 9), ("SALE", "bold", 64)])
    report = preflight(shown, instrument, chart, name="page")
    print_, _ = sorted(report.findings, key=lambda finding: finding.region.box[1])
    assert print_.region.kind == "text" and print_.verdict == "lost" and print_.predicted > 0.5
    assert "font size" in print_.reason
    assert any("which is read" in each for each in print_.helps)
    assert any("mask" in each for each in print_.helps)
    assert report.score < 50
    mask = keep_mask(report)
    left, top, right, bottom = print_.region.box
    assert mask.shape == (256, 256) and not mask[top:bottom, left:right].any() and mask[-1, -1] == 1
    only_told = preflight(shown, instrument, chart, run=False)
    assert all(finding.measured is None for finding in only_told.findings) and only_told.after is None
    json.dumps(report.to_dict())


def test_another_model_that_keeps_it_is_named(pocket):
    instrument, chart = pocket
    rows = [row | {"error": 0.01, "mtf": 1.0} for row in chart.rows("gratings")]
    sharper = Chart.from_dict(
        chart.to_dict() | {"model": "sharper", "sections": chart.sections | {"gratings": rows}}
    )
    report = preflight(page([("small print here", "regular", 12)]), instrument, chart, others=[sharper])
    assert any("sharper would lose" in each for each in report.findings[0].helps)


def test_a_reader_says_what_is_text(pocket):
    instrument, chart = pocket
    shown = page([("readable words", "regular", 20)])
    said = preflight(shown, instrument, chart, reader=Reader("sure", lambda line: ("readable words", 0.9)))
    assert (said.findings[0].before, said.findings[0].after) == ("readable words", "readable words")
    none = preflight(shown, instrument, chart, reader=Reader("unsure", lambda line: ("x", 0.1)))
    assert none.findings[0].region.kind == "detail" and none.findings[0].before is None


def test_the_sizes_that_would_help_can_be_drawn(pocket):
    instrument, chart = pocket
    wishes = [wish for words in ("Grand opening", "fifty birds", "a tiny bird", "a newspaper")
              for wish in examine(f'"{words}"' if words[0].isupper() else words, (128, 128), chart)]  # fmt: skip
    report = preflight(page([("small print", "regular", 12)], 128), instrument, chart)
    told = " ".join(text for each in (*wishes, *report.findings) for text in each.helps)
    sizes = [tuple(map(int, pair)) for pair in re.findall(r"at (\d+)x(\d+)", told)]
    assert len(sizes) > 2
    for size in sizes:
        check_size(size, load("pocket", "cpu").system.config.multiple)


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not any(name in ("src", "href") and str(value).startswith("http") for name, value in attrs)


def test_reports_hold_no_markup_of_strangers(pocket):
    instrument, chart = pocket
    hostile = "<script>alert(1)</script><img src=http://x>"
    shown = page([("small print", "regular", 10)])
    reader = Reader("sure", lambda line: (hostile, 0.9))
    report = preflight(shown, instrument, chart, name=hostile, reader=reader)
    assert "script" not in Tags(picture_page(report)).seen
    assert Tags(folder_page([report, report], hostile)).seen.count("script") == 1  # its own, that sorts
    wishes = examine(f'a sign "{hostile}"', (128, 128), chart)
    assert "script" not in Tags(prompt_page(f'a sign "{hostile}"', (128, 128), hostile, 1, wishes)).seen


def test_type_is_set_as_large_as_it_fits():
    one, lines = largest_type("OPEN", (512, 512))
    assert lines == 1 and one == pytest.approx(0.8 * 512 / (4 * 0.6))
    many, lines = largest_type("one two three four five six", (512, 512))
    assert lines > 1 and many < one


def test_prompts_are_told_what_does_not_fit(pocket):
    chart = pocket[1]
    assert score(examine("a red cube behind a blue sphere", (128, 128), chart)) > 90
    long = 'a poster that says "the quick brown fox jumps over the lazy dog near the river"'
    small, large = examine(long, (128, 128), chart), examine(long, (512, 512), chart)
    assert small[0].kind == "text" and small[0].loss > 0.5 > large[0].loss
    assert any("(×" in each for each in small[0].helps)
    assert score(examine("a crowd of spheres", (128, 128), chart)) < score(
        examine("two spheres", (128, 128), chart)
    )
    assert examine("a tiny bird on a newspaper", (128, 128), chart)[0].loss > 0.5
    more = [examine(f'a page "{"words " * n}"', (512, 512), chart)[0] for n in (60, 70, 15_000)]
    assert more[0].size > more[1].size > more[2].size > 0 and more[2].loss > 0.9  # however many there are
    crowds = [
        examine(f"{count} people on a hill", (256, 256), chart)[0] for count in ("five", "fifty", "5000")
    ]
    assert crowds[0].loss < crowds[1].loss <= crowds[2].loss and "5000 things" in crowds[2].what
    assert examine("", (128, 128), chart) == [] and examine('""', (64, 64), chart) == []


def test_no_more_memory_is_taken_than_is_planned(pocket):
    shown = np.tile(page([("small print here", "regular", 11), ("SALE", "bold", 48)]), (3, 3, 1))
    tracemalloc.start()
    preflight(shown, *pocket, run=False)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.5 * room.BYTES < taken / (768 * 768) < room.BYTES
