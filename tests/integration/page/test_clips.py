"""A picture that is set in motion, in the page."""

from __future__ import annotations

import pytest

import small_svd
from browsing import Visitor, latest, violations
from serving import Client, Server
from small_python import small_python

pytestmark = pytest.mark.full  # a server and a browser


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A server with pocket and a small model that sets pictures in motion."""
    place = tmp_path_factory.mktemp("moving")
    source = small_svd.write("svd", place / "moves", frames=6)
    (place / "models.toml").write_text(
        '[[model]]\nname = "pocket"\nsource = "pocket"\n'
        f'[[model]]\nname = "moves"\nsource = "{source}"\ndtype = "fp32"\n'
    )
    running = Server(
        place / "data", "--models", str(place / "models.toml"), "--memory", "1GB", python=small_python(place)
    )
    yield running.start(600)
    running.kill()


def test_a_picture_is_animated_and_plays(moving, browser):
    visitor, client = Visitor(browser, moving.url).ready(), Client(moving)
    visitor.draw(prompt="a red cube", seed=1, steps=4).drawn()
    visitor.page.select_option("#model", "moves")
    visitor.press("Animate")
    visitor.page.wait_for_selector("#start .slot-frame")
    assert visitor.page.input_value("#model") == "moves" and visitor.text("#draw") == "Animate"
    assert visitor.page.is_hidden("#prompt"), "this model reads none"
    visitor.draw(frames=4, steps=2).drawn()
    job = latest(client)
    assert job["object"] == "video" and job["request"]["frames"] == 4 and "image" in job["request"]
    clip = visitor.page.locator("video.final")
    assert clip.evaluate("(v) => [v.paused, v.loop, v.error]") == [False, True, None]
    clip.evaluate("(v) => new Promise((done) => v.addEventListener('timeupdate', done))")
    assert clip.evaluate("(v) => v.duration") == pytest.approx(4 / job["request"]["fps"], abs=0.05)
    tile = visitor.page.locator(".tile:has(.badge)")
    assert tile.count() == 1 and tile.locator("video").count() == 0 and violations(visitor) == {}
    tile.hover()
    moving_tile = tile.locator("video")
    moving_tile.evaluate("(v) => new Promise((done) => v.addEventListener('timeupdate', done))")
    visitor.page.mouse.move(5, 5)
    visitor.counts(".tile video", 0)
    visitor.press("Make again")
    visitor.page.wait_for_selector("#stage:not(.succeeded)")
    visitor.drawn()
    again = latest(client)
    assert again["id"] != job["id"] and again["request"] == {**job["request"], "count": 1}
    visitor.press("Use this frame")
    visitor.page.wait_for_selector("#start .slot-full:has-text('56 × 56')")
    visitor.close()


def test_pocket_sets_its_own_picture_in_motion(visitor, client):
    visitor.draw(prompt="a red cube", seed=1, steps=4).drawn()
    visitor.press("Animate")
    visitor.page.wait_for_selector("#start .slot-frame")
    facts = client.get("/v1/models/pocket").json()
    assert visitor.page.input_value("#frames") == str(facts["clip_preset"]["frames"])
    visitor.page.wait_for_selector("#price b")  # it can be drawn as it stands
    aside = visitor.page.locator("#preflight .aside")
    aside.wait_for()
    assert "what is lost in motion is not foretold" in aside.inner_text()
    asked = []
    visitor.page.on("request", lambda request: asked.append(request.url))
    visitor.fill(prompt='a red cube with the words "Grand opening of the new library"')
    visitor.page.locator("#preflight .note").first.wait_for()
    assert any(url.endswith("/v1/videos/preflight") for url in asked)
    visitor.fill(prompt="a red cube")
    visitor.draw(frames=5, steps=2).drawn()
    job = latest(client)
    assert job["object"] == "video" and job["expected"]["frames"] == 5
    clip = visitor.page.locator("video.final")
    clip.evaluate("(v) => new Promise((done) => v.addEventListener('timeupdate', done))")


def test_without_a_model_of_clips_nothing_is_animated(visitor):
    def without(route):
        models = route.fetch().json()
        route.fulfill(json={**models, "data": [{**facts, "clips": False} for facts in models["data"]]})

    visitor.page.route("**/v1/models", without)
    visitor.page.reload()
    visitor.ready().page.locator(".tile:not(:has(.badge))").first.click()
    visitor.drawn()
    assert visitor.page.get_by_role("button", name="Animate").count() == 0
    assert visitor.page.is_hidden("#kinds")
