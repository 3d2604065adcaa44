"""The request: what is accepted, and what is said about what is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.checks import MAX_PROMPT
from sfumato.errors import InputError
from sfumato.parts import MAX_BLUR, MAX_SEED, MAX_SIDE, MAX_STEPS, HiRes, Inpaint, Variation
from sfumato.types import MAX_COUNT, Request

PICTURE, MASK = Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 8), 255)

ACCEPTED = [
    {},
    {"prompt": ""},
    {"prompt": "👩‍👩‍👧 🍎"},
    {"prompt": "كرة حمراء"},
    {"prompt": "a\nb\tc\x01"},
    {"prompt": "x" * MAX_PROMPT},
    {"negative": "blur"},
    {"count": 1},
    {"count": MAX_COUNT},
    {"seed": 0},
    {"seed": MAX_SEED},
    {"steps": 1},
    {"steps": MAX_STEPS},
    {"guidance": 0},
    {"guidance": 1},
    {"guidance": 7.5},
    {"size": [128, 96]},
    {"size": [MAX_SIDE, 1]},
    {"eta": 0},
    {"eta": 1.0},
    {"clip_skip": 2},
    {"reuse": 1},
    {"guidance_interval": [0, 0.5]},
    {"hires": {"scale": 2}},
    {"hires": {"scale": 1.5, "steps": 10, "strength": 0.0, "upscaler": "latent-bilinear"}},
    {"variation": {"seed": MAX_SEED, "strength": 0.5}},
    {"micro": {}},
    {"micro": {"original": [4096, 2048], "crop": [0, 64], "aesthetic": 6, "negative_target": [1, 65536]}},
    {"prompt_rules": "compel", "weighting": "comfy"},
    {"text_length": 1},
    {"text_length": 512},
    {"skip_layers": {"layers": [7, 8, 9]}},
    {"skip_layers": {"layers": [0], "scale": 0, "interval": [0, 1]}},
    {"refine_at": 0.8},
    {"variation": None, "hires": None, "image": None, "mask": None},
]
REFUSED = [
    ("prompt", "x" * 100_000),
    ("prompt", "a\0b"),
    ("prompt", "a\ud800b"),
    ("prompt", None),
    ("prompt", 3),
    ("prompt", b"a"),
    ("prompt", ["a"]),
    ("negative", "x" * (MAX_PROMPT + 1)),
    ("negative", "\0"),
    ("count", 0),
    ("count", -1),
    ("count", MAX_COUNT + 1),
    ("count", 1.0),
    ("count", True),
    ("count", "1"),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 1.5),
    ("seed", "x"),
    ("seed", None),
    ("steps", -1),
    ("steps", 0),
    ("steps", 10**9),
    ("steps", 8.0),
    ("guidance", math.nan),
    ("guidance", math.inf),
    ("guidance", -math.inf),
    ("guidance", -0.1),
    ("guidance", 1e9),
    ("guidance", 10**400),
    ("guidance", "7"),
    ("seed", 10**5000),
    ("seed", "x" * 10_000),
    ("size", [1] * 10_000),
    ("guidance", True),
    ("sampler", 1),
    ("schedule", ["karras"]),
    ("size", 128),
    ("size", "128x128"),
    ("size", [128]),
    ("size", [128, 128, 3]),
    ("eta", 1.5),
    ("eta", math.nan),
    ("clip_skip", 0),
    ("clip_skip", 99),
    ("reuse", 0),
    ("reuse", 11),
    ("reuse", 2.0),
    ("text_length", 0),
    ("text_length", 513),
    ("skip_layers", [7, 8, 9]),
    ("guidance_interval", 0.5),
    ("guidance_interval", [0.5]),
    ("guidance_interval", [0.5, 0.2]),
    ("strength", 0.5),  # without an image
    ("fit", "cover"),
    ("mask", MASK),
    ("outpaint", [8, 8, 8, 8]),
    ("inpaint", {"blur": 4}),
    ("hires", 2),
    ("variation", [7, 0.2]),
    ("image", 3),
    ("image", b"bytes"),
    ("image", "picture.png"),  # a path is no picture: JSON may not open files
    ("image", "https://example.org/a.png"),
    ("image", "sha256:" + "0" * 64),
    ("image", "x" * 10_000),
]
WITH_PICTURE = [
    ("strength", -0.1),
    ("strength", 1.1),
    ("strength", math.nan),
    ("strength", "0.5"),
    ("fit", "crop"),
    ("fit", 1),
    ("mask", "sha256:x"),
    ("outpaint", [8, 8, 8]),
    ("outpaint", 8),
    ("outpaint", [0, 0, 0, 0]),
    ("outpaint", [-8, 0, 0, 0]),
    ("outpaint", [8.0, 0, 0, 0]),
    ("outpaint", [MAX_SIDE + 1, 0, 0, 0]),
]
INNER = [
    ("inpaint.blur", {"inpaint": {"blur": -1}}),
    ("inpaint.blur", {"inpaint": {"blur": MAX_BLUR + 1}}),
    ("inpaint.blur", {"inpaint": {"blur": 1.5}}),
    ("inpaint.paste", {"inpaint": {"paste": 1}}),
    ("inpaint.padding", {"inpaint": {"padding": -1}}),
    ("inpaint.padding", {"inpaint": {"padding": 8}, "outpaint": [8, 0, 0, 0]}),
    ("inpaint.colour", {"inpaint": {"colour": "red"}}),
    ("hires", {"hires": {"scale": 2}}),  # beside a mask
    ("hires.scale", {"hires": {"scale": 0.5}, "mask": None}),
    ("hires.scale", {"hires": {"scale": math.inf}, "mask": None}),
    ("hires.scale", {"hires": {"scale": 17}, "mask": None}),
    ("hires.scale", {"hires": {"strength": 0.5}, "mask": None}),
    ("hires.steps", {"hires": {"scale": 2, "steps": 0}, "mask": None}),
    ("hires.strength", {"hires": {"scale": 2, "strength": 2}, "mask": None}),
    ("hires.upscaler", {"hires": {"scale": 2, "upscaler": 4}, "mask": None}),
    ("skip_layers.layers", {"skip_layers": {}}),
    ("skip_layers.layers", {"skip_layers": {"layers": []}}),
    ("skip_layers.layers", {"skip_layers": {"layers": 7}}),
    ("skip_layers.layers", {"skip_layers": {"layers": [7, 7]}}),
    ("skip_layers.layers", {"skip_layers": {"layers": [-1]}}),
    ("skip_layers.layers", {"skip_layers": {"layers": [1.5]}}),
    ("skip_layers.scale", {"skip_layers": {"layers": [7], "scale": math.nan}}),
    ("skip_layers.interval", {"skip_layers": {"layers": [7], "interval": [0.1, 1.5]}}),
    ("skip_layers.interval", {"skip_layers": {"layers": [7], "interval": [0.5, 0.1]}}),
    ("guidance_interval.high", {"guidance_interval": [0, math.inf]}),
    ("guidance_interval.low", {"guidance_interval": [math.nan, 1]}),
    ("variation.seed", {"variation": {"seed": -1, "strength": 0.1}}),
    ("variation.seed", {"variation": {"strength": 0.1}}),
    ("variation.strength", {"variation": {"seed": 1, "strength": 1.01}}),
    ("variation.strength", {"variation": {"seed": 1}}),
]


@pytest.mark.parametrize("values", ACCEPTED, ids=lambda v: repr(v)[:40])
def test_accepted(values):
    request = Request.from_dict(values)
    assert Request.from_dict(request.to_dict()) == request


@pytest.mark.parametrize(
    ("name", "value"), REFUSED, ids=lambda v: v[:40] if isinstance(v, str) else type(v).__name__
)
def test_refused_by_the_argument_s_name_in_one_short_line(name, value):
    with pytest.raises(InputError, match=name) as caught:
        Request.from_dict({name: value})
    assert caught.value.argument == name
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [[0, 128], [128, -1], [MAX_SIDE + 1, 128], [128.0, 128], ["128", 128]])
def test_sides_are_named(size):
    with pytest.raises(InputError, match=r"width|height"):
        Request.from_dict({"size": size})


@pytest.mark.parametrize("values", [["prompt"], "prompt", None, 7])
def test_only_an_object_is_a_request(values):
    with pytest.raises(InputError, match="object of named fields"):
        Request.from_dict(values)


def test_an_unknown_field_lists_the_known_ones():
    with pytest.raises(InputError, match=r'"stepz".*steps.*guidance'):
        Request.from_dict({"stepz": 3})


@given(seed=st.integers(0, MAX_SEED), count=st.integers(1, MAX_COUNT))
def test_picture_k_has_the_seed_of_its_own_request(seed, count):
    seeds = Request(seed=seed, count=count).seeds()
    assert len(set(seeds)) == count
    for k, own in enumerate(seeds):
        assert Request(seed=own).validate().seeds() == [own]
        assert (own - seed) % 2**64 == k


def test_defaults_fill_only_what_is_missing():
    request = Request(steps=3, guidance=0.0).with_defaults(steps=8, guidance=4.0, sampler="euler")
    assert (request.steps, request.guidance, request.sampler) == (3, 0.0, "euler")


@pytest.mark.parametrize(("name", "value"), WITH_PICTURE, ids=lambda v: str(v)[:30])
def test_refused_also_beside_a_picture(name, value):
    with pytest.raises(InputError, match=name) as caught:
        Request.from_dict({"image": PICTURE, name: value})
    assert caught.value.argument == name and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "values"), INNER, ids=lambda v: str(v)[:60])
def test_inner_fields_are_refused_by_their_whole_name(name, values):
    with pytest.raises(InputError, match=name.split(".")[-1]) as caught:
        Request.from_dict({"image": PICTURE, "mask": MASK, **values})
    assert caught.value.argument == name and "\n" not in str(caught.value)


def test_inner_fields_are_of_their_own_type_in_python():
    for field, value in (("inpaint", {"blur": 4}), ("hires", 2), ("variation", (7, 0.2))):
        with pytest.raises(InputError, match=f"{field} must be of type") as caught:
            Request(
                image=PICTURE, outpaint=(8, 8, 8, 8) if field == "inpaint" else None, **{field: value}
            ).validate()
        assert caught.value.argument == field


def test_what_is_not_asked_for_is_not_said():
    assert Request("a", seed=3).to_dict() == {"prompt": "a", "count": 1, "seed": 3}


def test_json_names_pictures_by_what_they_show():
    request = Request(image=PICTURE.convert("RGBA"), mask=MASK, inpaint=Inpaint(blur=2), strength=0.5)
    values = request.to_dict()
    assert values["image"].startswith("sha256:") and values["image"] != values["mask"]
    assert values["inpaint"] == {"blur": 2, "paste": True}
    again = Request.from_dict(values, [MASK.convert("RGB"), PICTURE.convert("P")])
    assert again.to_dict() == values
    for pictures in ([], [MASK], [Image.new("RGB", (8, 8), (254, 0, 0)), MASK]):
        with pytest.raises(InputError, match=r"image names the picture .sha256:.*give the picture itself"):
            Request.from_dict(values, pictures)


@given(
    seed=st.integers(0, MAX_SEED),
    other=st.integers(0, MAX_SEED),
    start=st.integers(0, 40),
    count=st.integers(1, 20),
)
def test_a_part_is_the_request_for_those_pictures(seed, other, start, count):
    whole = Request(seed=seed, count=MAX_COUNT)
    part = whole.part(start, count)
    assert part.seeds() == whole.seeds()[start : start + count]
    varied = Request(seed=seed, count=MAX_COUNT, variation=Variation(other, 0.3)).part(start, count)
    assert varied.seeds() == [seed] * count
    assert varied.variation == Variation((other + start) % 2**64, 0.3)


def test_nested_values_come_back_from_json():
    request = Request(hires=HiRes(1.5, steps=3), variation=Variation(7, 0.25))
    assert request.to_dict()["hires"] == {"scale": 1.5, "steps": 3, "strength": 0.5, "upscaler": "lanczos"}
    assert Request.from_dict(request.to_dict()) == request
