"""The request: what is accepted, and what is said about what is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.types import MAX_COUNT, MAX_PROMPT, MAX_SEED, MAX_SIDE, MAX_STEPS, Request

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
    with pytest.raises(InputError, match=r"'stepz'.*steps.*guidance"):
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
