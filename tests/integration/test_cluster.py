"""Work on a Ray cluster of this machine: the same API in front of two replicas, and files of prompts and folders."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import noise
from serving import PROMPT, Client, Patience, Server, opened, same
from sfumato import Request, load

pytestmark = pytest.mark.full  # starts a cluster
pytest.importorskip("ray", reason="no Ray: pip install 'sfumato[cluster]'")

REPLICAS = "ray::ServeReplica:sfumato-worker"
READY = 240.0  # seconds until Ray, its parts and two workers are there


def replicas(server: Server) -> list[int]:
    """The processes of the workers, by the name that Ray gives them, among all that descend from the server's."""
    parents, names = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(place.name)] = (place / "cmdline").read_bytes().decode("utf-8", "replace")

    def descends(process: int) -> bool:
        while process in parents and process != server.process.pid:
            process = parents[process]
        return process == server.process.pid

    return [process for process, name in names.items() if name.startswith(REPLICAS) and descends(process)]


def restarts(client: Client) -> float:
    text = client.get("/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith("sfumato_worker_restarts_total ")]
    return float(line.split()[1])


def test_two_replicas_draw_behind_the_same_front(tmp_path):
    pocket = load("pocket", "cpu")
    server = Server(tmp_path / "data", "--ray", "local", "--replicas", "2").start(READY)
    try:
        client = Client(server)
        wishes = [{"prompt": PROMPT, "seed": seed, "steps": 12} for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            jobs = list(pool.map(lambda wish: client.submit(wish)["id"], wishes))
        done = [client.wait(job) for job in jobs]
        for wish, job in zip(wishes, done, strict=True):
            assert job["state"] == "succeeded"
            drawn = opened(client.get(job["pictures"][0]).content)
            assert same(drawn, pocket.generate(Request(**wish)).images[0])
        events = client.events(client.submit({"steps": 6}, previews=2)["id"])
        assert [name for name, _ in events].count("preview") == 2 and events[-1][1]["state"] == "succeeded"
        long = client.submit({"steps": 1000})
        assert client.post(f"/v1/jobs/{long['id']}/cancel").json()["state"] == "cancelled"

        lost = client.submit({"steps": 200, "seed": 3})
        patience = Patience(60)
        while client.get(f"/v1/jobs/{lost['id']}").json().get("progress", 1) == 0 and patience:
            pass
        killed = replicas(server)
        assert len(killed) == 2
        for each in killed:
            os.kill(each, signal.SIGKILL)
        assert client.wait(lost["id"], READY)["state"] == "succeeded"
        assert restarts(client) == 2 and {job["state"] for job in server.jobs()} == {"succeeded", "cancelled"}
        assert server.stop(120) == 0
    finally:
        server.kill()


def ran(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "sfumato", *arguments, "--ray", "local", "--replicas", "2", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_file_of_prompts_is_drawn_by_a_cluster(tmp_path):
    lines = [{"prompt": PROMPT, "seed": seed} for seed in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    order = [
        "generate",
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "-o",
        str(tmp_path / "drawn"),
        "--steps",
        "3",
    ]
    assert ran(*order)["drawn"] == 4
    pictures = sorted((tmp_path / "drawn").glob("*.png"))
    pocket = load("pocket", "cpu")
    assert same(opened(pictures[2].read_bytes()), pocket.generate(Request(PROMPT, seed=2, steps=3)).images[0])
    pictures[1].unlink()
    assert ran(*order)["drawn"] == 1 and sorted((tmp_path / "drawn").glob("*.png")) == pictures


def test_a_folder_is_encoded_by_a_cluster_as_by_this_process(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(6):
        noise(64, 64, seed=k).save(photos / f"{k}.png")
    order = ["encode", str(photos), "--size", "64", "--shard", "2", "-o"]
    assert ran(*order, str(tmp_path / "far"))["encoded"] == 6
    subprocess.run([sys.executable, "-m", "sfumato", *order, str(tmp_path / "near")], check=True)
    files = sorted(path.name for path in (tmp_path / "near").glob("*.safetensors"))
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert ran(*order, str(tmp_path / "far"))["encoded"] == 0
