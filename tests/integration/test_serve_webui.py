"""Clients of AUTOMATIC1111's web UI."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from helpers import noise, white
from serving import PROMPT, same
from sfumato import Request

pytestmark = pytest.mark.full  # a server of its own


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
    shown = re.search(r"Model hash: (\w+)", answer.info["infotexts"][0])[1]
    assert answer.info["sd_model_hash"] == shown == webui.get_sd_models()[0]["hash"] and len(shown) == 10
    assert webui.get_options()["sd_checkpoint_hash"] == webui.get_sd_models()[0]["sha256"]


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
        body = {
            "prompt": PROMPT,
            "steps": 1000,
            "width": 128,
            "height": 128,
        }  # what is open, the model decides
        drawing = pool.submit(b.post, "/sdapi/v1/txt2img", body)
        until = time.time() + 30
        while not (seen := b.get("/sdapi/v1/progress").json())["progress"] and time.time() < until:
            time.sleep(0.02)
        assert 0 < seen["progress"] < 1 and seen["state"]["sampling_steps"] == 1000
        assert a.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0
        assert a.post("/sdapi/v1/interrupt").status_code == 200
        assert b.get("/sdapi/v1/progress").json()["state"]["job_count"] == 1
        assert b.post("/sdapi/v1/interrupt").status_code == 200
        answer = drawing.result(30).json()
    info = json.loads(answer["info"])
    assert answer["images"] == [] and info["interrupted"]
    assert info["sd_model_hash"] == webui.get_sd_models()[0]["hash"]
    preset = b.get("/v1/models/pocket").json()["preset"]
    names = {each["aliases"][0]: each["name"] for each in webui.get_samplers()}
    assert info["sampler_name"] == names[preset["sampler"]] and info["steps"] == 1000
    assert isinstance(info["cfg_scale"], (int, float)) and (info["width"], info["height"]) == (128, 128)


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
