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


def test_what_cannot_be_told_is_no_error_of_its_own():
    circular: list[object] = [1]
    circular.append(circular)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert checks.shown(circular) == "[1, [...]]"
    assert checks.shown(deep) == "[" * 77 + "..."
    assert checks.shown({(): deep}) == "a dict that cannot be shown"
    assert checks.shown(10**5000) == "a number of very many digits"
    for value in ({10**5000}, [10**5000]):
        assert checks.shown(value) == f"a {type(value).__name__} that cannot be shown"


class Counted(dict):
    """Names that are counted as they are read."""

    read = 0

    def items(self):
        for pair in super().items():
            self.read += 1
            yield pair


def test_of_a_large_value_only_the_beginning_is_read(monkeypatch):
    escaped, dumps = [], checks.json.dumps
    monkeypatch.setattr(
        checks.json, "dumps", lambda value, **more: escaped.append(value) or dumps(value, **more)
    )
    for large in ("\x01" * 10**6, ["\x01" * 10**6]):
        told = checks.shown(large)
        assert len(told) == 80 and told.endswith("...")
    assert len(escaped) < 1000
    many = Counted((str(k), k) for k in range(10**5))
    assert len(checks.shown(many)) == 80 and many.read < 100


def test_a_message_calls_fields_as_its_door_does():
    told = {"size": "--size", "fit": "--fit"}.get
    assert worded("size is 5; give `fit`, or `seed`", "size", told) == "--size is 5; give --fit, or `seed`"
    assert worded("size's width is 5", "size", told) == "--size's width is 5"
    assert worded("sizes are many", "size", told) == "sizes are many"
