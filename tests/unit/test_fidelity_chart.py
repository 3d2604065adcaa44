"""Charts of instruments whose properties are known: the identity, a Gaussian blur, and pocket's own."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.table import Cell
from matplotlib.text import Text

from sfumato.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.errors import InputError
from sfumato.families.autoencoders import of_our_own
from sfumato.fidelity import draw, ocr, sections, sheets, signal, store, targets, things, words
from sfumato.fidelity.chart import Chart, crossing, measure
from sfumato.fidelity.instrument import Instrument, open_instrument
from sfumato.fidelity.page import html
from sfumato.fidelity.predict import Transfer, rising
from sfumato.fidelity.specimens import Specimen
from sfumato.fidelity.table import notes_of, rows_of
from sfumato.fidelity.validate import composed, judge

CPU = torch.device("cpu")
SIGMA = 1.5


def blur(x: torch.Tensor) -> torch.Tensor:
    taps = torch.exp(-(torch.arange(-12.0, 13) ** 2) / (2 * SIGMA**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, 25)
    x = F.pad(x, (12, 12, 12, 12), mode="replicate")
    return F.conv2d(F.conv2d(x, taps, groups=3), taps.transpose(2, 3), groups=3)


def instrument(through, factor: int = 1, name: str = "known") -> Instrument:
    return Instrument(name, factor, 3, through, f"digest of {name}", CPU)


@pytest.fixture(scope="module")
def identity() -> Chart:
    """Of the real autoencoder at factor 1, which is the identity."""
    opened = of_our_own(Autoencoder(AutoencoderConfig(1)).eval(), torch.float32)
    return measure(instrument(lambda x: opened.roundtrip(x[:, :, None])[:, :, 0], name="identity"))


BLUR = instrument(blur, factor=8, name="blur")


def test_the_identity_keeps_everything(identity):
    gratings = identity.rows("gratings")
    assert len(gratings) > 200
    assert all(row["mtf"] == pytest.approx(1, abs=1e-5) and row["error"] < 1e-5 for row in gratings)
    assert all(
        row["kept"] == pytest.approx(1, abs=1e-5) and row["bend"] < 1e-5 for row in identity.rows("lines")
    )
    assert all(row["shape"] == row["colour"] == 1 for row in identity.rows("objects"))
    assert all(row["letters"] == 1 for row in identity.rows("text") if row["size"] >= 8)
    assert all(row["letters"] >= 0.95 for row in identity.rows("text"))
    assert all(np.allclose(row["mtf"], 1, atol=1e-6) for row in identity.rows("edges"))
    assert max(row["delta_e"] for row in identity.rows("colour")) < 1e-3
    limits = identity.limits
    assert (limits["text"], limits["line"], limits["object"], limits["checker"]) == (6, 1, 3, 1)


def theory(frequency):
    """The MTF of a Gaussian blur."""
    return np.exp(-2 * (np.pi * SIGMA * np.asarray(frequency)) ** 2)


def test_a_blur_has_the_mtf_that_theory_gives_it():
    for row in sections.gratings(BLUR):
        assert row["mtf"] == pytest.approx(theory(row["frequency"]), abs=0.004)
        assert row["mtf_high"] - row["mtf_low"] < 0.01  # it knows no places
    for row in sections.edges(BLUR):
        low = np.array(row["frequency"]) < 0.3
        assert np.array(row["mtf"])[low] == pytest.approx(theory(row["frequency"])[low], abs=0.01)
        assert row["rise"] == pytest.approx(2.563 * SIGMA, abs=0.3)


@pytest.mark.full
def test_a_linear_instrument_is_told_almost_exactly():
    blurred = measure(BLUR)
    half = np.sqrt(np.log(2) / 2) / (np.pi * SIGMA)  # cycles per pixel at which half is kept
    assert blurred.limits["finest_luma"] == pytest.approx(1 / half, rel=0.02)
    assert blurred.limits["bend"] < 0.06
    found = judge(BLUR, blurred, composed(2, 50))
    assert found["all"]["regions"] > 50
    assert found["all"]["rank_correlation"] > 0.97
    assert found["all"]["rms"] < 0.06


def test_rows_hold_what_places_in_a_cell_change():
    """Of an instrument that keeps one half of each cell and greys the other, and of the identity."""

    def halved(x):
        keep = (torch.arange(x.shape[-1]) % 8 < 4).float()
        return x * keep + (1 - keep) * x.mean()

    uneven = instrument(halved, factor=8)
    dark = sections.colour(uneven)[0]
    assert dark["delta_e_low"] < 1e-3 < 20 < dark["delta_e_high"]
    assert any(row["rise_high"] - row["rise_low"] > 0.1 for row in sections.edges(uneven))
    lines = [row for row in things.lines(uneven, lambda picture: 0.0) if row["angle"] == 90]
    thin = next(row for row in lines if row["thickness"] == 3)
    assert len(thin["loss_at"]) == 4 and max(thin["loss_at"]) - min(thin["loss_at"]) > 0.3
    objects = next(row for row in things.objects(uneven, lambda picture: 0.0) if row["size"] == 3)
    assert objects["shape_low"] < objects["shape"] < objects["shape_high"]
    assert np.mean(objects["loss_at"]) == pytest.approx(objects["loss"])
    same = instrument(lambda x: x, factor=8)
    for rows in (sections.star(same), sections.noise(same), sections.edges(same)):
        name = "rise" if "rise" in rows[0] else "kept"
        assert all(row[f"{name}_low"] == pytest.approx(row[f"{name}_high"], abs=0.3) for row in rows)


def test_a_chart_goes_through_json(identity, tmp_path):
    again = Chart.from_dict(json.loads(json.dumps(identity.to_dict())))
    assert again.limits == pytest.approx(identity.limits, rel=1e-3, abs=1e-5)
    assert again.to_dict()["sections"] == identity.to_dict()["sections"]
    assert ocr.MISSING in identity.to_dict()["notes"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.update(format="sfumato chart 0"),
        lambda values: values.pop("digest"),
        lambda values: values["sections"].pop("text"),
        lambda values: values["sections"].update(lines=[]),
        lambda values: values.update(sections=7),
    ],
)
def test_a_damaged_chart_is_refused(identity, damage):
    values = json.loads(json.dumps(identity.to_dict()))
    damage(values)
    with pytest.raises(InputError, match="measure again"):
        Chart.from_dict(values)


def test_charts_are_kept_by_the_weights_and_the_precision(identity, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = instrument(lambda x: x, name="identity")
    assert store.find(mine) is None
    place = store.keep(identity)
    assert store.find(replace(mine, name="as called now")).model == "as called now"
    assert store.find(replace(mine, digest="another")) is None
    halves = replace(mine, precision="bfloat16")
    assert store.find(halves) is None and store.find(halves, any_precision=True).precision == "float32"
    store.keep(replace(identity, precision="bfloat16", factor=7))
    assert (store.find(halves).factor, store.find(mine).factor) == (7, 1)
    assert identity.digest in {chart.digest for chart in store.known("another")}
    place.write_text("{", encoding="utf-8")
    assert store.find(mine) is None


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_chart_that_comes_with_pocket_is_of_its_weights(precision, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pocket = open_instrument("pocket", "cpu", dtype=getattr(torch, precision))
    chart = store.find(pocket)
    assert chart is not None and (chart.factor, chart.channels, chart.precision) == (8, 8, precision)
    assert chart.reader.startswith("RapidOCR")
    told = {
        (r["channel"], r["contrast"], r["angle"], r["frequency"]): r["mtf"] for r in chart.rows("gratings")
    }
    patch = targets.grating(64, 1 / 16, 0, contrast=0.9)
    back = sheets.through(pocket, [patch] * 16)[5]
    inner = np.s_[8:56, 8:56]
    again = abs(signal.grating_response(patch[inner].mean(-1), back[inner].mean(-1), 1 / 16, 0))
    assert told["luma", 0.9, 0, 0.0625] == pytest.approx(again, abs=0.06)


def test_words_are_read_by_their_letters_and_not_from_nothing():
    sheet = words.sheets("regular", 20, 1.0, 6, 256, (0, 2, 4, 6))[0]
    assert {word.x % 8 for word in sheet} | {word.y % 8 for word in sheet} <= {0, 2, 4, 6}
    picture = words.draw(sheet, 256)
    assert [words.read_by_shape(word, picture) for word in sheet] == [word.text for word in sheet]
    grey = np.full_like(picture, 0.5)
    assert all(words.read_by_shape(word, grey).strip() == "" for word in sheet)
    noise = np.random.default_rng(0).random(picture.shape)
    guessed = np.mean([words.right_letters(word.text, words.read_by_shape(word, noise)) for word in sheet])
    assert guessed < 0.3


def test_letters_read_right():
    assert words.right_letters("Quick", "quick") == 1
    assert words.right_letters("quick", "quack") == pytest.approx(0.8)
    assert words.right_letters("quick", "") == 0
    assert words.right_letters("ab", "xxxxxxx") == 0


def test_an_engine_is_used_where_there_is_one(monkeypatch):
    """A reader that reads nothing makes the text limit absent, and one that is missing is told how to get."""
    blind = ocr.Reader("blind", lambda picture: ("", 0.0))
    rows = things.text(instrument(lambda x: x), lambda picture: 0.0, blind)
    assert {row["ocr"] for row in rows} == {0.0} and min(row["letters"] for row in rows) > 0.9
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    assert ocr.find_reader() is None
    assert "pip install 'sfumato[ocr]'" in ocr.MISSING


@pytest.mark.skipif(ocr.find_reader() is None, reason="no OCR engine is installed")
def test_the_engine_reads():
    sheet = words.sheets("bold", 24, 1.0, 3, 256, (0, 1))[0]
    picture = words.draw(sheet, 256)
    left, top, right, bottom = sheet[1].box
    text, sure = ocr.find_reader().read(picture[max(top, 0) : bottom, max(left, 0) : right])
    assert words.right_letters(sheet[1].text, text) == 1 and sure > 0.5


def test_who_read_the_words_is_said_wherever_they_are_shown(identity):
    """In the table of every kind, in the plots, and what is missing where nothing but shapes was matched."""
    read = replace(identity, model="a", reader="RapidOCR 3", sections=dict(identity.sections))
    read.sections["text"] = [row | {"ocr": 1.0} for row in identity.rows("text")]

    def drawn(charts) -> str:
        seen = [[Specimen("s", np.zeros((4, 4, 3)), np.zeros((4, 4, 3)))]] * len(charts)
        figure = draw.page(charts, seen)
        cells = [cell.get_text() for cell in figure.findobj(Cell)]
        return " | ".join(text.get_text() for text in [*figure.findobj(Text), *cells])

    alone, both = [identity], [read, replace(identity, model="b")]
    picture = drawn(alone)
    assert "letter shapes" in picture and "pip install 'sfumato[ocr]'" in picture
    assert "different readers" not in picture
    picture = drawn(both)
    for told in (picture, html(both, ())):
        assert "6 px (RapidOCR 3)" in told and "6 px (letter shapes)" in told
        assert "different readers" in told and f"b: {ocr.MISSING}" in unescape(told)
    assert "a: regular, by RapidOCR 3" in picture and "b: regular, by letter shapes" in picture
    assert notes_of([read, read]) == []
    assert not any("(RapidOCR" in cell for _, cells in rows_of([read, read]) for cell in cells)


def test_crossings_are_where_all_larger_sizes_pass():
    assert crossing([(1, 0.0), (2, 1.0), (3, 0.4), (4, 1.0)], 0.7) == pytest.approx(3.5)
    assert crossing([(1, 0.9), (2, 1.0)], 0.5) == 1
    assert crossing([(1, 0.0), (2, 0.4)], 0.5) is None


def test_the_curve_of_correction_rises_and_stays_in_range():
    xs, ys = rising([(0.2, 0.1), (0.5, 0.45), (0.6, 0.3), (0.9, 0.8)])
    assert (np.diff(xs) > 0).all() and (np.diff(ys) >= 0).all()
    assert np.interp(0.55, xs, ys) == pytest.approx(0.375)
    assert (xs[0], ys[0], ys.max() <= 1) == (0, 0, True)


def test_an_instrument_takes_pictures_of_any_size():
    odd = np.random.default_rng(0).random((37, 51, 3)).astype(np.float32)
    back = instrument(lambda x: x, factor=8).picture(odd)
    assert back == pytest.approx(odd, abs=1e-6)
    wide = np.random.default_rng(1).random((40, 2500, 3)).astype(np.float32)
    whole = blur(torch.from_numpy(wide).permute(2, 0, 1)[None] * 2 - 1)[0].permute(1, 2, 0).numpy() / 2 + 0.5
    assert instrument(blur, factor=8).picture(wide) == pytest.approx(whole, abs=1e-5)


def test_transfer_gives_back_what_was_measured():
    rows = sections.gratings(BLUR)
    transfer = Transfer.of({"gratings": rows})
    wanted = {"channel": "luma", "contrast": 0.3, "angle": 45, "frequency": 0.1}
    row = next(row for row in rows if wanted.items() <= row.items())
    found = transfer.error("luma", 0.3, np.array([[0.1]]), np.array([[45.0]]))
    assert found[0, 0] == pytest.approx(row["error"])
