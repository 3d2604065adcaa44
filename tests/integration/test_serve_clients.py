"""More who ask: LiteLLM, Schemathesis over the document, and a checkpoint with a LoRA and a ControlNet."""

from __future__ import annotations

import base64
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import small_adapted
import small_sd
from helpers import noise
from serving import PROMPT, Client, Server, error, opened, png, same
from sfumato import Request, load
from sfumato.parts import Control, LoraUse
from sfumato.serve import keys
from small_python import small_python

pytestmark = pytest.mark.full  # servers of their own

CASES = 25  # of Schemathesis, for each operation


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def key(place):
    return keys.add(place / "keys.json", "a")[0]


@pytest.fixture(scope="module")
def server(place, key):
    running = Server(place / "data", "--keys", str(place / "keys.json"), "--queue", "1000")
    yield running.start()
    assert "Traceback" not in (log := running.log.read_text()), log[-3000:]
    running.kill()


# --- LiteLLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm():
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one
    return pytest.importorskip("litellm", reason="no LiteLLM: pip install litellm")


def test_litellm_draws(litellm, server, key):
    answer = litellm.image_generation(
        model="openai/pocket", prompt=PROMPT, api_base=server.url + "/v1", api_key=key, n=2, size="64x64",
        extra_body={"seed": 5, "steps": 3},
    )  # fmt: skip
    pocket = load("pocket", "cpu")
    local = pocket.generate(Request(PROMPT, seed=5, steps=3, count=2, size=(64, 64))).images
    for shown, picture in zip(answer.data, local, strict=True):
        assert same(opened(base64.b64decode(shown.b64_json)), picture)


def test_litellm_is_told_what_is_wrong(litellm, server, key):
    for wrong, kind in (
        ({"size": "100x100"}, litellm.BadRequestError),
        ({"model": "openai/none"}, litellm.NotFoundError),
        ({"api_key": "no"}, litellm.AuthenticationError),
    ):
        told = {"model": "openai/pocket", "prompt": PROMPT, "api_key": key, "max_retries": 0, **wrong}
        with pytest.raises(kind):
            litellm.image_generation(api_base=server.url + "/v1", **told)


# --- Schemathesis ----------------------------------------------------------------------------------------------------


def test_schemathesis_finds_no_5xx(server, key, place):
    """Without its phase of examples, which cannot send files as they are."""
    pytest.importorskip("schemathesis", reason="no Schemathesis: pip install schemathesis")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json", "--header",
        f"Authorization: Bearer {key}", "--checks", "not_a_server_error", "--max-examples", str(CASES), "--phases",
        "coverage,fuzzing", "--request-timeout", "60", "--seed", "1", "--no-color", "--exclude-path-regex",
        "/events$",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert Client(server).get("/readyz").status_code == 200


# --- LoRA and ControlNet of a checkpoint -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(place):
    return small_adapted.write(place)


@pytest.fixture(scope="module")
def adapted(place, written):
    checkpoint, ink, canny = written
    running = Server(
        place / "adapted", "-m", f"sd={checkpoint}", "--lora", f"ink={ink}", "--controlnet", f"canny={canny}",
        "--dtype", "fp32", python=small_python(place),
    )  # fmt: skip
    yield running.start()
    running.kill()


def test_a_lora_and_a_controlnet_through_every_door(adapted, written, monkeypatch):
    small_sd.stand_for_the_published(monkeypatch)
    checkpoint, ink, canny = written
    model = load(str(checkpoint), "cpu", dtype=torch.float32, controlnets={"canny": str(canny)})
    model.attach(ink, 0.0, name="ink")
    client, shown = Client(adapted), noise(64, 64)
    facts = client.get("/v1/models/sd").json()
    assert facts["loras"] == ["ink"] and facts["controls"] == ["canny"]
    plain = {"prompt": "a cat", "steps": 3, "seed": 2, "size": [64, 64]}
    hint = client.upload(png(shown))

    def drawn(**more) -> np.ndarray:
        job = client.wait(client.submit({**plain, **more})["id"])
        assert job["state"] == "succeeded", job
        return np.asarray(opened(client.get(job["pictures"][0]).content), np.int16)

    def here(**more) -> np.ndarray:
        request = Request("a cat", steps=3, seed=2, size=(64, 64), **more)
        return np.asarray(model.generate(request).images[0], np.int16)

    without = drawn()
    inked = drawn(loras=[{"name": "ink", "weight": 2.0}])
    led = drawn(controls=[{"name": "canny", "image": hint, "weight": 0.8}])
    both = drawn(loras=["ink"], controls=[{"name": "canny", "image": hint}])
    use, control = LoraUse("ink", 2.0), Control("canny", shown, weight=0.8)
    for over_http, local in (
        (without, here(loras=())),
        (inked, here(loras=(use,))),
        (led, here(loras=(), controls=(control,))),
        (both, here(loras=(LoraUse("ink"),), controls=(Control("canny", shown),))),
    ):
        assert np.abs(over_http - local).max() <= 2
    assert (inked != without).any() and (led != without).any() and (drawn() == without).all()

    told = {"prompt": "a cat <lora:ink:2>", "steps": 3, "seed": 2, "width": 64, "height": 64, "cfg_scale":
            facts["preset"]["guidance"]}  # fmt: skip
    unit = {"image": base64.b64encode(png(shown)).decode(), "model": "canny", "weight": 0.8}
    webui = client.post("/sdapi/v1/txt2img", told).json()
    assert np.abs(np.asarray(opened(base64.b64decode(webui["images"][0])), np.int16) - inked).max() <= 2
    scripts = {"alwayson_scripts": {"controlnet": {"args": [unit]}}, "prompt": "a cat"}
    webui = client.post("/sdapi/v1/txt2img", {**told, **scripts}).json()
    assert np.abs(np.asarray(opened(base64.b64decode(webui["images"][0])), np.int16) - led).max() <= 2

    for wrong in (
        {"loras": [{"name": "none"}]},
        {"loras": [{"name": "ink", "weight": 1000}]},
        {"controls": [{"name": "none", "image": hint}]},
        {"controls": [{"name": "canny", "image": "file_" + "0" * 32}]},
        {"loras": [str(ink)]},
    ):
        assert error(client.post("/v1/jobs", {"request": {**plain, **wrong}})) == (400, "bad_input")
