"""Whatever dies, and whenever: no job that was accepted is lost, and none is billed twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import requests

from helpers import noise
from serving import PRICES, Client, Patience, Server, awake, error, opened, png, same, serve
from sfumato import Request, load

MOST_STEPS = 12
READY = 90.0  # seconds, the model's loading in them, on a machine that does other things


@pytest.fixture
def place(tmp_path):
    (tmp_path / "prices.toml").write_text(PRICES)
    return tmp_path


def serving(place, *options: str, **more) -> Server:
    return Server(place / "data", "--prices", str(place / "prices.toml"), *options, **more)


def ready(server: Server, seconds: float = READY) -> None:
    patience = Patience(seconds)
    while patience:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(server.url + "/readyz").status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"not ready again: {server.log.read_text()[-2000:]}")


def balanced(server: Server, accepted: set[str]) -> None:
    """Every accepted job has ended well, is reserved once and settled once, and nothing else is."""
    jobs = {job["id"]: job for job in server.jobs()}
    assert accepted <= set(jobs), "an accepted job is lost"
    assert {job["state"] for job in jobs.values()} == {"succeeded"}, Counter(
        j["state"] for j in jobs.values()
    )
    assert Counter(server.entries("reserve")) == Counter(server.entries("settle")) == Counter(list(jobs))
    assert server.entries("refund") == []


def killed_at_random(place, kills: int, of_front: float, seed: int) -> None:
    """Jobs submitted without pause, while a worker or the front is killed at random moments.

    These lie so far apart that hardly a job is lost with three workers, after which it would be given up. Little is
    drawn meanwhile, so that the last of the queue waits for long.
    """
    chance = random.Random(seed)
    server = serving(place, "--queue", "64", "--deadline", "3600")
    client, took = Client(server.start()), []
    for _ in range(3):
        started = awake().seconds
        client.wait(client.submit({"steps": MOST_STEPS})["id"])
        took.append(awake().seconds - started)
    pace = max(2.0, 8 * min(took))
    accepted: set[str] = set()
    over, wrong = threading.Event(), []

    def submit() -> None:
        number = 0
        while not over.is_set():
            number += 1
            body = {
                "request": {
                    "prompt": f"a cube {number}",
                    "seed": number,
                    "steps": chance.randint(1, MOST_STEPS),
                }
            }
            started = awake().seconds
            try:
                answer = requests.post(server.url + "/v1/jobs", json=body, timeout=7200)
            except requests.ConnectionError:  # the front was killed
                pass
            except requests.RequestException as error:
                wrong.append(error)
            else:
                if answer.status_code == 202:
                    accepted.add(answer.json()["id"])
                elif answer.status_code not in (429, 503):
                    wrong.append(answer.text)
            if (took := awake().seconds - started) > 20:
                wrong.append(took)
            time.sleep(0.1)

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, pace))
            if chance.random() < of_front:
                server.kill()
                server.start()
            else:
                for worker in server.workers():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                time.sleep(0.05)
                ready(server)
    finally:
        over.set()
        thread.join(60)
    assert server.stop(300) == 0, server.log.read_text()[-2000:]
    assert not wrong and len(accepted) >= kills
    balanced(server, accepted)


@pytest.mark.full
def test_killed_now_and_then_it_loses_nothing_and_bills_once(place):
    killed_at_random(place, kills=6, of_front=0.4, seed=1)


@pytest.mark.full
def test_killed_a_hundred_times_it_loses_nothing_and_bills_once(place):
    killed_at_random(place, kills=100, of_front=0.4, seed=2)


@pytest.mark.full
def test_a_picture_is_the_same_after_its_worker_was_killed(place):
    server = serving(place).start()
    try:
        client = Client(server)
        job = client.submit({"seed": 5, "steps": 120})
        while client.get(f"/v1/jobs/{job['id']}").json().get("progress", 1) == 0:
            time.sleep(0.01)
        [worker] = server.workers()
        os.kill(worker, signal.SIGKILL)
        done = client.wait(job["id"])
        assert done["state"] == "succeeded" and server.jobs()[0]["tries"] == 2
        drawn = opened(client.get(done["pictures"][0]).content)
        assert same(
            drawn,
            load("pocket", "cpu").generate(Request(job["request"]["prompt"], seed=5, steps=120)).images[0],
        )
    finally:
        server.kill()


@pytest.mark.full
def test_a_job_that_kills_its_worker_is_given_up_and_free(place):
    server = serving(place).start()
    try:
        client = Client(server)
        job = client.submit({"steps": 1000})["id"]
        for _ in range(3):
            ready(server)
            until = time.time() + READY
            while client.get(f"/v1/jobs/{job}").json()["state"] != "running" and time.time() < until:
                time.sleep(0.02)
            time.sleep(0.3)
            for worker in server.workers():
                os.kill(worker, signal.SIGKILL)
            time.sleep(0.3)
        ended = client.wait(job)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "worker_lost")
        assert ended["price"]["charged_micros"] == 0 and server.entries("refund") == [job]
        ready(server)
        assert client.wait(client.submit()["id"])["state"] == "succeeded"
    finally:
        server.kill()


@pytest.mark.full
def test_the_worker_does_not_outlive_the_front(place):
    server = serving(place).start()
    [worker] = server.workers()
    Client(server).submit({"steps": 1000})
    server.kill()
    until = time.time() + 5
    while os.path.exists(f"/proc/{worker}") and time.time() < until:
        time.sleep(0.02)
    with contextlib.suppress(FileNotFoundError):
        assert Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z"


def test_a_stop_under_load_drops_nothing_and_accepts_nothing(place):
    server = serving(place).start()
    client = Client(server)
    accepted = [client.submit({"seed": k, "steps": 20})["id"] for k in range(12)]
    waiting: list[int] = []
    held = threading.Thread(
        target=lambda: waiting.append(
            client.post("/v1/images/generations", {"prompt": "x", "steps": 30}).status_code
        )
    )
    held.start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    until, refused = time.time() + 10, None
    while time.time() < until and refused is None:
        answer = Client(server).post("/v1/jobs", {"request": {"prompt": "late"}})
        if answer.status_code == 503:
            refused = answer
        else:
            accepted.append(answer.json()["id"])
    assert error(refused) == (503, "draining") and refused.headers["retry-after"]
    assert Client(server).get("/readyz").status_code == 503
    assert Client(server).get(f"/v1/jobs/{accepted[-1]}").status_code == 200  # who waits can still ask
    held.join(60)
    assert waiting == [200]
    assert server.process.wait(120) == 0
    balanced(server, set(accepted))


@pytest.mark.full
def test_what_a_stop_does_not_wait_for_is_drawn_by_the_next_server(place):
    server = serving(place, "--drain", "0").start()
    job = Client(server).submit({"steps": 400})["id"]
    assert server.stop() == 0
    assert server.jobs()[0]["state"] in ("queued", "running")
    again = serving(place).start()
    try:
        assert Client(again).wait(job)["state"] == "succeeded"
    finally:
        again.kill()
    balanced(again, {job})


@pytest.mark.full
def test_a_locked_ledger_is_said_and_waited_for(place):
    server = serving(place).start()
    try:
        client = Client(server)
        running = client.submit({"steps": 60})["id"]
        other = sqlite3.connect(place / "data" / "ledger.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        refused = client.post("/v1/jobs", {"request": {"prompt": "x", "steps": 1}})
        assert error(refused) == (503, "ledger_unavailable") and refused.headers["retry-after"]
        other.execute("ROLLBACK")
        other.close()
        assert client.wait(running)["state"] == "succeeded"
        assert client.wait(client.submit()["id"])["state"] == "succeeded"
        balanced(server, {running})
    finally:
        server.kill()


@pytest.mark.full
def test_a_full_disk_is_said_and_nothing_is_billed(place):
    server = serving(
        place, limit=300_000
    )  # bytes of a file: what the kernel refuses beyond, as a full disk does
    server.start()
    try:
        client = Client(server)
        data = png(noise(512, 512))
        assert len(data) > 300_000
        refused = client("POST", "/v1/files", data=data, headers={"content-type": "image/png"})
        assert error(refused) == (503, "storage_full") and refused.headers["retry-after"]
        done = client.submit()["id"]
        assert client.wait(done)["state"] == "succeeded" and server.entries("settle") == [done]
        large = client.submit({"steps": 1, "size": [1024, 1024]})["id"]  # more bytes than may be written
        ended = client.wait(large, 300)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "storage_full")
        assert ended["price"]["charged_micros"] == 0 < ended["price"]["reserved_micros"]
        assert server.entries("refund") == [large] and server.entries("settle") == [done]
        accepted, codes = set(), Counter()
        for k in range(60):  # until the ledger itself has no room
            request = {"prompt": "a cube" + " " * 30_000, "seed": k, "steps": 1, "size": [32, 32]}
            answer = client.post("/v1/jobs", {"request": request})
            codes[answer.status_code] += 1
            if answer.status_code == 202:
                accepted.add(answer.json()["id"])
            elif answer.status_code == 503:
                assert error(answer) == (503, "ledger_unavailable") and answer.headers["retry-after"]
        assert set(codes) <= {202, 429, 503} and codes[202] and codes[503], codes
        assert client.get("/healthz").status_code == 200
    finally:
        server.kill()
    again = serving(place).start()  # there is room again
    try:
        for job in sorted(accepted):
            ended = Client(again).wait(job)
            price = ended["price"]
            assert ended["state"] == "succeeded" and 0 < price["charged_micros"] <= price["reserved_micros"]
        jobs = {job["id"]: job for job in again.jobs()}
        assert Counter(again.entries("reserve")) == Counter(list(jobs))
        assert Counter(again.entries("settle")) == Counter({*accepted, done}) and set(jobs) == {
            *accepted,
            done,
            large,
        }
        bill = Client(again).get("/v1/usage").json()["month"]["spent_and_reserved_micros"]
        assert bill == sum(job["charged"] for job in jobs.values()), "what was refused is billed"
    finally:
        again.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-m", "none.safetensors"], "none"),
        (["--host", "0.0.0.0"], "--keys"),
        (["--keys", "none.json"], "keys add"),
        (["--port", "99999"], "port"),
        (["--ledger", "mysql://x"], "ledger"),
        (["--device", "cuda:99"], "device"),
        (["--queue", "none"], "queue"),
        (["--keep", "0"], "0 days"),
        (["--memory", "1KB"], "1,000 bytes"),
        (["--memory", "1MiB"], "give more by --memory"),
        (["-m", "a b=pocket"], "NAME=MODEL"),
        (["-m", "a=pocket", "-m", "b=pocket", "--lora", "x=y"], "--models"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(tmp_path, options, said):
    done = subprocess.run(
        serve(tmp_path / "d", *options), capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2 and last.startswith("error: ") and said in last, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_a_folder_and_a_port_are_one_server_s(place):
    server = serving(place).start()
    try:
        for data, port in ((place / "data", "0"), (place / "other", server.url.rpartition(":")[2])):
            command = [sys.executable, "-m", "sfumato", "serve", "--port", port, "--data", str(data)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2 and "error: " in done.stderr.strip().split("\n")[-1]
    finally:
        server.kill()
