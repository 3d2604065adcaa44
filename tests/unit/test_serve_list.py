"""The list of jobs, walked to its end: each is met once, however close together they were made."""

from __future__ import annotations

import json

import pytest

from asgi import asked, desk_of
from sfumato.serve import keys
from sfumato.serve.ledger import Record
from sfumato.serve.web.app import build

NOW = 1_764_482_418.123
# within one millisecond, and three at the same moment
MADE = [NOW + k / 4_000_000 for k in range(0, 12, 2)] + [NOW + 1.5] * 3


@pytest.fixture
def app(tmp_path):
    with desk_of(tmp_path) as desk:
        for number, made in enumerate(MADE):
            options = {"expected": {}, "format": "png"}
            name = f"job_{number:032x}"
            desk.ledger.accept(
                Record(name, keys.LOCAL, "pocket", {}, options, "", made, made + 600, reserved=0)
            )
        yield build(desk)


def page(app, limit: int, before: object = None) -> dict:
    cursor = "" if before is None else f"&before={before}"
    status, _, body = asked(app, "GET", f"/v1/jobs?limit={limit}{cursor}")
    assert status == 200, body
    return json.loads(body)


def walked(app, limit: int, cursor: str) -> list[str]:
    """Ids in the order in which they are met."""
    found, before = [], None
    for _ in range(2 * len(MADE)):
        answer = page(app, limit, before)
        found += [job["id"] for job in answer["data"]]
        if not answer["has_more"]:
            return found
        before = answer["data"][-1][cursor]
    raise AssertionError("it does not end")


@pytest.mark.parametrize("limit", [1, 2, 4, 9, 100])
def test_each_job_is_met_once_by_the_id_of_the_last(app, limit):
    assert walked(app, limit, "id") == [f"job_{number:032x}" for number in reversed(range(len(MADE)))]


def test_by_time_each_moment_is_met_once(app):
    answer, seen = page(app, 3), []
    while answer["has_more"]:
        last = answer["data"][-1]["created"]
        answer = page(app, 1, last)
        seen += [job["created"] for job in answer["data"]]
    assert seen == sorted(MADE[:6], reverse=True)


def test_who_has_seen_all_is_told_so(app):
    assert page(app, len(MADE))["has_more"] is False and page(app, len(MADE) - 1)["has_more"] is True


@pytest.mark.parametrize("before", ["x", "-1", "nan", "job_" + "g" * 32])
def test_a_place_that_is_none_is_refused(app, before):
    status, _, body = asked(app, "GET", f"/v1/jobs?before={before}")
    assert status == 400 and json.loads(body)["error"]["param"] == "before"


def test_a_job_that_is_not_there_is_no_place(app):
    assert asked(app, "GET", f"/v1/jobs?before=job_{'f' * 32}")[0] == 404
