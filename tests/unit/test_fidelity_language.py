"""What prompts quote and count."""

from __future__ import annotations

import time

import pytest

from sfumato.fidelity.language import MOST, counted, quoted, unquoted


@pytest.mark.parametrize(
    "prompt, words",
    [
        ('a sign "Open  now" and ‘x’ “Café” isn\'t', ["Open now", "x", "Café"]),
        ("a cat's toy and a dog's", []),
        ("'hello, it's me' she writes", ["hello, it's me"]),
        ("‘don’t stop’", ["don’t stop"]),
        ("ein Schild „Guten Tag“ und ‚so‘", ["Guten Tag", "so"]),
        ("une affiche « Ouvert » et ‹ici›, »dort«", ["Ouvert", "ici", "dort"]),
        ("「こんにちは」と『本』", ["こんにちは", "本"]),
        ('a 12" vinyl and a 7" record', []),
        ("rock 'n' roll of the '90s in the boys' room", []),
        ('one "that is never closed', []),
        ('"" and "x"', ["x"]),
    ],
)
def test_quotations_of_any_marks(prompt, words):
    assert quoted(prompt) == words
    assert all(word not in unquoted(prompt) for word in words if len(word) > 1)


@pytest.mark.parametrize("letters", [395, 405, 5000, 90_000])
def test_quotations_of_any_length(letters):
    assert quoted(f'a page "{"a" * letters}"') == ["a" * letters]


@pytest.mark.parametrize(
    "text, number",
    [
        ("5000 people", 5000),
        ("1,000 birds", 1000),
        ("12 500 soldiers and 10.000 candles", 22_500),
        ("1.5 million stars", 1_500_000),
        ("thirty ships", 30),
        ("fifteen balloons", 15),
        ("a million stars", 10**6),
        ("two hundred people", 200),
        ("two hundred and thirty-five thousand four hundred cars", 235_400),
        ("twenty-five red balloons", 25),
        ("a thousand and one nights", 1001),
        ("half a million bees", 500_000),
        ("a few hundred sheep", 300),
        ("two dozen roses and half a dozen eggs", 30),
        ("seven red cubes and 12 spheres", 19),
        ("two women and three men", 5),
        ("a crowd of spheres", 60),
        ("many small birds", 15),
        ("a cube, a cone, a ring and a ball", 4),
        ("a 5 foot tall girl with two cats", 2),
        ("9" * 5000 + " birds", MOST),
    ],
)
def test_things_are_counted(text, number):
    assert counted(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "a red cube",
        "a 60 year old man",
        "a 60-year-old woman",
        "children, 3 years old",
        "35 mm lens",
        "35mm film photos",
        "f/1.8, 85mm f1.4",
        "1980s diner",
        "in the 1980s people danced",
        "in 1969 people landed",
        "4k, 8k wallpapers",
        "1920x1080 pixels",
        "16:9 photos",
        "iso 400 grains",
        "no people",
        "no crowd",
        "without many people",
        "many shades of blue",
        "fifty shades of grey",
        "3/4 views",
        "50% greys",
        "24 fps",
        "a 300 dpi scan",
        "at 8 pm",
        "the number 7 bus",
        "a $100 bill",
        "a 2 story house",
    ],
)
def test_what_is_no_thing_is_not_counted(text):
    assert counted(text) == 0


@pytest.mark.parametrize("piece", ['"', "“", " '", "‘a ", "1 ", "1,000", "two hundred ", "and a "])
def test_long_prompts_take_no_time(piece):
    text = (piece * 100_000)[:100_000]
    begun = time.process_time()
    quoted(text), counted(unquoted(text))
    assert time.process_time() - begun < 5
