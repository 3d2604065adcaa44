"""Clips over HTTP, with a small model that sets pictures in motion; pocket beside it draws its pictures."""

from __future__ import annotations

import base64
import json
import time

import numpy as np
import pytest
import torch

import small_svd
from helpers import noise
from serving import PRICES, Client, Server, error, opened, png
from sfumato import Request
from sfumato.families.svd.system import open_system
from sfumato.generate import Model
from sfumato.receipts.clips import encoded, read_recipe
from sfumato.serve import keys
from sfumato.types import Clip
from sfumato.video.read import decode_clip
from small_python import small_python

pytestmark = pytest.mark.full  # a server of its own

FRAMES, SIZE = 4, list(small_svd.SIZE)
PRICED = PRICES + "frame = 0.002\n"
WISH = {"frames": FRAMES, "steps": 3, "seed": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def source(place):
    return small_svd.write("svd", place / "moves", frames=6)


@pytest.fixture(scope="module")
def ring(place):
    return place / "keys.json", {name: keys.add(place / "keys.json", name)[0] for name in ("a", "b")}


@pytest.fixture(scope="module")
def server(place, source, ring):
    (place / "prices.toml").write_text(PRICED)
    (place / "models.toml").write_text(
        f'[[model]]\nname = "moves"\nsource = "{source}"\ndtype = "fp32"\n'
        '[[model]]\nname = "pocket"\nsource = "pocket"\n'
    )
    running = Server(
        place / "data", "--models", str(place / "models.toml"), "--keys", str(ring[0]), "--prices",
        str(place / "prices.toml"), "--queue", "100", "--memory", "1GB", python=small_python(place),
    )  # fmt: skip
    yield running.start()
    assert "Traceback" not in (log := running.log.read_text()), log[-3000:]
    running.kill()


@pytest.fixture(scope="module")
def first(a):
    return a.upload(png(small_svd.picture()))


@pytest.fixture(scope="module")
def model(source):
    cpu = torch.device("cpu")
    return Model(open_system(source, cpu, torch.float32, systems=small_svd.SMALL), cpu, "moves")


def submitted(client: Client, **body) -> dict:
    answer = client.post("/v1/videos", {"model": "moves", **body})
    assert answer.status_code == 202, answer.text
    return answer.json()


def finished(client: Client, job: str) -> dict:
    done = client.wait(job)
    assert done["state"] == "succeeded", done
    return done


def frames_of(clip: Clip) -> np.ndarray:
    return np.stack([np.asarray(frame, np.int16) for frame in clip.frames])


def test_a_clip_from_its_beginning_to_its_bill(a, first, model, tmp_path):
    body = {"request": {**WISH, "image": first, "count": 2}, "previews": 2}
    told = a.post("/v1/videos/estimate", {"model": "moves", **body}).json()
    assert (told["pictures"], told["frames"], told["fps"], told["size"]) == (2, FRAMES, 7, SIZE)
    assert told["flops"]["denoise"] > 0 and told["memory"] > 0
    video = submitted(a, **body)
    assert video["object"] == "video" and video["format"] == "mp4"
    happened = a.events(video["id"])
    assert [data["step"] for name, data in happened if name == "progress"] == list(range(1, 7))
    previews = [data for name, data in happened if name == "preview"]
    assert len(previews) == 2 and opened(base64.b64decode(previews[0]["b64"])).size
    done = happened[-1][1]
    assert done["state"] == "succeeded" and done["pictures"] == [] and len(done["clips"]) == 2
    wish = Request(**WISH, image=small_svd.picture(), count=2)
    drawn = model.generate(wish)
    for number, path in enumerate(done["clips"]):
        answer = a.get(path)
        assert answer.headers["content-type"] == "video/mp4"
        (tmp_path / "it.mp4").write_bytes(answer.content)
        assert read_recipe(tmp_path / "it.mp4")["request"]["seed"] == 5 + number
        ours = decode_clip(encoded(drawn.clips[number], drawn.recipe, "mp4"))
        theirs = decode_clip(answer.content)
        assert theirs.fps == 7 and len(theirs.frames) == FRAMES
        assert np.abs(frames_of(ours) - frames_of(theirs)).mean() < 1
    assert a.get(done["clips"][0], headers={"range": "bytes=0-99"}).status_code == 206
    pixels = 2 * FRAMES * SIZE[0] * SIZE[1] * 3
    micros = 2 * FRAMES * 2_000 + -(-pixels * 10_000 // 1_000_000)
    assert told["price"]["most_micros"] == done["price"]["charged_micros"] == micros
    receipt = a.get(f"/v1/videos/{video['id']}/receipt").json()
    assert receipt["frames"] == FRAMES and receipt["charged_micros"] == micros and receipt["seconds"] > 0
    assert receipt["recipe"]["weights"] == model.hashes
    assert video["id"] in [each["id"] for each in a.get("/v1/jobs").json()["data"]]


@pytest.mark.parametrize(
    ("format", "media"), [("webm", "video/webm"), ("gif", "image/gif"), ("webp", "image/webp")]
)
def test_other_formats(a, first, format, media, tmp_path):
    done = finished(a, submitted(a, request={**WISH, "image": first}, format=format)["id"])
    answer = a.get(done["clips"][0])
    assert answer.headers["content-type"] == media
    assert len(decode_clip(answer.content).frames) == FRAMES
    (tmp_path / f"it.{format}").write_bytes(answer.content)
    assert read_recipe(tmp_path / f"it.{format}")["request"]["steps"] == 3


def test_a_lossless_clip_is_the_one_drawn_here(a, first, model):
    done = finished(a, submitted(a, request={**WISH, "image": first}, format="webp")["id"])
    clip = decode_clip(a.get(done["clips"][0]).content)
    here = model.generate(Request(**WISH, image=small_svd.picture())).clips[0]
    assert np.abs(frames_of(clip) - frames_of(here)).max() <= 2


def test_a_form_brings_its_picture_along(a):
    form = {"model": "moves", "request": json.dumps(WISH), "previews": "0", "format": "webp"}
    files = {"image": ("first.png", png(small_svd.picture()), "image/png")}
    answer = a("POST", "/v1/videos", data=form, files=files)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["request"]["image"].startswith("file_")
    key = {"idempotency-key": "once"}
    one, two = (a("POST", "/v1/videos", data=form, files=files, headers=key).json()["id"] for _ in range(2))
    assert one == two and len(finished(a, job["id"])["clips"]) == 1


def test_a_clip_to_begin_with(a, model):
    begun = Clip(tuple(small_svd.picture(seed=k) for k in range(FRAMES)), 5.0)
    data = encoded(begun, {"request": {}}, "webp")
    wish = {"steps": 4, "seed": 1, "strength": 0.5}
    sent = a.upload(encoded(begun, {"request": {}}, "mp4"), "video/mp4")
    assert a.get(f"/v1/files/{sent}").headers["content-type"] == "video/mp4"
    assert finished(a, submitted(a, request={**wish, "clip": sent})["id"])["expected"]["frames"] == FRAMES
    answer = a(
        "POST", "/v1/videos", data={"model": "moves", "request": json.dumps(wish), "format": "webp"},
        files={"clip": ("begun.webp", data)},
    )  # fmt: skip
    done = finished(a, answer.json()["id"])
    here = model.generate(Request(**wish, clip=begun)).clips[0]
    found = decode_clip(a.get(done["clips"][0]).content)
    assert found.fps == pytest.approx(5) and np.abs(frames_of(found) - frames_of(here)).max() <= 2


def test_what_is_cancelled_is_free(a, first):
    video = submitted(a, request={"image": first, "frames": FRAMES, "steps": 150}, deadline=3600)
    time.sleep(0.3)
    ended = a.post(f"/v1/videos/{video['id']}/cancel").json()
    assert ended["state"] == "cancelled" and ended["price"]["charged_micros"] == 0
    assert error(a.get(f"/v1/videos/{video['id']}/clips/0")) == (404, "not_found")


def test_another_s_clip_is_as_if_it_were_not(a, b, first):
    done = finished(a, submitted(a, request={**WISH, "image": first})["id"])
    for path in (f"/v1/videos/{done['id']}", f"/v1/videos/{done['id']}/receipt", done["clips"][0]):
        assert error(b.get(path)) == (404, "not_found")
    assert b.post("/v1/videos", {"model": "moves", "request": {"image": first}}).status_code == 400


def test_pictures_and_clips_have_routes_of_their_own(a, first):
    picture = a.post("/v1/jobs", {"model": "pocket", "request": {"prompt": "x", "steps": 1}}).json()
    a.wait(picture["id"])
    assert error(a.get(f"/v1/videos/{picture['id']}")) == (404, "not_found")
    refused = a.post("/v1/jobs", {"model": "moves", "request": {"image": first, "frames": 4}})
    assert error(refused) == (400, "bad_input") and "/v1/videos" in refused.text
    facts = {each["id"]: each for each in a.get("/v1/models").json()["data"]}
    assert facts["moves"]["clips"] and facts["moves"]["needs_image"] and not facts["pocket"]["needs_image"]
    assert facts["moves"]["preset"]["frames"] == 6


@pytest.mark.parametrize(
    ("request_", "param"),
    [({}, "image"), ({"prompt": "x"}, "image"), ({"image": "first", "prompt": "x"}, "prompt"),
     ({"image": "first", "frames": 1}, "frames"), ({"image": "first", "frames": 10**6}, "frames"),
     ({"image": "first", "mask": "first"}, "mask"), ({"image": "first", "fps": 0}, "fps"),
     ({"image": "first", "motion": {"bucket": -1}}, "motion.bucket"), ({"clip": "first"}, "clip"),
     ({"clip": {"frames": [], "fps": 3}}, "clip"), ({"clip": 3}, "clip"),
     ({"image": "first", "frames": 600, "size": [1024, 1024]}, "size")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_by_name(a, first, request_, param):
    wish = {name: first if value == "first" else value for name, value in request_.items()}
    answer = a.post("/v1/videos", {"model": "moves", "request": wish})
    assert error(answer)[0] == 400 and answer.json()["error"]["param"] == param, answer.text


def test_forms_that_are_none_are_refused(a):
    picture = ("x.png", png(noise(64, 48)))
    for data, files in (
        ({"request": "{"}, {"image": picture}),
        ({"request": "3"}, {"image": picture}),
        ({"request": '{"image": "file_x"}'}, {"image": picture}),
        ({"what": "x"}, {"image": picture}),
        ({"previews": "x"}, {"image": picture}),
        ({}, {"image": ("x.png", b"no picture")}),
        ({}, {"clip": ("x.mp4", b"\0\0\0\x18ftypmp42" + b"\0" * 100)}),
        ({}, {"clip": ("x.mp4", b"")}),
        ({}, {"other": picture}),
        ({"image": "text"}, {"clip": picture}),
    ):
        answer = a("POST", "/v1/videos", data={"model": "moves", **data}, files=files)
        assert answer.status_code == 400, answer.text


def test_a_model_of_pictures_draws_none(a):
    refused = a.post("/v1/videos", {"model": "pocket", "request": {"prompt": "x"}})
    if a.get("/v1/models/pocket").json()["clips"]:
        assert refused.status_code == 202
    else:
        assert error(refused) == (400, "bad_input") and refused.json()["error"]["param"] == "model"


def test_clips_drawn_at_once_stay_themselves(a, first, model):
    wishes = [{**WISH, "seed": seed} for seed in range(4)]
    videos = [submitted(a, request={**wish, "image": first}, format="webp")["id"] for wish in wishes]
    for wish, video in zip(wishes, videos, strict=True):
        clip = decode_clip(a.get(finished(a, video)["clips"][0]).content)
        here = model.generate(Request(**wish, image=small_svd.picture())).clips[0]
        assert np.abs(frames_of(clip) - frames_of(here)).max() <= 2
