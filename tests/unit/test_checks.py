"""Checks of single values."""

from __future__ import annotations

import pytest

from sfumato import checks
from sfumato.errors import InputError
from sfumato.wording import worded


@pytest.mark.parametrize("value", [True, 1.0, "2", None, 0, -1, pytest.param(-(10**5000), id="huge")])
def test_what_is_no_whole_number_or_too_small(value):
    with pytest.raises(InputError, match=r"^heads must be a whole number of at least 1, not ") as caught:
        checks.whole("heads", value, 1)
    assert caught.value.argument == "heads" and len(str(caught.value)) < 200


def test_whole_numbers_from_the_least_on():
    for value in (0, 1, 10**30):
        checks.whole("depth", value, 0)


def test_values_are_told_as_json_has_them():
    for value, told in (
        (None, "null"),
        (True, "true"),
        ("a", '"a"'),
        ((1, None), "[1, null]"),
        ("\u202e", '"\\u202e"'),
    ):
        assert checks.shown(value) == told
    assert checks.shown({1, 2}) == "{1, 2}"


def test_a_message_calls_fields_as_its_door_does():
    told = {"size": "--size", "fit": "--fit"}.get
    assert worded("size is 5; give `fit`, or `seed`", "size", told) == "--size is 5; give --fit, or `seed`"
    assert worded("size's width is 5", "size", told) == "--size's width is 5"
    assert worded("sizes are many", "size", told) == "sizes are many"
