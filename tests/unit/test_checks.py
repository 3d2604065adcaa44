"""Checks of single values."""

from __future__ import annotations

import pytest

from sfumato import checks
from sfumato.errors import InputError


@pytest.mark.parametrize("value", [True, 1.0, "2", None, 0, -1, pytest.param(-(10**5000), id="huge")])
def test_what_is_no_whole_number_or_too_small(value):
    with pytest.raises(InputError, match=r"^heads must be a whole number of at least 1, not ") as caught:
        checks.whole("heads", value, 1)
    assert caught.value.argument == "heads" and len(str(caught.value)) < 200


def test_whole_numbers_from_the_least_on():
    for value in (0, 1, 10**30):
        checks.whole("depth", value, 0)
