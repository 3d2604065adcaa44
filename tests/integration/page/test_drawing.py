"""A picture from its prompt to its bill, in the page."""

from __future__ import annotations

import numpy as np
import pytest

from browsing import LONG, Visitor, latest, picture
from serving import PROMPT, Server

pytestmark = pytest.mark.full  # a server and a browser


def test_a_picture_is_drawn_watched_and_billed(visitor, client):
    page = visitor.page
    page.evaluate(
        """() => { window.looks = new Set(); window.steps = new Set(); new MutationObserver(() => {
            const look = document.querySelector('#stage.running .preview:not([hidden])')?.src;
            const step = document.querySelector('#stage.running .status')?.textContent;
            if (look) window.looks.add(look);
            if (/^Step/.test(step ?? '')) window.steps.add(step);
        }).observe(document.getElementById('stage'), {subtree: true, attributes: true, childList: true,
            characterData: true}); }"""
    )
    visitor.fill(prompt=PROMPT, seed=7, steps=120)
    page.wait_for_selector("#price b:text('$0.021')")
    visitor.draw().drawn()
    looks, steps = page.evaluate("[window.looks.size, window.steps.size]")
    assert looks >= 3 and steps >= 20, "it was seen to form"
    assert all(look.startswith("data:image/jpeg;base64,") for look in page.evaluate("[...window.looks]"))
    job = latest(client)
    assert job["state"] == "succeeded"
    assert {name: job["request"][name] for name in ("prompt", "seed", "steps")} == {
        "prompt": PROMPT,
        "seed": 7,
        "steps": 120,
    }
    recipe = visitor.recipe()
    assert recipe["Cost"] == f"${job['price']['charged_micros'] / 1e6:.3f}" and recipe["Seed"] == "7"
    assert page.evaluate(f"document.querySelector('{'.final'}').naturalWidth") == 128
    assert page.locator(".tile").first.get_attribute("aria-label") == PROMPT


def test_a_seed_by_chance_is_kept_and_may_be_taken_again(visitor, client):
    visitor.draw(prompt="a red cube", steps=2).drawn()
    first = latest(client)["request"]["seed"]
    visitor.draw().drawn()
    assert latest(client)["request"]["seed"] != first
    visitor.page.click("#last-seed")
    assert visitor.page.input_value("#seed") == str(latest(client)["request"]["seed"])


def test_a_job_is_cancelled_and_free(visitor, client):
    visitor.draw(prompt=PROMPT, **LONG)
    visitor.page.wait_for_selector("#stage.running .preview:not([hidden])")
    assert "In the queue" in visitor.text("#queue")
    visitor.press("Cancel")
    visitor.page.wait_for_selector("#stage.cancelled")
    assert "Nothing is charged" in visitor.text("#stage")
    assert visitor.page.is_hidden("#queue")
    job = latest(client)
    assert job["state"] == "cancelled" and job["price"]["charged_micros"] == 0


def test_many_jobs_wait_their_turn_and_are_cancelled_from_the_queue(visitor, client):
    for seed in range(5):
        visitor.draw(prompt=f"cube {seed}", seed=seed, **LONG)
    page = visitor.page
    visitor.counts("#queue-list li", 5)
    page.get_by_role("button", name="Cancel “cube 3”").click()
    visitor.counts("#queue-list li", 4)
    page.reload()
    visitor.counts("#queue-list li", 4)
    page.click("#cancel-all")
    page.wait_for_selector("#queue", state="hidden")
    jobs = client.get("/v1/jobs?limit=5").json()["data"]
    assert {job["state"] for job in jobs} == {"cancelled"}


def test_several_pictures_of_one_job(visitor, client):
    visitor.draw(prompt="a red cube", seed=20, count=3, steps=4).drawn()
    buttons = visitor.page.locator(".strip button")
    assert buttons.count() == 3
    buttons.nth(2).click()
    visitor.drawn()
    assert visitor.recipe()["Seed"] == "22"
    many = latest(client)
    visitor.press("Make again")
    visitor.page.wait_for_selector(".verdict:not(:empty)")
    alone = latest(client)
    assert alone["request"]["seed"] == 22 and alone["request"]["count"] == 1
    assert np.abs(picture(client, alone) - picture(client, many, 2)).max() <= 2


def test_what_will_not_survive_is_said_beside_the_button(visitor):
    visitor.fill(prompt='a poster with the words "Grand opening of the new library"')
    note = visitor.page.locator("#preflight .note")
    note.wait_for()
    assert "will be lost" in note.inner_text()
    note.locator("summary").click()
    assert "ask for fewer words" in note.inner_text().lower()
    visitor.fill(prompt="a red cube")
    note.wait_for(state="detached")


def test_why_nothing_is_known_of_what_survives_is_said(visitor):
    said = {"error": {"message": "the model has no chart", "code": "bad_input", "param": None}}
    visitor.page.route("**/v1/preflight", lambda route: route.fulfill(status=400, json=said))
    visitor.fill(prompt="a red cube")
    note = visitor.page.locator("#preflight .note")
    note.wait_for()
    note.locator("summary").click()
    assert "The model has no chart." in note.inner_text()
    visitor.page.unroute("**/v1/preflight")


def test_what_cannot_be_drawn_is_said_in_words_at_its_field(visitor, client):
    before = latest(client)["id"]
    visitor.fill(prompt="a red cube", width=130)
    visitor.page.wait_for_selector("#price .cannot")
    assert "the nearest legal size is 128x128" in visitor.text("#price")
    assert visitor.page.get_attribute("#width", "aria-invalid") == "true"
    visitor.page.click("#draw")
    visitor.page.wait_for_selector("#trouble:not([hidden])")
    assert "That cannot be drawn" in visitor.text("#trouble") and latest(client)["id"] == before
    visitor.fill(width=128)
    visitor.page.wait_for_selector("#price b")
    assert visitor.page.is_hidden("#trouble") and visitor.page.get_attribute("#width", "aria-invalid") is None


def test_a_server_that_is_gone_and_back(tmp_path, browser):
    server = Server(tmp_path / "data").start(600)
    visitor = Visitor(browser, server.url).ready()
    assert visitor.text("#price").startswith("free")
    server.kill()
    visitor.page.click("#draw")
    visitor.page.wait_for_selector("#trouble:not([hidden])")
    assert "does not answer" in visitor.text("#trouble")
    port = server.url.rpartition(":")[2]
    again = Server(tmp_path / "data", "--port", port)
    again.start(600)
    visitor.page.wait_for_selector("#health.ready")
    visitor.draw(prompt="a red cube", steps=2).drawn()
    visitor.close()
    again.kill()
