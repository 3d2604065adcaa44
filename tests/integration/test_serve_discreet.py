"""Nothing that a client is told, by any door and whatever it sends, says where something lies on the machine."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import requests
from PIL import Image

import small_adapted
import small_svd
from helpers import noise
from hostile_requests import HOSTILE, NO_BODIES, NO_PICTURES
from hostile_weights import HOSTILE as WEIGHTS
from routes import ROUTES, filled
from serving import Patience, Server, png
from sfumato.serve import keys
from small_python import small_python

pytestmark = pytest.mark.full  # a server of its own

MARK = "hidden-place"
MODELS = ("sd", "moves", "pocket")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("discreet") / MARK
    found.mkdir()
    return found


@pytest.fixture(scope="module")
def ring(place):
    return place / "keys.json", {"a": keys.add(place / "keys.json", "a")[0]}


@pytest.fixture(scope="module")
def server(place, ring):
    source, ink, canny = small_adapted.write(place / "adapted")
    moves = small_svd.write("svd", place / "moves", frames=6)
    (place / "models.toml").write_text(
        f'[[model]]\nname = "sd"\nsource = "{source}"\ndtype = "fp32"\n'
        f'[model.loras]\nink = "{ink}"\nlcm-lora = "{ink}"\n[model.controlnets]\ncanny = "{canny}"\n'
        f'[[model]]\nname = "moves"\nsource = "{moves}"\ndtype = "fp32"\n'
        '[[model]]\nname = "pocket"\nsource = "pocket"\n'
    )
    running = Server(
        place / "data", "--models", str(place / "models.toml"), "--keys", str(ring[0]), "--queue", "1000",
        "--memory", "1GB", python=small_python(place),
    )  # fmt: skip
    yield running.start(600)
    running.kill()


@pytest.fixture(scope="module")
def heard(server):
    """All answers that this file gets, looked through when one comes: a function that takes one and gives it back."""
    repository = Path(__file__).resolve().parent.parent.parent
    places = {MARK, tempfile.gettempdir(), str(Path.home()), str(repository), sys.prefix, os.getcwd()}
    places = [each for each in places if len(each) > 2]

    def look(answer: requests.Response) -> requests.Response:
        said = [f"{name}: {value}" for name, value in answer.headers.items()] + [text_of(answer)]
        for text in said:
            for each in places:
                at = text.find(each)
                assert at < 0, (answer.request.method, answer.url, text[max(0, at - 200) : at + 200])
        return answer

    return look


def text_of(answer: requests.Response) -> str:
    """What stands in an answer, in a picture's own texts too."""
    kind = answer.headers.get("content-type", "")
    if kind.startswith("image/") and answer.ok and "svg" not in kind:
        picture = Image.open(io.BytesIO(answer.content))
        picture.load()
        exif = [str(value) for value in picture.getexif().values()]
        return "\n".join([*(str(value) for value in picture.info.values()), *exif])
    return answer.content.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def done(a, heard, place):
    """Jobs of every model that are done, and a file."""
    file = a.upload(png(noise(64, 64)))
    lora = a.upload((place / "adapted" / "ink.safetensors").read_bytes(), "application/octet-stream")
    first = a.upload(png(small_svd.picture()))
    wishes = {
        "sd": {
            "prompt": "a cat", "size": [64, 64], "loras": ["ink", lora], "controls": [{"name": "canny", "image": file}],
        },
        "pocket": {"prompt": "a cube", "image": file, "size": [64, 64], "strength": 0.5},
        "moves": {"image": first, "frames": 4},
    }  # fmt: skip
    found = {}
    for model, request in wishes.items():
        path = "/v1/videos" if model == "moves" else "/v1/jobs"
        body, patience = {"model": model, "request": {**request, "steps": 2}, "previews": 1}, Patience(300)
        while (
            answer := heard(a.post(path, body))
        ).status_code == 503 and patience:  # a machine that is very busy
            time.sleep(1)
        assert answer.status_code == 202, answer.text
        found[model] = a.wait(answer.json()["id"])
        assert found[model]["state"] == "succeeded", found[model]
    return found, file


def test_a_lora_for_few_steps_is_noted_by_its_name(a, heard):
    body = {
        "model": "sd",
        "request": {"prompt": "a cat", "size": [64, 64], "loras": ["lcm-lora"], "steps": 2},
    }
    note = (
        'LoRA lcm-lora is taken for one made for few steps (lcm), for it is called "lcm-lora": drawn with guidance 1, '
        "sampler lcm, schedule lcm; say others by `guidance`, `sampler`, `schedule`"
    )
    assert heard(a.post("/v1/estimate", body)).json()["notes"] == [note]
    job = heard(a.post("/v1/jobs", body)).json()
    assert a.wait(job["id"])["notes"] == job["notes"] == [note]


def test_no_route_says_where_something_lies(a, done, heard):
    jobs, file = done
    for model, job in jobs.items():
        values = {"job": job["id"], "file": file, "number": "0", "model": model, "path": "js/main.js"}
        for method, path in ROUTES:
            if method != "DELETE":
                heard(a(method, filled(path, values)))
        for wrong in ("x", "..%2f..%2fetc%2fpasswd", "job_" + "0" * 32):
            for method, path in ROUTES:
                heard(a(method, filled(path, dict.fromkeys(values, wrong))))


@pytest.mark.parametrize("model", MODELS)
def test_no_refusal_says_where_something_lies(a, done, heard, model):
    _, file = done
    wrong = [
        {"image": file, "frames": 10**6}, {"clip": file}, {"image": file, "mask": file, "frames": 4}, {"negative": "x"},
        {"controls": [{"name": "canny", "image": file, "weight": 99}]}, {"loras": [{"name": "ink", "weight": 1000}]},
        {"motion": {"bucket": -1}}, {"image": file, "frames": 600, "size": [1024, 1024]}, {"prompt": "x", "image": 3},
        {"prompt": "x", "image": file, "frames": 4}, {"prompt": "x", "refine_at": 0.5}, {"prompt": "x", "frames": 2},
    ]  # fmt: skip
    seen = set()
    for request in wrong:
        for path in ("/v1/estimate", "/v1/videos/estimate", "/v1/preflight"):
            answer = heard(a.post(path, {"model": model, "request": {"steps": 1, **request}}))
            seen.add(answer.status_code)
    assert 400 in seen and max(seen) < 500
    chosen = {"/v1/images/generations": {"model": model}}
    chosen["/sdapi/v1/txt2img"] = {"override_settings": {"sd_model_checkpoint": model}}
    for path, named in chosen.items():
        for body in (
            {"prompt": 3},
            {"prompt": "x", "steps": 10**9},
            {"prompt": "<lora:none:1>"},
            {"sampler_name": "/a/b"},
        ):
            assert heard(a.post(path, {**named, **body})).status_code == 400


def test_no_request_that_cannot_be_drawn_is_answered_with_a_place(a, heard):
    for request in HOSTILE:
        body = json.dumps({"model": "sd", "request": request})
        answer = heard(a.post("/v1/estimate", data=body, headers={"content-type": "application/json"}))
        assert answer.status_code < 500


def test_no_bad_body_or_file_is_answered_with_a_place(a, heard):
    for body in NO_BODIES:
        heard(a.post("/v1/jobs", data=body, headers={"content-type": "application/json"}))
    for data, _ in WEIGHTS.values():
        heard(a("POST", "/v1/files", data=data, headers={"content-type": "application/octet-stream"}))
    for data in NO_PICTURES.values():
        heard(a("POST", "/v1/files", data=data, headers={"content-type": "image/png"}))
        heard(a("POST", "/v1/files", data=data, headers={"content-type": "video/mp4"}))
        heard(a("POST", "/v1/videos", files={"clip": ("x.mp4", data)}, data={"model": "moves"}))
        heard(a.post("/sdapi/v1/img2img", {"init_images": [base64.b64encode(data).decode()], "prompt": "x"}))


def test_files_that_are_gone_are_not_said_by_their_place(a, server, heard, done):
    """Outputs, uploads and models that somebody removed under a running server."""
    jobs, file = done
    for path in (server.folder / "outputs").rglob("0"):
        path.unlink()
    for path in (server.folder / "thumbs").rglob("0"):
        path.unlink()
    for job in jobs.values():
        for path in (*job["pictures"], *job["clips"], *job["thumbs"]):
            assert heard(a.get(path)).status_code == 410
    (server.folder / "uploads" / file).unlink()
    assert heard(a.get(f"/v1/files/{file}")).status_code == 400
    assert heard(a.post("/v1/jobs", {"request": {"image": file}})).status_code == 400
