"""The native API: jobs from their beginning to their bill, asked by requests and by curl."""

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
from serving import PROMPT, error, opened, png, same
from sfumato import Request
from sfumato.receipts.provenance import read_recipe

pytestmark = pytest.mark.full  # a server of its own, for minutes

LONG = {"steps": 1000, "count": 2}


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
    bills = []
    for number, path in enumerate(done["pictures"]):
        answer = a.get(path)
        assert answer.headers["content-type"] == "image/png"
        assert same(opened(answer.content), local.images[number])
        (tmp_path / "it.png").write_bytes(answer.content)
        recipe = read_recipe(tmp_path / "it.png")
        assert recipe["request"]["seed"] == [2**64 - 1, 0][number] and recipe["model"] == "pocket"
        bills.append(recipe["receipt"])
    micros = 2 * 1_000 + -(-2 * 128 * 128 * 6 * 10_000 // 1_000_000)
    assert done["price"] == {"currency": "USD", "reserved_micros": micros, "charged_micros": micros}
    receipt = a.get(f"/v1/jobs/{job['id']}/receipt").json()
    assert receipt["charged_micros"] == micros and receipt["seconds"] > 0 and receipt["flops"]["denoise"] > 0
    assert receipt["recipe"]["weights"] == pocket.hashes
    for field in ("seconds", "expected_seconds", "pixel_steps", "calls"):
        assert sum(bill[field] for bill in bills) == pytest.approx(receipt[field])
    assert sum(bill["flops"]["denoise"] for bill in bills) == receipt["flops"]["denoise"]
    assert all(bill["memory"] == receipt["memory"] and bill["pictures"] == 2 for bill in bills)
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


def test_several_at_once_share_the_device_and_stay_themselves(a, metrics, pocket):
    before = metrics()
    requests = [{"prompt": PROMPT, "seed": k, "steps": 30} for k in range(6)]
    with ThreadPoolExecutor(6) as pool:
        jobs = list(pool.map(lambda r: a.submit(r)["id"], requests))
    done = [a.wait(job) for job in jobs]
    after = metrics()
    for k in (0, 5):
        picture = opened(a.get(done[k]["pictures"][0]).content)
        assert same(picture, pocket.generate(Request(**requests[k])).images[0])
    time.sleep(1.2)  # until the worker has said it
    after = metrics()
    calls, rows = (after[n] - before[n] for n in ("sfumato_network_calls", "sfumato_network_rows"))
    assert rows >= 6 * 30 * 2 and calls < rows / 3


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
            [newest] = a.get("/v1/jobs?limit=1").json()["data"] or [{"state": "not there yet"}]
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
