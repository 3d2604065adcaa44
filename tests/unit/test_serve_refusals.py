"""A server that is full says so at once: from memory, before anything of a submission is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from asgi import asked, desk_of
from sfumato.serve import desk as desk_module
from sfumato.serve import keys
from sfumato.serve.job import Live, now
from sfumato.serve.ledger import Record
from sfumato.serve.web.app import build
from sfumato.serve.web.guard import SUBMISSIONS

JSON = {"content_type": "application/json"}


def waiting(number: int, tenant: str = keys.LOCAL) -> Live:
    """A job in the queue."""
    options = {"expected": {"seconds": 2.0, "pictures": 1}, "sampler_steps": 4, "tune": []}
    name = f"job_{number:032x}"
    return Live(Record(name, tenant, "pocket", {}, options, "", made=now(), deadline=now() + 600, reserved=0))


@pytest.fixture
def desk(tmp_path):
    with desk_of(tmp_path, queue=3) as found:
        yield found


@pytest.fixture
def full(desk):
    for number in range(3):
        desk.floor.queue.append(waiting(number))
    return build(desk)


@pytest.mark.parametrize("path", sorted(SUBMISSIONS))
def test_no_body_is_read_where_there_is_no_room(full, path):
    status, headers, body = asked(full, "POST", path, None, **JSON)
    assert status == 429 and 1 <= int(headers["retry-after"]) <= 120
    assert json.loads(body)["error"]["code"] == "queue_full"


@pytest.mark.parametrize("path, fewer", [("/v1/jobs", "steps"), ("/v1/videos", "frames or steps")])
def test_what_is_too_long_is_said_by_its_estimate(desk, monkeypatch, path, fewer):
    app = build(desk)

    async def expected(ask, files, parts):
        few = {"pictures": 1, "pixel_steps": 4, "calls": 1, "steps": 4, "flops": {}}
        return {"expected": {"seconds": 1e6, **few}, "notes": ["so"]}

    monkeypatch.setattr(desk, "expected", expected)
    monkeypatch.setattr(desk, "price", lambda model, expected: 1)
    estimate = path.replace("jobs", "estimate") + "/estimate" * (path == "/v1/videos")
    _, late = json.loads(asked(app, "POST", estimate, b'{"request": {}}', **JSON)[2])["notes"]
    status, _, body = asked(app, "POST", path, b'{"request": {}}', **JSON)
    error = json.loads(body)["error"]
    assert (status, error["param"], error["message"]) == (400, "deadline", late) and f"fewer {fewer}" in late


def test_strength_of_a_clip_goes_with_a_clip(desk):
    status, _, body = asked(build(desk), "POST", "/v1/videos", b'{"request": {"strength": 0.5}}', **JSON)
    assert (status, json.loads(body)["error"]["message"]) == (400, "strength goes with a clip to begin with")


def test_submissions_are_all_routes_where_jobs_come_in(full):
    """Of the others none is refused for want of room; and those that are named are there."""
    document = json.loads(asked(full, "GET", "/openapi.json")[2])
    posts = {path for path, item in document["paths"].items() if "post" in item}
    assert posts >= SUBMISSIONS
    for path in posts - SUBMISSIONS:
        assert asked(full, "POST", path, b"", **JSON)[0] in (400, 404, 415, 200), path


def test_who_may_have_sent_it_before_is_heard(full):
    for header in ({"idempotency_key": "once"}, {"x_stainless_retry_count": "1"}):
        assert asked(full, "POST", "/v1/jobs", b"{", **JSON, **header)[0] == 400
    assert asked(full, "POST", "/v1/jobs", None, **JSON, x_stainless_retry_count="0")[0] == 429


def test_a_refusal_is_counted_once_and_takes_nothing(desk, full):
    for _ in range(5):
        asked(full, "POST", "/v1/jobs", None, **JSON)
    text = desk.metrics.text().decode()
    assert 'sfumato_jobs_refused_total{code="queue_full"} 5.0' in text
    assert 'sfumato_http_requests_total{method="POST",route="/v1/jobs",status="429"} 5.0' in text
    key = replace(keys.local(), rate=2)
    assert [desk.full(key) is None for _ in range(4)] == [False] * 4
    desk.floor.queue.clear()
    assert [desk.full(key) is None for _ in range(4)] == [True] * 4  # to be told so costs no turn


def test_who_only_asks_is_held_to_a_rate_of_its_own(desk, monkeypatch):
    monkeypatch.setattr(desk_module, "ASKS", 2)
    app, paths = build(desk), ("/v1/estimate", "/v1/preflight", "/v1/videos/estimate")
    assert [asked(app, "POST", path, b"{", **JSON)[0] for path in paths] == [400, 400, 429]
    status, headers, body = asked(app, "POST", "/v1/preflight", None, **JSON)
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert json.loads(body)["error"]["code"] == "rate_limited"
    assert asked(app, "POST", "/v1/jobs", b"{", **JSON)[0] == 400


def test_each_limit_has_its_word(desk):
    key = replace(keys.local(), rate=1, queue=2)
    live = waiting(0)
    desk.floor.live[live.id] = live
    assert desk.full(key) is None
    desk.rates.take(key.id, 1)
    assert (desk.full(key).status, desk.full(key).code) == (429, "rate_limited")
    desk.floor.live["other"] = waiting(1)
    assert desk.full(key).code == "too_many_open"
    desk.draining = True
    assert (desk.full(key).status, desk.full(key).code) == (503, "draining")
