"""Who may what: every route with no key, a wrong one and another's; and whatever can be sent, without a 5xx."""

from __future__ import annotations

import base64
import json
import re
import socket

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import noise, white
from hostile_requests import HOSTILE, NO_BODIES, NO_PICTURES
from routes import ROUTES, filled, public
from serving import PROMPT, Client, Server, error, png
from sfumato.serve import keys
from sfumato.serve.desk import Desk

pytestmark = pytest.mark.full  # a server of its own, for minutes


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, {name: keys.add(file, name)[0] for name in ("a", "b")}


@pytest.fixture(scope="module")
def server(tmp_path_factory, ring):
    running = Server(tmp_path_factory.mktemp("serve") / "data", "--keys", str(ring[0]), "--queue", "1000")
    yield running.start()
    assert running.process.poll() is None, (running.process.poll(), running.log.read_text()[-2000:])
    assert "Traceback" not in (log := running.log.read_text()), log[-3000:]
    running.kill()


@pytest.fixture(scope="module")
def owned(a):
    """A job and a file of a's."""
    job = a.submit()["id"]
    a.wait(job)
    return {
        "job": job,
        "file": a.upload(png(noise(64, 64))),
        "number": "0",
        "model": "pocket",
        "path": "index.html",
    }


def test_there_are_routes_to_walk():
    assert len(ROUTES) > 25 and isinstance(Desk, type)


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda part: part)
def test_without_a_key_only_what_is_public_answers(server, owned, method, path):
    for key in (None, "sfk_wrong", "", "' or 1=1 --"):
        answer = Client(server, key)(method, filled(path, owned))
        if public(filled(path, owned)):
            assert answer.status_code == 200
        else:
            assert error(answer) == (401, "invalid_api_key") and answer.headers["www-authenticate"]


@pytest.mark.parametrize(
    ("method", "path"), [r for r in ROUTES if "{" in r[1] and not public(r[1])], ids=lambda p: p
)
def test_what_is_another_s_is_as_if_it_were_not(b, owned, method, path):
    if set(re.findall(r"\{(\w+)", path)) <= {"model", "path"}:
        return
    answer = b(method, filled(path, owned))
    nothing = b(method, filled(path, {**owned, "job": "job_" + "0" * 32, "file": "file_" + "0" * 32}))
    assert error(answer) == error(nothing) == (404, "not_found")


def test_lists_and_requests_show_nothing_of_another(a, b, owned):
    assert b.get("/v1/jobs").json()["data"] == []
    assert b.get("/v1/usage").json()["days"] == []
    answer = b.post("/v1/jobs", {"request": {"prompt": "x", "image": owned["file"]}})
    nothing = b.post("/v1/jobs", {"request": {"prompt": "x", "image": "file_" + "0" * 32}})
    assert error(answer) == error(nothing) == (400, "bad_input")
    assert a.get(f"/v1/jobs/{owned['job']}").status_code == 200


@pytest.mark.parametrize(
    "name",
    ["..", "../../etc/passwd", "%2e%2e%2fledger.db", "..%2f..%2fledger.db", "job_" + "0" * 31 + "/", "job_%00",
     "a" * 3000,
     "job_" + "０" * 32, "job_" + "0" * 32 + "%0a", "%ff%fe", "job_" + "G" * 32, "null", "undefined", "__class__"],
)  # fmt: skip
def test_ids_that_are_none(a, name):
    for path in (
        f"/v1/jobs/{name}",
        f"/v1/files/{name}",
        f"/v1/jobs/{name}/pictures/0",
        f"/v1/jobs/{name}/events",
    ):
        answer = a.get(path)
        assert answer.status_code in (404, 405), (path, answer.status_code)
        assert "passwd" not in answer.text and "SQLite" not in answer.text


@pytest.mark.parametrize(
    "name", ["../keys.py", "..%2fkeys.py", "%2e%2e/run.py", "/etc/passwd", "%2fetc%2fpasswd", "x", ""]
)
def test_the_page_s_folder_holds_the_page_alone(server, name):
    answer = requests.get(server.url + "/page/" + name)
    assert answer.status_code in (401, 404) and "import" not in answer.text


@pytest.mark.parametrize("number", ["-1", "1", "99999999999", "0x0", "1.0", "a", "٣", "%00"])
def test_numbers_of_pictures_that_are_none(a, owned, number):
    assert a.get(f"/v1/jobs/{owned['job']}/pictures/{number}").status_code in (400, 404)


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", HOSTILE, ids=lambda r: str(r)[:40])
def test_requests_that_cannot_be_drawn_name_what_is_wrong(a, request_):
    for path in ("/v1/jobs", "/v1/estimate"):
        answer = a.post(path, data=json.dumps({"request": {"prompt": "x", **request_}}), headers={
            "content-type": "application/json"})  # fmt: skip
        status, code = error(answer)
        assert status == 400 and code in ("bad_input", "bad_data"), answer.text
        assert answer.json()["error"]["param"] and len(answer.text) < 2000 and "Traceback" not in answer.text


@pytest.mark.parametrize("body", NO_BODIES, ids=lambda body: repr(body[:40]))
def test_bodies_that_are_none(a, body):
    answer = a.post("/v1/jobs", data=body, headers={"content-type": "application/json"})
    assert error(answer) == (400, "bad_input"), answer.text


def test_other_kinds_of_bodies_are_refused(a):
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/xml",
        "",
    ):
        answer = a.post("/v1/jobs", data=b"{}", headers={"content-type": kind})
        assert error(answer) == (415, "unsupported_media_type")
    assert (
        a.post(
            "/v1/images/edits", data=b"x", headers={"content-type": "multipart/form-data; boundary=b"}
        ).status_code
        == 400
    )
    assert a.post("/v1/images/edits", {"prompt": "x"}).status_code == 415


def test_an_unknown_model_is_404(a):
    assert error(a.post("/v1/jobs", {"request": {"prompt": "x"}, "model": "../x"})) == (
        404,
        "model_not_found",
    )
    assert error(a.get("/v1/models/none")) == (404, "model_not_found")


def test_a_prompt_that_is_too_long_is_refused_at_every_door(a):
    """In one line: what it has, and what is allowed."""
    text = "unheard " * 40
    told = "the prompt needs 361 tokens and this model reads at most 128"
    for path, body in (
        ("/v1/jobs", {"request": {"prompt": text}}),
        ("/v1/estimate", {"request": {"prompt": text}}),
        ("/v1/preflight", {"request": {"prompt": text}}),
        ("/v1/images/generations", {"prompt": text}),
        ("/sdapi/v1/txt2img", {"prompt": text}),
    ):
        answer = a.post(path, body)
        assert error(answer) == (400, "bad_input"), (path, answer.text)
        said = answer.json()["error"]
        assert said["message"].startswith(told) and "\n" not in said["message"] and said["param"] == "prompt"
    clip = {"request": {"prompt": text, "frames": 9}}
    for path in ("/v1/videos", "/v1/videos/estimate"):
        assert told in a.post(path, clip).json()["error"]["message"]
    assert "the negative needs" in a.post("/v1/jobs", {"request": {"negative": text}}).text


def test_prompts_of_any_language_are_drawn(a):
    for prompt in (
        "",
        "😀🏳️‍🌈",
        "מחשב قطة",
        "\u202eevil",
        "<script>alert(1)</script>",
        "a\nb\tc",
        "' or 1=1; --",
    ):
        job = a.wait(a.submit({"prompt": prompt, "steps": 1, "size": [32, 32]})["id"])
        assert job["state"] == "succeeded" and job["request"]["prompt"] == prompt


def test_a_body_that_is_too_large_is_not_read(server, ring):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(
            f"POST /v1/jobs HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {ring[1]['a']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {2**40}\r\n\r\n".encode()
        )
        assert line.recv(64).startswith(b"HTTP/1.1 413")
    chunks = (b"x" * 2**20 for _ in range(40))
    try:
        answer = Client(server, ring[1]["a"])(
            "POST", "/v1/files", data=chunks, headers={"content-type": "image/png"}
        )
        assert answer.status_code == 413
    except requests.ConnectionError:
        pass  # the server hung up before all was sent


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused_wherever_it_comes_in(a, name):
    data, text = NO_PICTURES[name], base64.b64encode(NO_PICTURES[name]).decode()
    answers = [
        a("POST", "/v1/files", data=data, headers={"content-type": "image/png"}),
        a("POST", "/v1/files", files={"file": ("x.png", data, "image/png")}),
        a("POST", "/v1/images/edits", files={"image": ("x.png", data)}, data={"prompt": "x"}),
        a("POST", "/v1/images/edits", files={"image": ("x.png", png(noise(64, 64))),
        "mask": ("m.png", data or b"\0")},
          data={"prompt": "x"}),
        a.post("/sdapi/v1/img2img", {"init_images": [text], "prompt": "x"}),
    ]  # fmt: skip
    for answer in answers:
        assert answer.status_code == 400, (answer.status_code, answer.text[:200])


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/x", "https://example.org/x.png", "file:///etc/passwd", "//x", "data:,"]
)
def test_addresses_are_not_followed(a, address):
    assert error(a.post("/sdapi/v1/img2img", {"init_images": [address], "prompt": "x"}))[0] == 400
    assert error(a.post("/v1/images/generations", {"prompt": "x", "image": address}))[0] == 400


def test_pictures_that_do_not_agree_are_refused(a):
    start, mask = a.upload(png(noise(64, 64))), a.upload(png(white(32, 32, 0, 0, 8, 8)))
    assert error(a.post("/v1/jobs", {"request": {"prompt": "x", "image": start, "mask": mask}}))[0] == 400
    odd = a.upload(png(noise(65, 64)))
    refused = a.post("/v1/jobs", {"request": {"prompt": "x", "image": odd}})
    assert error(refused)[0] == 400 and "64x64" in refused.text


# --- places ----------------------------------------------------------------------------------------------------------


def test_without_keys_other_sites_do_not_get_in(tmp_path):
    running = Server(tmp_path / "data")
    try:
        here = Client(running.start())
        assert here.get("/v1/models").status_code == 200
        port = running.url.rpartition(":")[2]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.evil"):
            assert error(here.get("/v1/models", headers={"Host": host})) == (403, "wrong_host")
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://localhost.evil:{port}"):
            assert error(here.post("/v1/jobs", {}, headers={"Origin": origin})) == (403, "wrong_origin")
        assert here.get("/v1/models", headers={"Host": f"localhost:{port}"}).status_code == 200
        assert here.get("/v1/models", headers={"Origin": running.url}).status_code == 200
        assert here.get("/metrics").status_code == 200
    finally:
        running.kill()


# --- anything --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([
    "prompt", "negative", "count", "seed", "steps", "guidance", "sampler", "schedule", "size", "image", "strength",
    "fit",
    "mask", "inpaint", "outpaint", "hires", "variation", "eta", "clip_skip", "reuse", "guidance_interval",
    "prompt_rules",
    "weighting", "text_length", "skip_layers", "micro", "refine_at", "loras", "controls",
])  # fmt: skip
OPENAI = st.sampled_from(
    ["prompt", "n", "size", "quality", "stream", "partial_images", "output_format", "model", "style"]
)
WEBUI = st.sampled_from([
    "prompt", "seed", "steps", "width", "height", "cfg_scale", "batch_size", "sampler_name", "scheduler", "enable_hr",
    "hr_scale", "override_settings", "alwayson_scripts", "init_images", "mask", "subseed_strength",
    "denoising_strength",
    "eta", "resize_mode", "inpaint_full_res", "styles", "script_name", "s_churn", "n_iter",
])  # fmt: skip
BODIES = st.one_of(
    st.tuples(
        st.just("/v1/estimate"), st.dictionaries(FIELDS, JSON, max_size=4).map(lambda r: {"request": r})
    ),
    st.tuples(st.just("/v1/estimate"), JSON),
    st.tuples(
        st.just("/v1/jobs"),
        st.dictionaries(st.sampled_from(["request", "model", "format", "previews"]), JSON),
    ),
    st.tuples(st.just("/v1/images/generations"), st.dictionaries(OPENAI, JSON, max_size=4)),
    st.tuples(st.just("/sdapi/v1/txt2img"), st.dictionaries(WEBUI, JSON, max_size=4)),
    st.tuples(st.just("/sdapi/v1/img2img"), st.dictionaries(WEBUI, JSON, max_size=4)),
    st.tuples(st.just("/sdapi/v1/options"), JSON),
    st.tuples(st.just("/v1/preflight"), JSON),
)


def no_5xx(client: Client, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(BODIES)
    def ask(case):
        path, body = case
        answer = client.post(
            path, data=json.dumps(body), headers={"content-type": "application/json"}, stream=True
        )
        assert answer.status_code < 500, (path, body, answer.text[:300])
        if "json" in answer.headers["content-type"]:
            answer.json()
        answer.close()

    ask()


def test_whatever_is_sent_there_is_no_5xx(a):
    no_5xx(a, 250)
    assert a.wait(a.submit()["id"])["state"] == "succeeded"


@pytest.mark.full
def test_whatever_is_sent_for_long_there_is_no_5xx(a):
    no_5xx(a, 10_000)
    assert a.get("/readyz").status_code == 200 and PROMPT
