"""The HTTP API, asked by those who ask such APIs: requests, curl, openai, webuiapi, Prometheus."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from helpers import noise, white
from serving import PRICES, PROMPT, Client, Server, error, opened, png, same
from sfumato import Request, load
from sfumato.receipts.provenance import read_recipe
from sfumato.serve import keys

pytestmark = pytest.mark.full  # a server of its own, for minutes

LONG = {"steps": 1000, "count": 2}


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """Keys by name."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    limits = {
        "a": {}, "b": {}, "watch": {"role": keys.WATCH}, "poor": {"budget": 3_000}, "slow": {"rate": 2},
        "narrow": {"queue": 1}, "leaving": {},
    }  # fmt: skip
    return file, {name: keys.add(file, name, **more)[0] for name, more in limits.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory, ring):
    place = tmp_path_factory.mktemp("serve")
    (place / "prices.toml").write_text(PRICES)
    running = Server(
        place / "data", "--keys", str(ring[0]), "--prices", str(place / "prices.toml"), "--queue", "24"
    )
    yield running.start()
    running.kill()


@pytest.fixture(scope="module")
def pocket():
    return load("pocket", "cpu")


# --- the native way --------------------------------------------------------------------------------------------------


def test_a_job_from_its_beginning_to_its_bill(a, pocket, tmp_path):
    job = a.submit({"seed": 2**64 - 1, "count": 2, "steps": 6}, previews=2)
    assert job["state"] == "queued" and job["expected"]["steps"] == 6
    happened = a.events(job["id"])
    states = [data["state"] for name, data in happened if name == "state"]
    assert states[-1] == "succeeded" and set(states) <= {"queued", "running", "succeeded"}
    previews = [data for name, data in happened if name == "preview"]
    assert [each["number"] for each in previews] == [0, 1]
    assert opened(base64.b64decode(previews[0]["b64"])).size == (128, 128)
    steps = [data["step"] for name, data in happened if name == "progress"]
    assert steps == sorted(steps) and steps[-1] == 6
    done = happened[-1][1]
    local = pocket.generate(Request(PROMPT, seed=2**64 - 1, count=2, steps=6))
    for number, path in enumerate(done["pictures"]):
        answer = a.get(path)
        assert answer.headers["content-type"] == "image/png"
        assert same(opened(answer.content), local.images[number])
        (tmp_path / "it.png").write_bytes(answer.content)
        recipe = read_recipe(tmp_path / "it.png")
        assert recipe["request"]["seed"] == [2**64 - 1, 0][number] and recipe["model"] == "pocket"
    micros = 2 * 1_000 + -(-2 * 128 * 128 * 6 * 10_000 // 1_000_000)
    assert done["price"] == {"currency": "USD", "reserved_micros": micros, "charged_micros": micros}
    receipt = a.get(f"/v1/jobs/{job['id']}/receipt").json()
    assert receipt["charged_micros"] == micros and receipt["seconds"] > 0 and receipt["flops"]["denoise"] > 0
    assert receipt["recipe"]["weights"] == pocket.hashes
    today = a.get("/v1/usage").json()["days"][-1]
    assert today["jobs"] >= 1 and today["micros"] >= micros
    listed = a.get("/v1/jobs").json()["data"]
    assert job["id"] in [each["id"] for each in listed]


def test_an_estimate_is_what_is_then_charged(a):
    body = {"request": {"prompt": PROMPT, "steps": 3, "size": [64, 64]}}
    told = a.post("/v1/estimate", body).json()
    job = a.wait(a.post("/v1/jobs", body).json()["id"])
    assert told["price"]["most_micros"] == job["price"]["charged_micros"] > 0
    assert told["pixel_steps"] == 64 * 64 * 3 and told["seconds"] > 0


def test_a_preflight_says_what_will_not_survive(a):
    letters = a.upload(png(noise(128, 128)))
    told = a.post("/v1/preflight", {"request": {"prompt": 'a tiny "HELLO"', "image": letters}}).json()
    assert 0 <= told["score"] <= 100 and told["prompt"]["wishes"] and told["picture"]["size"] == [128, 128]


def test_pictures_to_begin_with_are_uploads(a, pocket):
    start, hole = noise(128, 128), white(128, 128, 30, 30, 90, 100)
    names = a.upload(png(start)), a.upload(png(hole))
    job = a.wait(a.submit({"image": names[0], "mask": names[1], "seed": 4, "steps": 4}, format="webp")["id"])
    answer = a.get(job["pictures"][0])
    assert answer.headers["content-type"] == "image/webp"
    drawn = opened(answer.content)
    assert same(drawn, pocket.generate(Request(PROMPT, image=start, mask=hole, seed=4, steps=4)).images[0])
    outside = np.asarray(hole) == 0
    assert (np.asarray(drawn)[outside] == np.asarray(start)[outside]).all()
    assert a.get(f"/v1/files/{names[0]}").content == png(start)
    shown = {"controls": [{"name": "depth", "image": names[0], "weight": 0.7}], "steps": 3}
    assert a.wait(a.submit(shown)["id"])["state"] == "succeeded"
    assert a("DELETE", f"/v1/files/{names[0]}").json()["deleted"]
    assert a.get(f"/v1/files/{names[0]}").status_code == 404
    assert error(a.post("/v1/jobs", {"request": {"image": names[0]}})) == (400, "bad_input")


def test_several_at_once_share_the_device_and_stay_themselves(a, server, pocket):
    before = a_metrics(server, a)
    requests = [{"prompt": PROMPT, "seed": k, "steps": 30} for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        jobs = list(pool.map(lambda r: a.submit(r)["id"], requests))
    done = [a.wait(job) for job in jobs]
    after = a_metrics(server, a)
    for k in (0, 5):
        picture = opened(a.get(done[k]["pictures"][0]).content)
        assert same(picture, pocket.generate(Request(**requests[k])).images[0])
    time.sleep(1.2)  # until the worker has said it
    after = a_metrics(server, a)
    calls, rows = (after[n] - before[n] for n in ("sfumato_network_calls", "sfumato_network_rows"))
    assert rows >= 6 * 30 * 2 and calls < rows / 3


def a_metrics(server, client) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    text = Client(server, WATCH[0]).get("/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


WATCH: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def _watcher(ring):
    WATCH[:] = [ring[1]["watch"]]


def test_what_is_cancelled_is_free_and_ends_within_a_step(a):
    job = a.submit(LONG)
    time.sleep(0.3)
    started = time.time()
    ended = a.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert ended["state"] == "cancelled" and time.time() - started < 2
    assert ended["price"]["charged_micros"] == 0
    assert error(a.get(f"/v1/jobs/{job['id']}/receipt")) == (404, "no_receipt")
    assert error(a.get(f"/v1/jobs/{job['id']}/pictures/0")) == (404, "not_found")
    again = a.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert again["state"] == "cancelled"


def test_who_hangs_up_frees_the_device_within_a_step(a, server):
    body = json.dumps({"prompt": PROMPT, "steps": 1000, "n": 2}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        head = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Authorization: {a.session.headers['authorization']}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        line.sendall(head.encode() + body)
        until = time.time() + 20
        while time.time() < until:
            newest = a.get("/v1/jobs?limit=1").json()["data"][0]
            if newest["state"] == "running" and newest["request"].get("steps") == 1000:
                break
            time.sleep(0.02)
        assert newest["state"] == "running"
    ended = a.wait(newest["id"], 5)
    assert ended["state"] == "cancelled" and "client" in ended["error"]["message"]


def test_an_idempotency_key_is_one_job(a, b):
    headers = {"Idempotency-Key": "once"}
    body = {"request": {"prompt": PROMPT, "steps": 2}}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: a.post("/v1/jobs", body, headers=headers).json()["id"], range(4)))
    assert len(set(answers)) == 1
    assert b.post("/v1/jobs", body, headers=headers).json()["id"] not in answers
    body["request"]["steps"] = 3
    assert error(a.post("/v1/jobs", body, headers=headers)) == (422, "idempotency_mismatch")
    for wrong in ("", "x" * 256):
        assert a.post("/v1/jobs", body, headers={"Idempotency-Key": wrong}).status_code == 400


# --- OpenAI's clients ------------------------------------------------------------------------------------------------


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
    later = a.post("/v1/images/generations", body, headers={"x-stainless-retry-count": "2"}).json()
    assert later["data"] == answers[0]["data"]
    fresh = a.post("/v1/images/generations", body).json()
    assert fresh["data"] != answers[0]["data"]  # who asks anew gets another seed


# --- the web UI's clients --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def webui(server, ring):
    module = pytest.importorskip("webuiapi")
    host, port = server.url.removeprefix("http://").split(":")
    return module.WebUIApi(host=host, port=int(port), username="me", password=ring[1]["b"], steps=4)


def test_webuiapi_draws(webui, pocket):
    answer = webui.txt2img(
        prompt=PROMPT, negative_prompt="metal", seed=9, width=64, height=64, cfg_scale=3, batch_size=2,
        sampler_name="DPM++ 2M", scheduler="Karras",
    )  # fmt: skip
    request = Request(
        PROMPT,
        "metal",
        seed=9,
        size=(64, 64),
        guidance=3.0,
        count=2,
        sampler="dpmpp_2m",
        schedule="karras",
        steps=4,
    )
    for shown, picture in zip(answer.images, pocket.generate(request).images, strict=True):
        assert same(shown.convert("RGB"), picture)
    assert answer.info["all_seeds"] == [9, 10] and answer.info["sampler_name"] == "DPM++ 2M"
    assert "Seed: 10" in answer.info["infotexts"][1] and answer.info["receipt"]["charged_micros"] > 0


def test_webuiapi_begins_with_a_picture_and_paints_in_a_mask(webui):
    start, hole = noise(128, 128), white(128, 128, 20, 20, 60, 60)
    answer = webui.img2img(
        images=[start],
        mask_image=hole,
        inpaint_full_res=False,
        prompt=PROMPT,
        width=128,
        height=128,
        cfg_scale=2,
    )
    outside = np.asarray(hole) == 0
    assert (np.asarray(answer.image.convert("RGB"))[outside] == np.asarray(start)[outside]).all()


def test_webuiapi_s_second_pass_and_control(webui):
    import webuiapi

    large = webui.txt2img(
        prompt=PROMPT, enable_hr=True, hr_scale=2, width=64, height=64, denoising_strength=0.5
    )
    assert large.image.size == (128, 128)
    unit = webuiapi.ControlNetUnit(image=noise(64, 64), model="depth", weight=0.5)
    shown = webui.txt2img(prompt=PROMPT, width=64, height=64, controlnet_units=[unit])
    assert "depth" in str(shown.json["info"]) or shown.image.size == (64, 64)


def test_webuiapi_asks_what_there_is(webui):
    assert {"Euler", "DPM++ 2M", "UniPC"} <= {each["name"] for each in webui.get_samplers()}
    assert webui.get_options()["sd_model_checkpoint"] == "pocket"
    assert [each["model_name"] for each in webui.get_sd_models()] == ["pocket"]
    webui.set_options({"sd_model_checkpoint": "pocket"})
    assert webui.get_progress()["state"]["job_count"] == 0
    assert (
        "karras" in {each["name"] for each in webui.get_schedulers()}
        if hasattr(webui, "get_schedulers")
        else True
    )


def test_progress_and_interrupt_are_the_key_s_own(webui, a, b, server, ring):
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(webui.txt2img, prompt=PROMPT, steps=1000, width=128, height=128)
        until = time.time() + 30
        while not (seen := b.get("/sdapi/v1/progress").json())["progress"] and time.time() < until:
            time.sleep(0.02)
        assert 0 < seen["progress"] < 1 and seen["state"]["sampling_steps"] == 1000
        assert a.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0
        assert a.post("/sdapi/v1/interrupt").status_code == 200
        assert b.get("/sdapi/v1/progress").json()["state"]["job_count"] == 1
        assert b.post("/sdapi/v1/interrupt").status_code == 200
        answer = drawing.result(30)
    assert answer.images == [] and answer.info["interrupted"]


@pytest.mark.parametrize(
    "body",
    [{"tiling": True}, {"restore_faces": True}, {"styles": ["x"]}, {"sampler_name": "Nothing"}, {"what": 1},
     {"script_name": "x"}, {"alwayson_scripts": {"ADetailer": {"args": [True]}}}, {"batch_size": 0}, {"batch_size": 65},
     {"override_settings": {"sd_vae": "x"}}, {"enable_hr": True, "hr_upscaler": "ESRGAN"}, {"prompt": 3},
     {"override_settings": {"sd_model_checkpoint": "none"}}, {"prompt": "<lora:none:1>"}, {"seed": "x"}],
)  # fmt: skip
def test_what_the_web_ui_asks_and_we_cannot_is_refused_by_name(b, body):
    answer = b.post("/sdapi/v1/txt2img", {"prompt": PROMPT, "steps": 2, "width": 64, "height": 64} | body)
    assert answer.status_code in (400, 404), answer.text


# --- curl and Prometheus ---------------------------------------------------------------------------------------------


def test_curl_draws(server, ring, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    auth, kind = f"Authorization: Bearer {ring[1]['a']}", "Content-Type: application/json"

    def run(*more: str) -> bytes:
        return subprocess.run(
            ["curl", "-sS", "-f", "-H", auth, *more], capture_output=True, check=True
        ).stdout

    job = json.loads(
        run("-H", kind, "-d", '{"request": {"prompt": "a cube", "steps": 2}}', f"{server.url}/v1/jobs")
    )
    events = run("-N", f"{server.url}/v1/jobs/{job['id']}/events").decode()
    assert '"state":"succeeded"' in events
    run("-o", str(tmp_path / "x.png"), f"{server.url}/v1/jobs/{job['id']}/pictures/0")
    assert Image.open(tmp_path / "x.png").size == (128, 128)


def test_prometheus_reads_what_it_is_told(server, a):
    a.wait(a.submit()["id"])
    found = a_metrics(server, a)
    assert found["sfumato_pictures_total"] >= 1 and found["sfumato_workers_ready"] == 1
    assert found["sfumato_charged_micros_total"] > 0 and found["sfumato_http_requests_total"] >= 1
    text = Client(server, WATCH[0]).get("/metrics").text
    assert "job_" not in text.replace("sfumato_job_", "") and "key_" not in text


# --- limits ----------------------------------------------------------------------------------------------------------


def test_money_runs_out_and_says_so(server, ring):
    poor = Client(server, ring[1]["poor"])
    request = {"steps": 2, "size": [32, 32]}
    for _ in range(2):
        poor.wait(poor.submit(request)["id"])
    refused = poor.post("/v1/jobs", {"request": {"prompt": "x", **request}})
    assert error(refused) == (402, "budget_exceeded") and "left this month" in refused.text
    month = poor.get("/v1/usage").json()["month"]
    assert month["budget_micros"] == 3_000 and 0 < month["spent_and_reserved_micros"] <= 3_000


def test_a_rate_is_kept(server, ring):
    slow = Client(server, ring[1]["slow"])
    answers = [slow.post("/v1/jobs", {"request": {"prompt": "x", "steps": 1}}) for _ in range(3)]
    assert [each.status_code for each in answers] == [202, 202, 429]
    assert error(answers[2])[1] == "rate_limited" and 1 <= int(answers[2].headers["retry-after"]) <= 60


def test_a_key_may_have_so_many_open(server, ring):
    narrow = Client(server, ring[1]["narrow"])
    job = narrow.submit(LONG)
    refused = narrow.post("/v1/jobs", {"request": {"prompt": "x"}})
    assert error(refused) == (429, "too_many_open") and refused.headers["retry-after"]
    narrow.post(f"/v1/jobs/{job['id']}/cancel")
    assert narrow.wait(narrow.submit()["id"])["state"] == "succeeded"


def test_a_full_queue_says_when_to_come_back(a):
    jobs, refused = [], []
    for _ in range(40):
        answer = a.post("/v1/jobs", {"request": {"prompt": "x", "steps": 200, "count": 8}})
        (jobs if answer.status_code == 202 else refused).append(answer)
    assert refused and all(error(each)[0] == 429 for each in refused)
    assert {error(each)[1] for each in refused} <= {"queue_full", "too_busy"}
    assert all(1 <= int(each.headers["retry-after"]) <= 120 for each in refused)
    for each in jobs:
        assert a.post(f"/v1/jobs/{each.json()['id']}/cancel").status_code == 200


def test_what_would_take_longer_than_its_deadline_is_refused(a):
    wrong = {"request": {"prompt": "x", "steps": 1000, "count": 64, "size": [2048, 2048]}, "deadline": 5}
    answer = a.post("/v1/jobs", wrong)
    assert error(answer) == (400, "bad_input") and answer.json()["error"]["param"] in ("deadline", "size")


def test_a_key_that_is_revoked_is_refused_at_once(server, ring):
    leaving = Client(server, ring[1]["leaving"])
    assert leaving.get("/v1/models").status_code == 200
    keys.revoke(ring[0], "leaving")
    assert error(leaving.get("/v1/models")) == (401, "invalid_api_key")


def test_only_keys_for_it_watch_and_they_draw_nothing(server, ring, a):
    watch = Client(server, ring[1]["watch"])
    assert watch.get("/metrics").status_code == 200
    assert error(watch.get("/v1/models")) == (403, "forbidden")
    assert error(a.get("/metrics")) == (403, "forbidden")


def test_the_document_describes_what_is_there(server, a):
    document = Client(server).get("/openapi.json").json()
    assert {"/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/healthz"} <= set(document["paths"])
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert a.post("/v1/jobs", body["example"]).status_code == 202
    from dataclasses import fields

    described = body["schema"]["properties"]["request"]["properties"]
    assert set(described) == {field.name for field in fields(Request)}
    assert described["image"]["anyOf"][0]["pattern"].startswith("^file_")


def test_the_page_has_a_strict_policy_and_asks_nobody_else(server):
    answer = Client(server).get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "http://" not in answer.text and "https://" not in answer.text


def test_a_tenant_with_many_jobs_does_not_keep_another_waiting(a, b):
    waits = [a.submit({"steps": 20, "count": 8})["id"] for _ in range(4)]
    assert b.wait(b.submit({"steps": 2})["id"])["state"] == "succeeded"
    states = [a.get(f"/v1/jobs/{job}").json()["state"] for job in waits]
    assert states.count("queued") >= 2
    for job in waits:
        a.post(f"/v1/jobs/{job}/cancel")
