"""OpenAI's Python client, and what it counts on."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from helpers import noise
from serving import PROMPT, opened, png, same
from sfumato import Request

pytestmark = pytest.mark.full  # a server of its own


@pytest.fixture(scope="module")
def client(server, ring):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key=ring[1]["a"], max_retries=0)


def test_openai_draws(client, pocket):
    answer = client.images.generate(
        model="pocket", prompt=PROMPT, n=2, size="64x64", extra_body={"seed": 5, "steps": 3}
    )
    local = pocket.generate(Request(PROMPT, seed=5, steps=3, count=2, size=(64, 64)))
    for shown, picture in zip(answer.data, local.images, strict=True):
        assert same(opened(base64.b64decode(shown.b64_json)), picture)
    assert answer.usage.receipt["charged_micros"] > 0 and answer.usage.total_tokens == 0
    assert [model.id for model in client.models.list()] == ["pocket"]


def test_openai_watches_a_picture_form(client):
    events = list(
        client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"steps": 6})
    )
    assert [e.type for e in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert opened(base64.b64decode(events[0].b64_json)).size == (128, 128)
    assert events[-1].usage.receipt["pictures"] == 1


def test_openai_edits_inside_what_is_transparent(client):
    start = noise(128, 128)
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (40, 40, 80, 80))
    answer = client.images.edit(
        image=("a.png", png(start)), mask=("m.png", png(mask)), prompt=PROMPT, extra_body={"steps": 3}
    )
    drawn = np.asarray(opened(base64.b64decode(answer.data[0].b64_json)))
    kept = np.ones((128, 128), bool)
    kept[40:80, 40:80] = False
    assert (drawn[kept] == np.asarray(start)[kept]).all() and (drawn != np.asarray(start)).any()


def test_an_edit_s_fields_are_each_one_and_mean_what_they_say(a):
    start = ("a.png", png(noise(64, 64)))

    def sent(*fields):
        files = [("image", start), *((name, (None, value)) for name, value in (("prompt", PROMPT), *fields))]
        return a("POST", "/v1/images/edits", files=files)

    for fields, param in (
        ([("stream", "yes")], "stream"),
        ([("stream", "")], "stream"),
        ([("n", "1"), ("n", "2")], "n"),
        ([("prompt", "another")], "prompt"),
        ([("steps", "2"), ("steps", "2")], "steps"),
    ):
        answer = sent(*fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    answer = sent(("stream", "True"), ("steps", "2"))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "image_edit.completed" in answer.text
    assert sent(("stream", "false"), ("steps", "2")).json()["data"]


def test_openai_s_errors_are_its_own(client, server):
    import openai

    for wrong, code in (
        ({"size": "100x100"}, "bad_input"),
        ({"n": 11}, "bad_input"),
        ({"model": "x"}, "model_not_found"),
    ):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
            client.images.generate(**({"prompt": PROMPT} | wrong))
        assert refused.value.code == code
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="no", max_retries=0).models.list()


def test_a_client_that_tries_again_gets_the_job_it_has(a, server):
    body = {"prompt": "a client that tries again", "steps": 60}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(a.post, "/v1/images/generations", body)
        time.sleep(0.3)
        again = pool.submit(a.post, "/v1/images/generations", body, headers={"x-stainless-retry-count": "1"})
    answers = first.result().json(), again.result().json()
    assert answers[0]["data"] == answers[1]["data"]
    assert sum("tries again" in job["request"] for job in server.jobs()) == 1
    # who asks anew gets another seed; and so does he who was only told to come back, after his last picture
    for headers in ({}, {"x-stainless-retry-count": "2"}):
        fresh = a.post("/v1/images/generations", body, headers=headers).json()
        assert fresh["data"] != answers[0]["data"]


@pytest.fixture(scope="module")
def hurried(server, ring):
    """A client of OpenAI's that waits for 2 seconds at a time, and what it has sent."""
    openai = pytest.importorskip("openai")
    sent = []
    line = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    base = {"base_url": server.url + "/v1", "api_key": ring[1]["a"], "http_client": line}
    return lambda **more: openai.OpenAI(**base, timeout=2, **more), sent


def test_openai_s_own_retries_are_one_job(hurried, a, server):
    client, sent = hurried
    per_step = a.post("/v1/estimate", {"request": {"prompt": "x", "steps": 100}}).json()["seconds"] / 100
    steps = min(1000, round(5 / per_step))
    answer = client(max_retries=60).images.generate(prompt="it is hurried", extra_body={"steps": steps})
    assert [r.headers["x-stainless-retry-count"] for r in sent] == [str(k) for k in range(len(sent))]
    assert len(sent) > 1, "it did not have to try again"
    [job] = [job for job in server.jobs() if "it is hurried" in job["request"]]
    assert job["state"] == "succeeded" and job["tries"] == 1
    drawn = a.get(f"/v1/jobs/{job['id']}/pictures/0").content
    assert base64.b64decode(answer.data[0].b64_json) == drawn


def test_openai_s_client_that_does_not_come_back_frees_the_device_after_its_grace(hurried, a):
    import openai

    client, _ = hurried
    with pytest.raises(openai.APITimeoutError):
        client(max_retries=0).images.generate(prompt="it goes", n=2, extra_body={"steps": 1000})
    left = time.time()
    [job] = [job for job in a.get("/v1/jobs").json()["data"] if job["request"]["prompt"] == "it goes"]
    assert job["state"] in ("queued", "running")
    ended = a.wait(job["id"])
    assert ended["state"] == "cancelled" and ended["price"]["charged_micros"] == 0
    assert 8 < ended["ended"] - left < 30
