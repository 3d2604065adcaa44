"""The web UI's bodies and answers, without a server: what is asked, refused, and by which name."""

from __future__ import annotations

import base64
import json

import pytest

from asgi import asked, desk_of
from helpers import noise
from serving import png
from sfumato.serve.refusals import Refused
from sfumato.serve.web.app import build

JSON = {"content_type": "application/json"}
FACTS = {
    "name": "pocket", "preset": {"size": [128, 128], "steps": 4}, "schedules": ["karras"], "eta_samplers": [],
    "weights": {},
}  # fmt: skip
START = base64.b64encode(png(noise(64, 64))).decode()


@pytest.fixture
def desk(tmp_path):
    with desk_of(tmp_path) as found:
        found.floor.devices[0].facts = [FACTS]
        yield found


@pytest.fixture
def post(desk, monkeypatch):
    """Post a body; what came to the desk is in `post.asks`. It refuses with `post.refusal`."""
    app = build(desk)

    async def submit(key, ask):
        sent.asks.append(ask)
        raise sent.refusal

    def sent(path: str, body: dict, **headers: str) -> tuple[int, dict]:
        status, _, answer = asked(
            app, "POST", f"/sdapi/v1/{path}", json.dumps(body).encode(), **JSON, **headers
        )
        return status, json.loads(answer)

    sent.asks, sent.refusal = [], Refused(418, "teapot", "no")
    monkeypatch.setattr(desk, "submit", submit)
    return sent


def test_an_idempotency_key_counts(post):
    post("txt2img", {"prompt": "x"}, idempotency_key="once")
    post("img2img", {"init_images": [START]})
    assert [(ask.idempotency, ask.keep) for ask in post.asks] == [("once", True), (None, False)]
    assert post("txt2img", {"prompt": "x"}, idempotency_key="")[0] == 400
