"""What is done with pictures of the gallery."""

from __future__ import annotations

import numpy as np
import pytest

from browsing import SHAPES, Visitor, enter, latest, picture
from helpers import noise
from serving import Client, png

pytestmark = pytest.mark.full  # a server and a browser


def test_a_picture_of_the_gallery_is_made_again(visitor, client, gallery):
    visitor.page.get_by_role("button", name=SHAPES[0][0], exact=True).last.click()
    visitor.drawn()
    assert visitor.recipe()["Seed"] == "3"
    visitor.press("Make again")
    visitor.page.wait_for_selector(".verdict:not(:empty)")
    job = latest(client)
    assert job["id"] != gallery[0]["id"] and job["request"]["seed"] == 3
    apart = np.abs(picture(client, job) - picture(client, gallery[0])).max()
    assert ("the same to the last pixel" in visitor.text(".verdict")) == (apart == 0) and apart <= 2


def test_the_largest_seed_is_not_rounded(visitor, client):
    seed = 2**64 - 1
    visitor.draw(prompt="a red cube", seed=seed, steps=2).drawn()
    assert latest(client)["request"]["seed"] == seed
    assert visitor.recipe()["Seed"] == str(seed)
    visitor.page.reload()
    visitor.ready().drawn()
    visitor.press("Make again")
    visitor.page.wait_for_selector(".verdict:not(:empty)")
    assert latest(client)["request"]["seed"] == seed


def test_it_is_said_that_what_a_picture_was_begun_with_is_gone(visitor, client):
    files = {"image": ("start.png", png(noise(128, 128)), "image/png")}
    assert client("POST", "/v1/images/edits", files=files, data={"prompt": "a ring"}).status_code == 200
    visitor.page.reload()
    visitor.ready().drawn()
    visitor.press("Make again")
    assert "is not there, or not any more" in visitor.text("#trouble:not([hidden])")
    visitor.press("Take settings")
    visitor.page.wait_for_selector("#trouble:has-text('There is no file'):has-text('That cannot')")


def test_a_variation_is_near_and_another(visitor, client, gallery):
    visitor.page.get_by_role("button", name=SHAPES[1][0], exact=True).last.click()
    visitor.drawn()
    visitor.press("Vary")
    visitor.page.wait_for_selector(".recipe :text('Variation')")
    visitor.drawn()
    job = latest(client)
    assert job["request"]["seed"] == 5 and job["request"]["variation"]["strength"] == 0.25
    near, own = picture(client, job), picture(client, gallery[1])
    other = picture(client, gallery[0])
    assert 0 < np.abs(near - own).mean() < np.abs(other - own).mean()


def test_settings_are_taken_with_what_the_form_has_no_place_for(visitor, client):
    request = {
        "prompt": "a blue ring", "negative": "metal", "seed": 9, "steps": 3, "guidance": 4.5, "sampler": "heun",
        "schedule": "karras", "size": [192, 128], "eta": 0.5,
    }  # fmt: skip
    del request["eta"]
    request["guidance_interval"] = [0.5, 1.0]
    client.wait(client.submit(request)["id"])
    visitor.page.reload()
    visitor.ready().drawn()
    visitor.press("Take settings")
    visitor.page.wait_for_selector("#carried:not([hidden])")
    assert "guidance_interval" in visitor.text("#carried")
    visitor.draw().drawn()
    assert latest(client)["request"] == request


def test_older_ones_are_shown_to_the_last(guarded, browser):
    server, ring = guarded
    many = Client(server, ring["many"])
    names = [many.submit({"prompt": f"a cube {k}", "steps": 1, "size": [32, 32]})["id"] for k in range(50)]
    for name in names:
        many.wait(name)
    visitor = Visitor(browser, server.url)
    enter(visitor, ring["many"])
    visitor.ready()
    visitor.counts(".tile", 48)
    visitor.page.click("#older")
    visitor.counts(".tile", 50)
    shown = visitor.page.evaluate("[...document.querySelectorAll('.tile')].map((n) => n.ariaLabel)")
    assert shown == [f"a cube {k}" for k in reversed(range(50))]
    assert visitor.page.is_hidden("#older")
    visitor.close()
