"""LoRAs that clients send, with a real server: drawn with as the server's own, and nobody else's."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from safetensors.torch import load_file, save

import small_adapted
from helpers import plain
from serving import Client, Server, error, opened
from sfumato.serve import keys
from small_python import small_python

pytestmark = pytest.mark.full  # a server of its own

RAW = "application/octet-stream"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def ring(place):
    file = place / "keys.json"
    return file, {name: keys.add(file, name)[0] for name in "ab"}


@pytest.fixture(scope="module")
def files(place):
    """The checkpoint, and the LoRA that the server has, too."""
    source, ink, _ = small_adapted.write(place)
    return source, ink


@pytest.fixture(scope="module")
def python(place):
    return small_python(place)


@pytest.fixture(scope="module")
def server(place, ring, files, python):
    source, ink = files
    (place / "models.toml").write_text(
        f'[[model]]\nname = "sd"\nsource = "{source}"\ndtype = "fp32"\n[model.loras]\nink = "{ink}"\n'
        '[[model]]\nname = "pocket"\nsource = "pocket"\n'
    )
    running = Server(
        place / "data", "--models", str(place / "models.toml"), "--keys", str(ring[0]), "--lora-size", "64MiB",
        python=python,
    )  # fmt: skip
    yield running.start(600)
    running.kill()


def wanted(*loras: object, **more: object) -> dict:
    return {"prompt": "a cat", "size": [64, 64], "steps": 3, "seed": 2, "loras": list(loras), **more}


def drawn(client: Client, *loras: object) -> tuple[dict, np.ndarray]:
    answer = client.post("/v1/jobs", {"model": "sd", "request": wanted(*loras)})
    assert answer.status_code == 202, answer.text
    job = client.wait(answer.json()["id"])
    assert job["state"] == "succeeded", job
    return job, np.asarray(opened(client.get(job["pictures"][0]).content)).astype(int)


def test_it_draws_as_the_server_s_own_and_leaves_the_model_as_it_was(a, files, place, python):
    _, ink = files
    name = a.upload(ink.read_bytes(), RAW)
    assert a.post("/v1/estimate", {"model": "sd", "request": wanted(name)}).ok
    before, own, sent, after = (
        drawn(a, *uses) for uses in ((), ({"name": "ink", "weight": 2},), ({"name": name, "weight": 2},), ())
    )
    assert (own[1] == sent[1]).all() and (before[1] == after[1]).all() and (before[1] != own[1]).any()
    recipes = [a.get(f"/v1/jobs/{job['id']}/receipt").json()["recipe"] for job, _ in (own, sent)]
    assert recipes[1]["loras"] == {name: recipes[0]["loras"]["ink"]}
    file = place / "sent.png"
    file.write_bytes(a.get(sent[0]["pictures"][0]).content)
    replay = [str(python), "-m", "sfumato", "replay", str(file), "-m", str(files[0]), "--dtype", "fp32"]
    told = subprocess.run(replay, capture_output=True, text=True)
    assert told.returncode == 2 and f"the LoRA {name!r}; give its file" in plain(told.stderr), told.stderr
    again = subprocess.run([*replay, "--lora", f"{name}={ink}", "--json"], capture_output=True, text=True)
    assert again.returncode == 0 and json.loads(again.stdout)["verdict"] in ("identical", "near"), (
        again.stderr
    )
    facts = a.get("/v1/models").json()["data"][0]
    assert (facts["loras"], facts["lora_bytes"]) == (["ink"], 2**26)  # nobody hears of what others sent
    web = a.post("/sdapi/v1/txt2img", {
        "prompt": f"a cat <lora:{name}:2>", "steps": 3, "seed": 2, "width": 64, "height": 64,
        "override_settings": {"sd_model_checkpoint": "sd"},
    })  # fmt: skip
    assert web.ok and name in web.json()["info"]


def test_others_have_each_their_own(a, b, files):
    """At once, and as each alone."""
    tensors = load_file(files[1])
    names = [a.upload(save({k: v * s for k, v in tensors.items()}), RAW) for s in (1.0, 1.2, 0.8)]
    alone = [drawn(a, name)[1] for name in names]
    jobs = [a.post("/v1/jobs", {"model": "sd", "request": wanted(name)}).json()["id"] for name in names]
    for job, picture in zip(jobs, alone, strict=True):
        found = a.wait(job)
        assert (np.asarray(opened(a.get(found["pictures"][0]).content)).astype(int) == picture).all()
    assert all((one != other).any() for one, other in ((alone[0], alone[1]), (alone[1], alone[2])))
    for door, body in (
        ("/v1/jobs", {"model": "sd", "request": wanted(names[0])}),
        ("/v1/estimate", {"model": "sd", "request": wanted({"name": names[0]})}),
        ("/sdapi/v1/txt2img", {"prompt": f"<lora:{names[0]}:1>"}),
    ):
        text, none = json.dumps(body), "file_" + "0" * 32
        told = [b.post(door, json.loads(text.replace(names[0], name))) for name in (names[0], none)]
        assert [answer.status_code for answer in told] == [400, 400]
        assert told[0].text == told[1].text.replace(none, names[0])
    assert b.get(f"/v1/files/{names[0]}").status_code == 404
    answer = b.post("/v1/jobs", {"model": "sd", "request": wanted("none")})
    assert error(answer) == (400, "bad_input") and "file_" not in answer.text


def test_one_that_does_not_fit_is_refused_by_its_family_without_a_place(a, files, place):
    pocket = save(
        {"dit.blocks.0.it.lora_A.weight": torch.ones(2, 8), "dit.blocks.0.it.lora_B.weight": torch.ones(8, 2)}
    )
    for model, data, words in (
        ("sd", pocket, "is a LoRA for pocket"), ("pocket", files[1].read_bytes(), "is a LoRA for a U-Net"),
    ):  # fmt: skip
        name = a.upload(data, RAW)
        for path in ("/v1/jobs", "/v1/estimate"):
            answer = a.post(path, {"model": model, "request": {"loras": [name]}})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "loras"
            assert answer.json()["error"]["message"].startswith(f"{name} {words}"), answer.text
            assert str(place) not in answer.text


def test_what_is_too_large_or_none_leaves_nothing(a, server):
    before = sorted(path.name for path in (server.folder / "uploads").iterdir())
    large = weights(2**26)
    for data, status in ((large, 413), (save({"a": torch.ones(3)}), 400), (large[:5000], 400)):
        answer = a("POST", "/v1/files", data=data, headers={"content-type": RAW})
        assert answer.status_code == status, answer.text
        answer = a("POST", "/v1/files", files={"file": ("x.safetensors", data)})
        assert answer.status_code == status, answer.text
    with pytest.raises(requests.ConnectionError):
        a("POST", "/v1/files", data=broken(large[:400_000]), headers={"content-type": RAW})
    assert sorted(path.name for path in (server.folder / "uploads").iterdir()) == before


def test_a_large_one_is_never_in_memory_whole(a, server):
    size = 2**26 - 2000  # with its header as much as it may have
    before = most_memory(server)
    assert a.upload(weights(size), RAW)
    assert most_memory(server) - before < size / 2


def weights(size: int) -> bytes:
    """A LoRA of about so many bytes."""
    return save({"x.lora_A.weight": torch.zeros(size // 4), "x.lora_B.weight": torch.zeros(200)})


def most_memory(server: Server) -> int:
    """Bytes that the front has had at once."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def broken(data: bytes):
    """A body whose sender goes away."""
    yield data
    raise requests.ConnectionError("gone")
