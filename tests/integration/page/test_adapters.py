"""A LoRA and a ControlNet from their files, mixed in and followed on the page."""

from __future__ import annotations

import numpy as np
import pytest

import small_adapted
from browsing import Visitor, latest, picture, violations
from helpers import noise
from serving import Client, Server, png
from small_python import small_python

pytestmark = pytest.mark.full  # a server and a browser


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A server with pocket and a small Stable Diffusion that has a LoRA and a ControlNet."""
    place = tmp_path_factory.mktemp("adapted")
    source, ink, canny = small_adapted.write(place)
    (place / "models.toml").write_text(
        '[[model]]\nname = "pocket"\nsource = "pocket"\n'
        f'[[model]]\nname = "sd"\nsource = "{source}"\ndtype = "fp32"\n'
        f'[model.loras]\nink = "{ink}"\n[model.controlnets]\ncanny = "{canny}"\n'
    )
    running = Server(place / "data", "--models", str(place / "models.toml"), python=small_python(place))
    yield running.start(600)
    running.kill()


@pytest.fixture
def visitor(adapted, browser):
    """Somebody who has chosen that model."""
    found = Visitor(browser, adapted.url).ready()
    found.page.select_option("#model", "sd")
    found.page.wait_for_selector("#loras .adapter")
    yield found.fill(prompt="a cat", steps=3, seed=2, width=64, height=64)
    found.close()


def test_a_lora_is_mixed_in_and_a_picture_is_followed(adapted, visitor):
    client, page = Client(adapted), visitor.page
    visitor.draw().drawn()
    plain = picture(client, latest(client))
    page.check("#loras input[type=checkbox]")
    page.fill("[aria-label='Weight of ink']", "2")
    visitor.draw().drawn()
    inked = latest(client)
    assert inked["request"]["loras"] == [{"name": "ink", "weight": 2}]
    assert visitor.recipe()["LoRAs"] == "ink 2"
    hint = {"name": "edges.png", "mimeType": "image/png", "buffer": png(noise(64, 64))}
    page.set_input_files("[aria-label='A picture of kind canny'] input[type=file]", [hint])
    page.wait_for_selector("#controls .slot-frame")
    page.fill("[aria-label='Weight of canny']", "0.8")
    assert violations(visitor) == {}
    visitor.draw().drawn()
    both = latest(client)
    (control,) = both["request"]["controls"]
    assert (control["name"], control["weight"]) == ("canny", 0.8)
    drawn = [plain, picture(client, inked), picture(client, both)]
    assert all((drawn[k] != drawn[k - 1]).any() for k in range(3))
    for job, seen in zip((inked, both), drawn[1:], strict=True):  # the same by whoever asks for the same
        again = client.wait(client.post("/v1/jobs", {"model": "sd", "request": job["request"]}).json()["id"])
        assert np.abs(picture(client, again) - seen).max() <= 2


def test_a_lora_is_uploaded_and_drawn_with(adapted, visitor, tmp_path):
    """One that is none is told beside the button; the other is drawn with, called as its file is."""
    client, page = Client(adapted), visitor.page
    visitor.draw(seed=3).drawn()
    plain = picture(client, latest(client))
    none = {"name": "none.safetensors", "mimeType": "", "buffer": b"PK" + bytes(100)}
    page.set_input_files("#lora-file", [none])
    page.wait_for_selector("#lora-said:text('pickled checkpoint')")
    _, ink, _ = small_adapted.write(tmp_path)
    page.set_input_files("#lora-file", [{**none, "name": "My own.safetensors", "buffer": ink.read_bytes()}])
    box = page.get_by_role("checkbox", name="My own")
    box.wait_for()
    assert box.is_checked() and page.inner_text("#lora-said") == ""
    assert page.get_by_role("button", name="Upload a LoRA").is_visible() and violations(visitor) == {}
    page.fill("[aria-label='Weight of My own']", "2")
    visitor.ready().draw().drawn()
    job = latest(client)
    assert job["request"]["loras"][0]["name"].startswith("file_")
    assert visitor.recipe()["LoRAs"] == "My own 2"
    assert (picture(client, job) != plain).any()
    box.uncheck()
    visitor.press("Take settings")
    assert box.is_checked() and page.get_by_role("checkbox", name="My own").count() == 1
    page.select_option("#model", "pocket")
    assert page.is_visible("#send-lora") and not box.is_checked()
    client("DELETE", f"/v1/files/{job['request']['loras'][0]['name']}")
    visitor.press("Take settings")
    page.wait_for_selector("#lora-said:text('not there any more')")
    assert box.count() == 0 and page.get_by_role("checkbox", name="ink").is_visible()
    visitor.ready()


def test_a_model_that_takes_no_loras_is_given_none(adapted, browser, tmp_path):
    """As after its server's keeper took them away."""
    client = Client(adapted)
    name = client.post(
        "/v1/files",
        data=small_adapted.write(tmp_path)[1].read_bytes(),
        headers={"content-type": "application/octet-stream"},
    ).json()["id"]
    body = {"prompt": "a cat", "steps": 2, "seed": 1, "size": [64, 64], "loras": [{"name": name}]}
    client.wait(client.post("/v1/jobs", {"model": "sd", "request": body}).json()["id"])
    visitor = Visitor(browser, adapted.url)
    page = visitor.page

    def without(route):
        answer = route.fetch()
        told = answer.json()
        for model in told["data"]:
            model["lora_bytes"], model["loras"] = 0, []
        route.fulfill(response=answer, json=told)

    page.route("**/v1/models", without)
    page.reload()
    visitor.ready()
    page.locator("#tiles .tile").first.click()
    visitor.press("Take settings")
    page.wait_for_function("document.querySelector('#prompt').value === 'a cat'")
    with page.expect_request("**/v1/estimate") as asked:
        visitor.fill(steps=2)
    assert (
        "loras" not in asked.value.post_data_json["request"] and page.locator("#loras .adapter").count() == 0
    )
    visitor.close()


def test_what_is_said_of_adapters_stands_beside_the_price(visitor):
    page = visitor.page

    def noted(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"notes": ["the LoRA ink is for 4 steps"]})

    page.route("**/v1/estimate", noted)
    visitor.fill(steps=4)
    page.wait_for_selector("#price .aside:text('The LoRA ink is for 4 steps.')")


def test_settings_bring_adapters_along_and_another_model_has_none_of_them(visitor):
    page = visitor.page
    visitor.draw(steps=2).drawn()
    page.check("#loras input[type=checkbox]")
    page.fill("[aria-label='Weight of ink']", "0.5")
    visitor.draw().drawn()
    page.select_option("#model", "pocket")
    page.wait_for_selector("#loras .adapter", state="detached")
    visitor.press("Take settings")
    page.wait_for_selector("#loras .adapter")
    assert page.input_value("#model") == "sd" and page.is_checked("#loras input[type=checkbox]")
    assert page.input_value("[aria-label='Weight of ink']") == "0.5"
