"""Control pictures: what a request says of them, how they come to size, edges, when they act, and what is refused."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import small_control as small
from helpers import apart, noise, white
from sfumato.errors import InputError, SfumatoError
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.receipts.provenance import read_like, read_recipe
from sfumato.tasks.hints import PREPARE, canny, hint, soft_edges
from sfumato.types import Control, HiRes, Inpaint, Request
from small_sd import SMALL, write

CPU = torch.device("cpu")
SIDE = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind → a small model with the ControlNets canny and depth."""
    known = {}

    def make(kind: str) -> Model:
        if kind not in known:
            place = tmp_path_factory.mktemp(kind)
            base = kind.split("-")[0]
            files = {
                name: small.file(place / f"{name}.safetensors", base, seed=seed)
                for name, seed in (("canny", 9), ("depth", 10))
            }
            system = open_system(write(kind, place / "m"), CPU, torch.float32, systems=SMALL)
            known[kind] = Model(system.with_controls(files, SMALL), CPU, kind)
        return known[kind]

    return make


def asking(*controls: Control, **changes) -> Request:
    settings = {"steps": 4, "guidance": 4.0, "sampler": "euler", "size": (SIDE, SIDE), "seed": 3} | changes
    return Request("a cat", controls=controls, **settings)


def square(name: str = "canny", **changes) -> Control:
    return Control(name, noise(SIDE, SIDE, seed=4), **changes)


# --- what a request says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight": math.nan}, "control canny's weight must be between 0 and 10, not NaN"),
        ({"weight": -1.0}, "control canny's weight must be between 0 and 10, not -1"),
        ({"start": 0.7, "end": 0.2}, "control canny starts at 0.7, after its end at 0.2"),
        ({"end": 1.5}, "control canny's end must be between 0 and 1"),
        ({"start": "0"}, "control canny's start must be a number"),
        ({"image": "a.png"}, "control canny must be a PIL picture"),
        ({"guess": 1}, "control canny's guess must be true or false"),
        ({"name": ""}, "a control needs the name of its ControlNet"),
    ],
)
def test_what_no_control_could_be_is_refused(changes, words):
    with pytest.raises(InputError, match=words) as told:
        asking(replace(square(), **changes)).validate()
    assert told.value.argument == "controls"


def test_a_request_goes_through_json_and_back():
    request = asking(square(weight=0.8, end=0.6, prepare="canny"), square("depth", guess=True), fit="cover")
    values = request.to_dict()
    assert values["controls"][0] | {"image": ""} == {
        "name": "canny", "weight": 0.8, "end": 0.6, "prepare": "canny", "image": "",
    }  # fmt: skip
    assert Request.from_dict(values, [noise(SIDE, SIDE, seed=4)]) == request
    with pytest.raises(
        InputError, match=r'control canny names the picture "sha256:.*give the picture itself'
    ):
        Request.from_dict(values, [noise(SIDE, SIDE, seed=5)])
    with pytest.raises(InputError, match='controls\[0\] has no field "wait"'):
        Request.from_dict({"controls": [{"name": "canny", "wait": 1}]})


# --- pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_of_the_shape_is_scaled_and_another_needs_fit():
    large = Control("canny", noise(96, 64))
    assert hint(large, (48, 32), None, 8).size == (48, 32)
    with pytest.raises(
        InputError, match=r"control canny is 96x64, of another shape than the 32x32.*give `size` 48x32"
    ):
        hint(large, (32, 32), None, 8)
    covered = hint(large, (32, 32), "cover", 8)
    assert apart(covered, large.image.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))) <= 2


def test_transparency_is_black():
    clear = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    assert hint(Control("depth", clear), (SIDE, SIDE), None, 8).getextrema() == ((0, 0),) * 3


def test_canny_draws_the_border_of_a_square_white_on_black():
    edges = np.asarray(canny(white(64, 64, 16, 16, 48, 48).convert("RGB")))[..., 0]
    assert set(np.unique(edges)) == {0, 255}
    assert edges[30, 14:18].any() and edges[14:18, 30].any()
    assert not edges[20:44, 20:44].any() and not edges[:12].any()


def test_soft_edges_weigh_a_strong_border_more_than_a_weak_one():
    picture = Image.new("RGB", (96, 64), (0, 0, 0))
    picture.paste((60, 60, 60), (32, 0, 64, 64))
    picture.paste((255, 255, 255), (64, 0, 96, 64))
    edges = np.asarray(soft_edges(picture))[32, :, 0].astype(int)
    weak, strong = edges[28:36].max(), edges[60:68].max()
    assert strong == 255 and 0.15 * strong < weak < 0.6 * strong
    assert edges[8:20].max() == 0


@pytest.mark.parametrize("name", PREPARE)
def test_a_plain_picture_without_edges_gives_black(name):
    assert PREPARE[name](Image.new("RGB", (32, 32), (90, 90, 90))).getextrema() == ((0, 0),) * 3


def test_without_opencv_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "cv2":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SfumatoError, match=r"pip install 'sfumato\[control\]'"):
        canny(noise(8, 8))


# --- drawing -------------------------------------------------------------------------------------------------------


def test_weight_nothing_and_no_steps_draw_as_without(models):
    model = models("sd1")
    bare = model.generate(asking()).images[0]
    assert apart(model.generate(asking(square())).images[0], bare) > 0
    for nothing in (square(weight=0.0), square(start=0.5, end=0.5), square(start=0.9)):
        assert apart(model.generate(asking(nothing)).images[0], bare) == 0


def test_it_acts_in_its_steps_alone_whatever_the_sampler_asks_between(models):
    model = models("sd1")
    seen: list[float] = []
    controller = type(model.system).controller

    class Listening(type(model.system)):
        def controller(self, name, pixels):
            adds = controller(self, name, pixels)
            return lambda x, time, cond, guess: (
                seen.append(float(time.flatten()[0])),
                adds(x, time, cond, guess),
            )[1]

    system = Listening(**vars(model.system))
    for sampler, calls in (("euler", 2), ("heun", 4)):
        seen.clear()
        listening = Model(system, CPU, "m")
        request = listening.complete(asking(square(start=0.25, end=0.75), sampler=sampler))
        listening.sample(listening.condition(request), request.seeds(), request)
        # steps 1 and 2 of four; heun's second call of a step is made at the next step's level
        assert len(seen) == calls, sampler


def test_picture_k_of_a_batch_is_that_of_its_seed_alone(models):
    model = models("sd1")
    whole = model.generate(asking(square(), count=3))
    alone = model.generate(asking(square(), seed=5))
    assert apart(whole.images[2], alone.images[0]) <= 1


def test_two_add_up_and_their_order_is_nothing(models):
    model = models("sd1")
    one, two = square(weight=0.5), Control("depth", noise(SIDE, SIDE, seed=8))
    both = [model.generate(asking(*order)).images[0] for order in ((one, two), (two, one))]
    assert apart(*both) <= 1
    assert apart(both[0], model.generate(asking(one)).images[0]) > 0


@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint"])
def test_with_a_mask_the_rest_stays_and_the_painted_part_hears(models, kind):
    model, picture = models(kind), noise(SIDE, SIDE, seed=6)
    mask = white(SIDE, SIDE, 8, 8, 24, 24)
    begun = {"image": picture, "mask": mask, "strength": 1.0, "inpaint": Inpaint(blur=0)}
    drawn = model.generate(asking(square(), **begun)).images[0]
    bare = model.generate(asking(**begun)).images[0]
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(drawn)[outside], np.asarray(picture)[outside])
    assert apart(drawn, bare) > 0


def test_only_the_masked_part_is_shown_its_part_of_the_control_picture(models):
    model = models("sd1")
    picture, large = noise(64, 64, seed=6), noise(64, 64, seed=7)
    mask = white(64, 64, 0, 0, 16, 16)
    begun = {"image": picture, "mask": mask, "inpaint": Inpaint(padding=8), "size": (SIDE, SIDE)}
    drawn = model.generate(asking(Control("canny", large), **begun)).images[0]
    other = large.copy()
    other.paste((0, 0, 0), (32, 32, 64, 64))  # far from what is drawn
    assert apart(model.generate(asking(Control("canny", other), **begun)).images[0], drawn) == 0
    other.paste((0, 0, 0), (0, 0, 16, 16))
    assert apart(model.generate(asking(Control("canny", other), **begun)).images[0], drawn) > 0


def test_from_a_picture_and_in_the_second_pass(models):
    model = models("sd1")
    begun = asking(square(), image=noise(SIDE, SIDE, seed=6), strength=0.5)
    assert apart(model.generate(begun).images[0], model.generate(replace(begun, controls=None)).images[0]) > 0
    twice = asking(square(), hires=HiRes(2.0, upscaler="latent-bilinear"), fit=None)
    drawn = model.generate(twice).images[0]
    assert drawn.size == (2 * SIDE, 2 * SIDE)
    assert apart(drawn, model.generate(replace(twice, controls=None)).images[0]) > 0


def test_a_refiner_draws_on_without(models, tmp_path):
    base = models("sdxl")
    system = open_system(write("sdxl-refiner", tmp_path / "r"), CPU, torch.float32, systems=SMALL)
    model = Model(base.system, CPU, "sdxl", refiner=Model(system, CPU, "refiner"))
    request = asking(square(), refine_at=0.5, fit="cover")
    drawn = model.generate(request).images[0]
    assert apart(drawn, model.generate(replace(request, controls=None, fit=None)).images[0]) > 0


def test_a_request_is_refused_that_the_model_cannot_draw(models):
    model = models("sd1")
    with pytest.raises(
        InputError, match='no ControlNet "pose": it has canny, depth; one is opened with the model'
    ):
        model.complete(asking(square("pose")))
    with pytest.raises(InputError, match="reuse and `controls` do not go together"):
        model.complete(asking(square(), reuse=2))
    with pytest.raises(InputError, match=r'prepare must be one of canny, softedge.*not "depth"'):
        model.complete(asking(square(prepare="depth")))


def test_the_recipe_has_hashes_and_what_was_asked(models, tmp_path):
    model = models("sd1")
    request = asking(square(weight=0.8), Control("depth", noise(SIDE, SIDE)))
    model.generate(request).save(tmp_path / "out.png")
    recipe = read_recipe(tmp_path / "out.png")
    assert recipe["controlnets"] == model.system.control_hashes() and len(recipe["controlnets"]) == 2
    assert recipe["request"]["controls"] == [control.to_json() for control in request.controls]
    assert read_like(tmp_path / "out.png").controlnets == recipe["controlnets"]
