"""The web UI's bodies and answers, without a server: what is asked, refused, and by which name."""

from __future__ import annotations

import base64
import json

import pytest

from asgi import asked, desk_of
from helpers import noise
from serving import png
from sfumato.errors import InputError
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


def param(answer: tuple[int, dict]) -> str:
    assert answer[0] == 400, answer
    return answer[1]["error"]["param"]


@pytest.mark.parametrize(
    "path, body, name",
    [
        ("txt2img", {"enable_hr": True, "hr_sampler_name": "Euler"}, "hr_sampler_name"),
        ("txt2img", {"enable_hr": True, "hr_scheduler": "Karras"}, "hr_scheduler"),
        ("img2img", {"init_images": [START], "include_init_images": True}, "include_init_images"),
        ("img2img", {"init_images": ["bm8="]}, "init_images"),
        ("img2img", {"init_images": [START], "resize_mode": {"a": 1}}, "resize_mode"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": "bm8="}]}}}, "alwayson_scripts"),
        ("txt2img", {"alwayson_scripts": {"controlnet": {"args": [{"image": "?"}]}}}, "alwayson_scripts"),
        ("txt2img", {"scheduler": "foo", "sampler_name": "Euler"}, "scheduler"),
        ("txt2img", {"sampler_index": "foo"}, "sampler_index"),
        ("txt2img", {"prompt": "x <lora::0.8>"}, "prompt"),
        ("txt2img", {"prompt": "x <lora:ink:abc>"}, "prompt"),
    ],
)
def test_what_would_make_another_picture_is_refused_by_name(post, path, body, name):
    answer = post(path, {"prompt": "x"} | body)
    assert param(answer) == name and "controls" not in answer[1]["error"]["message"]
    assert "'abc'" not in answer[1]["error"]["message"]
    assert post.asks == []


@pytest.mark.parametrize(
    "body",
    [
        {"hr_sampler_name": "Euler"},
        {"enable_hr": True, "hr_sampler_name": "Use same sampler", "hr_scheduler": "Use same scheduler"},
        {"enable_hr": True, "hr_sampler_name": "Euler", "sampler_name": "Euler", "hr_scheduler": None},
        {"s_tmax": 0, "denoising_strength": 0.3},
    ],
)
def test_what_asks_for_nothing_is_passed_over(post, body):
    assert post("txt2img", {"prompt": "x"} | body)[0] == 418 and len(post.asks) == 1


@pytest.mark.parametrize(
    "ours, text, theirs, told",
    [
        ("guidance", "guidance must be a number", "cfg_scale", "cfg_scale must be a number"),
        ("size", "size's height must be 1", "height", "height must be 1"),
        ("size", "size 130x128 is not a multiple", "width", "width x height 130x128 is not a multiple"),
        (
            "count",
            "count must be between 1 and 64",
            "batch_size",
            "batch_size x n_iter must be between 1 and 64",
        ),
        ("hires.scale", "too large", "hr_scale", "too large"),
        ("loras[0].weight", "no", "prompt", "no"),
        ("steps", "steps must be a number", "steps", "steps must be a number"),
        (None, "no", None, "no"),
    ],
)
def test_errors_have_the_web_ui_s_names(post, ours, text, theirs, told):
    for error in (Refused(400, "bad_input", text, param=ours), InputError(text, argument=ours)):
        post.refusal = error
        status, answer = post("txt2img", {"prompt": "x"})
        assert status == 400 and (answer["error"]["param"], answer["error"]["message"]) == (theirs, told)


def test_options_are_all_set_or_none(desk, post):
    desk.floor.devices[0].facts = [FACTS, FACTS | {"name": "other"}]
    good, wrong = {"sd_model_checkpoint": "other"}, {"sd_vae": "x"}
    assert param(post("options", good | wrong)) == "sd_vae"
    post("txt2img", {"prompt": "x"})
    assert post("options", good)[0] == 200
    post("txt2img", {"prompt": "x"})
    assert [ask.model for ask in post.asks] == ["pocket", "other"]
