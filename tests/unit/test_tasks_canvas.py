"""The picture a request begins with: what size it must have, what is drawn on, and what comes back untouched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import array, noise, white
from sfumato.errors import InputError
from sfumato.tasks.canvas import (
    around,
    canvas,
    extended,
    feather,
    fitted,
    in_image,
    nearest_size,
    painted,
    settle,
)
from sfumato.types import Inpaint, Request


def settled(**fields) -> Request:
    return settle(Request(**fields).validate(), 8, (64, 64))


# --- sizes -------------------------------------------------------------------------------------------------------


def test_without_a_picture_nothing_is_settled():
    request = Request("a", steps=3)
    assert settled(prompt="a", steps=3) == request and canvas(request) is None


def test_the_picture_decides_the_size():
    request = settled(image=noise(48, 32))
    assert (request.size, request.strength, request.inpaint) == ((48, 32), 0.75, None)
    assert canvas(request).picture.tobytes() == noise(48, 32).tobytes()


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"image": noise(50, 32)},
            "image is 50x32, not a multiple of 8 pixels; the nearest legal size is 48x32",
        ),
        ({"image": noise(48, 32), "size": (64, 64)}, "image is 48x32, but `size` asks for 64x64"),
        (
            {"image": noise(48, 32), "outpaint": (0, 0, 10, 0)},
            "with outpaint 58x32.*nearest legal size is 56x32",
        ),
        ({"image": noise(48, 32), "mask": white(32, 48, 0, 0, 9, 9)}, "mask is 32x48 and image 48x32"),
        ({"image": noise(48, 32), "mask": Image.new("L", (48, 32))}, "mask is black everywhere"),
        ({"image": noise(48, 32), "mask": Image.new("L", (48, 32), 127)}, "mask is black everywhere"),
        (
            {"image": noise(8, 8), "outpaint": (32, 0, 32, 0), "size": (64, 8), "fit": "cover"},
            "size 64x8 leaves no room",
        ),
    ],
)
def test_sizes_that_do_not_agree_are_refused_by_name(fields, said):
    with pytest.raises(InputError, match=said) as caught:
        settled(**fields)
    assert caught.value.argument in ("image", "size", "mask")


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_fit_brings_it_there(fit):
    assert settled(image=noise(50, 30), fit=fit).size == (48, 32)
    request = settled(image=noise(50, 30), mask=white(50, 30, 10, 10, 30, 20), fit=fit, size=(64, 24))
    made = canvas(request)
    assert made.picture.size == made.mask.size == (64, 24)
    assert made.finish(noise(64, 24)).size == (64, 24)


def test_settling_twice_changes_nothing():
    for fields in (
        {"image": noise(50, 30).convert("RGBA"), "fit": "cover"},
        {"image": noise(48, 32), "mask": white(48, 32, 1, 1, 5, 5).convert("RGB"), "outpaint": (8, 0, 0, 8)},
        {"image": noise(51, 33), "mask": white(51, 33, 1, 1, 5, 5), "inpaint": Inpaint(padding=3)},
    ):
        once = settled(**fields)
        twice = settle(once, 8, (64, 64))
        assert twice == once and twice.to_dict() == once.to_dict()


def test_defaults_of_the_tasks():
    assert settled(image=noise(16, 16), strength=0.2).strength == 0.2
    painting = settled(image=noise(16, 16), mask=white(16, 16, 0, 0, 3, 3))
    assert (painting.strength, painting.inpaint) == (1.0, Inpaint())
    assert settled(image=noise(16, 16), outpaint=(8, 0, 0, 0)).strength == 1.0
    surroundings = settled(image=noise(17, 19), mask=white(17, 19, 0, 0, 3, 3), inpaint=Inpaint(padding=4))
    assert surroundings.size == (64, 64)  # the model's own: any picture may be worked on so


@settings(deadline=None)
@given(width=st.integers(1, 4096), height=st.integers(1, 4096), multiple=st.sampled_from([1, 8, 16, 64]))
def test_the_nearest_size_is_legal_and_nearest(width, height, multiple):
    for side, legal in zip((width, height), nearest_size((width, height), multiple), strict=True):
        assert legal % multiple == 0 and legal >= multiple
        assert abs(side - legal) <= multiple / 2 or legal == multiple


# --- fitting -----------------------------------------------------------------------------------------------------


def test_cover_crops_the_middle_and_contain_keeps_all():
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    covered = fitted(picture, (50, 50), "cover")
    assert covered.getpixel((12, 2)) == covered.getpixel((37, 47)) == (0, 0, 255)
    contained = fitted(picture, (90, 90), "contain")
    assert contained.size == (90, 90)
    assert contained.getpixel((0, 45)) == contained.getpixel((89, 45)) == (255, 0, 0)
    assert contained.getpixel((45, 0)) == contained.getpixel((45, 89)) == (0, 0, 255)  # the edge goes on
    stretched = fitted(picture, (30, 100), "stretch")
    assert [stretched.getpixel((x, 50)) for x in (2, 15, 27)] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000)])
@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
def test_extreme_shapes_fit(size, fit):
    picture = Image.new("RGB", size, (1, 2, 3))
    made = fitted(picture, (64, 32), fit)
    assert made.size == (64, 32)
    assert np.abs(array(made) - [1, 2, 3]).max() == 0


def test_a_mask_of_which_fit_leaves_nothing():
    request = settled(image=noise(400, 40), mask=white(400, 40, 0, 0, 8, 8), size=(40, 40), fit="cover")
    with pytest.raises(InputError, match="mask has no white left when fit to 40x40"):
        canvas(request)


# --- what comes back untouched -----------------------------------------------------------------------------------


def masks(width: int, height: int):
    """Any mask with some white, in any grey."""
    return st.lists(st.integers(0, 255), min_size=width * height, max_size=width * height).map(
        lambda values: Image.fromarray(np.array([255, *values[1:]], np.uint8).reshape(height, width))
    )


@settings(max_examples=60, deadline=None)
@given(mask=masks(16, 8), blur=st.integers(0, 20), turn=st.booleans())
def test_outside_any_mask_every_byte_is_the_input_s(mask, blur, turn):
    image = noise(16, 8)
    drawn = noise(16, 8, seed=1)
    made = canvas(settled(image=image, mask=mask, inpaint=Inpaint(blur=blur)))
    finished = array(made.finish(drawn))
    outside = np.asarray(mask) < 128
    assert (finished[outside] == array(image)[outside]).all()
    between = np.minimum(array(image), array(drawn)), np.maximum(array(image), array(drawn))
    assert (between[0] <= finished).all() and (finished <= between[1]).all()
    if blur == 0:
        assert (finished[~outside] == array(drawn)[~outside]).all()


@settings(max_examples=60, deadline=None)
@given(
    left=st.integers(0, 30), top=st.integers(0, 20), width=st.integers(1, 11), height=st.integers(1, 11),
    padding=st.integers(0, 40), size=st.sampled_from([(64, 64), (64, 16), (8, 32)]), blur=st.integers(0, 5),
)  # fmt: skip
def test_outside_the_mask_also_where_only_its_surroundings_are_drawn(
    left, top, width, height, padding, size, blur
):
    image = noise(41, 31)
    mask = white(41, 31, left, top, left + width, top + height)
    made = canvas(settled(image=image, mask=mask, size=size, inpaint=Inpaint(blur=blur, padding=padding)))
    assert made.picture.size == made.mask.size == size and made.mask.getbbox() is not None
    finished = made.finish(noise(*size, seed=1))
    assert finished.size == image.size
    outside = np.asarray(mask) == 0
    assert (array(finished)[outside] == array(image)[outside]).all()
    assert (array(finished)[~outside] != array(image)[~outside]).any()


def test_without_paste_the_drawn_picture_stands():
    image, drawn = noise(16, 16), noise(16, 16, seed=1)
    made = canvas(settled(image=image, mask=white(16, 16, 0, 0, 4, 4), inpaint=Inpaint(paste=False)))
    assert made.finish(drawn).tobytes() == drawn.tobytes()
    made = canvas(
        settled(
            image=image, mask=white(16, 16, 4, 4, 8, 8), inpaint=Inpaint(paste=False, padding=2), size=(8, 8)
        )
    )
    finished = made.finish(noise(8, 8, seed=1))
    assert made.box == (2, 2, 10, 10)
    assert finished.crop(made.box).tobytes() == noise(8, 8, seed=1).tobytes()
    assert finished.crop((10, 0, 16, 16)).tobytes() == image.crop((10, 0, 16, 16)).tobytes()


def test_the_feather_rises_inwards_and_ends_at_one():
    share = feather(
        white(20, 9, 4, 0, 20, 9), 3
    )  # a mask that reaches the picture's border, which is no edge
    assert share[4].tolist() == [0.0] * 4 + [0.25, 0.5, 0.75] + [1.0] * 13
    assert (share == share[4]).all()
    assert set(feather(white(20, 9, 4, 0, 20, 9), 0).flat) == {0.0, 1.0}
    thin = feather(white(20, 9, 4, 0, 6, 9), 8)
    assert thin[4].tolist() == [0.0] * 4 + [1.0] * 2 + [0.0] * 14  # a line as thin as this is painted in full
    wedge = feather(white(21, 21, 0, 0, 9, 21), 100)
    assert wedge.max() == 1.0 and (np.diff(wedge[10, :9]) <= 0).all()


def test_outpainting_keeps_the_picture_and_asks_for_the_rest():
    image = noise(16, 8)
    request = settled(image=image, outpaint=(8, 0, 16, 8))
    made = canvas(request)
    assert request.size == made.picture.size == (40, 16)
    assert made.picture.crop((8, 0, 24, 8)).tobytes() == image.tobytes()
    finished = made.finish(noise(40, 16, seed=1))
    assert finished.crop((8, 0, 24, 8)).tobytes() == image.tobytes()
    assert np.asarray(made.mask)[0].tolist() == [255] * 8 + [0] * 16 + [255] * 16
    assert (np.asarray(made.picture)[0, :8] == np.asarray(image)[0, 0]).all()  # begins as its edge


def test_outpainting_and_a_mask_and_a_fit_together():
    request = settled(
        image=noise(20, 20),
        mask=white(20, 20, 0, 0, 10, 20),
        outpaint=(0, 0, 8, 0),
        size=(24, 16),
        fit="stretch",
    )
    made = canvas(request)
    assert np.asarray(made.mask)[7].tolist() == [255] * 8 + [0] * 8 + [255] * 8


# --- surroundings ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    picture=st.tuples(st.integers(1, 90), st.integers(1, 90)), data=st.data(), padding=st.integers(0, 50),
    size=st.sampled_from([(64, 64), (128, 32), (8, 64)]),
)  # fmt: skip
def test_the_surroundings_hold_the_mask_and_lie_in_the_picture(picture, data, padding, size):
    width, height = picture
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    box = around(white(width, height, left, top, right, bottom), padding, size)
    assert 0 <= box[0] <= max(0, left - padding) and min(width, right + padding) <= box[2] <= width
    assert 0 <= box[1] <= max(0, top - padding) and min(height, bottom + padding) <= box[3] <= height
    wide, high = box[2] - box[0], box[3] - box[1]
    if wide < width and high < height:  # nowhere held back by the border: the shape of what is drawn
        assert abs(wide * size[1] - high * size[0]) <= max(size)


def test_no_thin_line_vanishes_when_the_mask_is_made_smaller():
    mask = Image.new("L", (1000, 700), 0)
    mask.putpixel((123, 456), 255)
    small = np.asarray(painted(mask, (10, 7)))
    assert np.argwhere(small).tolist() == [[4, 1]] and set(small.flat) == {0, 255}
    assert painted(white(4, 4, 1, 1, 2, 2), (8, 8)).getbbox() == (2, 2, 4, 4)
    assert painted(mask, mask.size).tobytes() == mask.tobytes()


@settings(deadline=None)
@given(sides=st.tuples(*[st.integers(0, 5)] * 4))
def test_extending_repeats_the_edge(sides):
    picture = noise(3, 2)
    left, top, right, bottom = sides
    made = array(extended(picture, sides))
    assert made.shape == (2 + top + bottom, 3 + left + right, 3)
    rows = np.clip(np.arange(made.shape[0]) - top, 0, 1)
    columns = np.clip(np.arange(made.shape[1]) - left, 0, 2)
    assert (made == array(picture)[rows][:, columns]).all()


# --- back to the picture that was sent ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (64, 64), "fit": "cover"},
        {"size": (48, 96), "fit": "cover"},
        {"size": (96, 32), "fit": "contain"},
        {"size": (64, 32), "fit": "stretch"},
        {"outpaint": (16, 8, 0, 8)},
        {"size": (96, 96), "fit": "contain", "outpaint": (32, 0, 16, 8)},
        {"mask": white(128, 96, 30, 20, 100, 70), "inpaint": Inpaint(padding=8), "size": (64, 64)},
    ],
)
def test_a_place_on_the_canvas_is_found_in_the_picture(fields):
    dot, at = Image.new("RGB", (128, 96)), (56, 40, 72, 56)
    dot.paste("white", at)
    request = settled(image=dot, **fields)
    on = canvas(request)
    seen = on.picture.convert("L").point(lambda value: 255 if value > 127 else 0).getbbox()
    assert np.abs(np.subtract(in_image(request, on, seen), at)).max() <= 2
    everything = in_image(request, on, (-9, -9, 999, 999))
    assert min(everything) >= 0 and everything[2] <= 128 and everything[3] <= 96
