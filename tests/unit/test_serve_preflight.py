"""The server's preflight: it looks at the picture as it is drawn on, and tells places in the one that was sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from helpers import white
from sfumato.fidelity import ocr
from sfumato.fidelity.advice import MASK
from sfumato.fidelity.preflight import preflight
from sfumato.fidelity.words import font
from sfumato.generate import load
from sfumato.parts import Inpaint
from sfumato.serve.settings import model_given
from sfumato.serve.worker.preflight import MOTION, WORDS, Preflights
from sfumato.serve.worker.together import Bench
from sfumato.types import Request

AT = (40, 200, 440, 280)  # where the words stand


@pytest.fixture(scope="module")
def pocket():
    return load("pocket", "cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def preflights(pocket):
    return Preflights(model_given("pocket"), pocket, Bench(torch.device("cpu")))


@pytest.fixture(scope="module")
def poster() -> Image.Image:
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((50, 215), "Grand opening", fill="black", font=font("regular", 48))
    return image


def told(preflights, pocket, **wanted):
    return preflights.of(pocket.complete(Request("", **wanted)))["picture"]


def lies_in(box, outer, by=4):
    return (
        box["left"] >= outer[0] - by
        and box["top"] >= outer[1] - by
        and box["right"] <= outer[2] + by
        and box["bottom"] <= outer[3] + by
    )


@pytest.mark.parametrize("fit", ["cover", "stretch", "contain"])
def test_it_is_the_picture_at_the_size_that_is_drawn(preflights, pocket, poster, fit):
    found = told(preflights, pocket, image=poster, size=(128, 128), fit=fit)
    small = np.asarray(poster.resize((128, 128), Image.Resampling.LANCZOS), np.float32) / 255
    assert found["score"] == preflight(small, preflights.instrument, preflights.chart).score
    assert found["score"] < told(preflights, pocket, image=poster)["score"]
    assert found["size"] == [128, 128] and found["image_size"] == [512, 512]
    assert all(lies_in(each["box"], AT) for each in found["regions"] if each["verdict"] == "lost")
    assert any(each["box"]["right"] > 256 for each in found["regions"])


def test_only_what_is_painted_over_can_be_lost(preflights, pocket, poster):
    beside, over = white(512, 512, 0, 400, 512, 512), white(512, 512, *AT)
    small = {"image": poster, "size": (128, 128), "fit": "cover"}
    kept = told(preflights, pocket, mask=beside, **small)
    assert kept["regions"] == [] and kept["score"] > 75
    lost = told(preflights, pocket, mask=over, **small)
    assert lost["lost"] and lost["score"] < 50
    again = told(preflights, pocket, mask=beside, inpaint=Inpaint(paste=False), **small)
    assert again["lost"]  # without pasting all of it goes through the autoencoder


def test_around_a_mask_it_is_the_part_that_is_drawn_on(preflights, pocket, poster):
    found = told(
        preflights,
        pocket,
        image=poster,
        mask=white(512, 512, *AT),
        inpaint=Inpaint(padding=8),
        size=(128, 128),
    )
    assert found["regions"] and all(lies_in(each["box"], AT) for each in found["regions"])


def test_what_is_added_around_a_picture_is_not_looked_at(preflights, pocket):
    striped = Image.fromarray(np.tile(np.arange(64) % 4 // 2 * 255, (64, 1)).astype(np.uint8)).convert("RGB")
    grown = {"image": striped, "outpaint": (0, 64, 0, 64)}
    kept = told(preflights, pocket, **grown)
    assert (kept["score"], kept["regions"], kept["size"]) == (100, [], [64, 192])
    inside = told(preflights, pocket, inpaint=Inpaint(paste=False), **grown)
    beside = told(preflights, pocket, image=striped, size=(64, 192), fit="contain")
    for found in (inside, beside):
        boxes = [each["box"] for each in found["regions"]]
        assert found["score"] < 50 and boxes
        assert all(box["left"] < box["right"] and box["top"] < box["bottom"] for box in boxes)


def test_it_says_of_reading_what_is_so(preflights, pocket, poster, monkeypatch):
    for engine, note in ((None, ocr.MISSING), (lambda: None, ocr.UNASKED)):
        monkeypatch.setattr(ocr, "_engine", lambda engine=engine: engine)
        assert note in told(preflights, pocket, image=poster)["notes"]


def test_of_a_clip_it_is_the_first_picture_at_the_clips_size(preflights, pocket, poster):
    wanted = {"prompt": "a red ball", "frames": 5, "size": (128, 96)}
    found = preflights.of(pocket.complete(Request(image=poster, **wanted)))
    still = told(preflights, pocket, image=poster, size=(128, 96), fit="cover")
    regions = [{**one, "helps": [way for way in one["helps"] if way != MASK]} for one in still["regions"]]
    assert regions != still["regions"]  # no mask keeps a part of a clip
    assert found["picture"] == still | {"regions": regions}
    assert found["picture"]["lost"] and found["notes"] == [MOTION]
    words = preflights.of(pocket.complete(Request(**wanted)))
    assert words["picture"] is None and words["notes"] == [MOTION, WORDS]
    assert preflights.of(pocket.complete(Request("a red ball")))["notes"] == []
