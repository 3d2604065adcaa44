"""The page in a real browser, in front of a real server."""

from __future__ import annotations

import re

import numpy as np
import pytest

import small_svd
from browsing import PHONE, Visitor, chromium
from serving import PRICES, PROMPT, Client, Server, opened
from sfumato.serve import keys
from small_python import small_python

pytestmark = pytest.mark.full  # servers of their own, and a browser

LONG = {"steps": 1000}
SHAPES = (("a red cube", 3), ("two yellow spheres", 5))


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    (place / "prices.toml").write_text(PRICES)
    running = Server(place / "data", "--prices", str(place / "prices.toml"), "--deadline", "3600")
    yield running.start(600)
    running.kill()


@pytest.fixture(scope="module")
def client(server):
    return Client(server)


@pytest.fixture
def visitor(server, browser):
    """Somebody who has just come, to a gallery with two pictures at least."""
    found = Visitor(browser, server.url)
    yield found.ready()
    found.close()


@pytest.fixture(scope="module", autouse=True)
def gallery(client):
    """Two pictures, as somebody drew them before."""
    return [client.wait(client.submit({"prompt": text, "seed": seed})["id"]) for text, seed in SHAPES]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with keys, and its keys by name."""
    place = tmp_path_factory.mktemp("keys")
    (place / "prices.toml").write_text(PRICES)
    file = place / "keys.json"
    found = {
        name: keys.add(file, name, **more)[0]
        for name, more in {"a": {}, "b": {}, "poor": {"budget": 3_000}}.items()
    }
    running = Server(place / "data", "--keys", str(file), "--prices", str(place / "prices.toml"))
    yield running.start(600), found
    running.kill()


def latest(client):
    return client.get("/v1/jobs?limit=1").json()["data"][0]


def picture(client, job, number=0):
    return np.asarray(opened(client.get(job["pictures"][number]).content)).astype(int)


# --- drawing ---------------------------------------------------------------------------------------------------------


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


# --- the gallery -----------------------------------------------------------------------------------------------------


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


# --- pictures to begin with ------------------------------------------------------------------------------------------


def test_a_mask_is_painted_and_the_rest_stays_byte_for_byte(visitor, client, gallery):
    page = visitor.page
    page.get_by_role("button", name=SHAPES[0][0], exact=True).last.click()
    visitor.drawn()
    visitor.press("Paint over")
    page.wait_for_selector("#mask-dialog[open]")
    box = page.locator("#sheet canvas").bounding_box()
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + side * 0.2, y + side * 0.7)
    page.mouse.down()
    page.mouse.move(x + side * 0.6, y + side * 0.7, steps=6)
    page.mouse.up()
    page.mouse.move(x + side * 0.1, y + side * 0.1)
    page.mouse.down()
    page.mouse.up()
    page.click("#mask-undo")  # the dot, and not the line
    page.click("#mask-done")
    page.wait_for_selector("#mask-dialog", state="hidden")
    visitor.draw(prompt="a large blue cube", seed=4).drawn()
    job = latest(client)
    mask = np.asarray(opened(client.get(f"/v1/files/{job['request']['mask']}").content))[..., 0]
    assert set(np.unique(mask)) == {0, 255} and mask[90, 50] == 255 and mask[13, 13] == 0
    before, after = picture(client, gallery[0]), picture(client, job)
    assert (before[mask == 0] == after[mask == 0]).all()
    assert np.abs(before[mask == 255] - after[mask == 255]).mean() > 1


def test_a_mask_is_painted_with_the_keyboard_alone(visitor, client):
    page = visitor.page
    visitor.drawn()
    visitor.press("Paint over")
    page.wait_for_selector("#mask-dialog[open]")
    page.keyboard.down("Space")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    page.keyboard.press("e")
    assert page.is_checked("[name=tool][value=erase]")
    page.click("#mask-invert")
    page.click("#mask-done")
    page.wait_for_selector("#mask-dialog", state="hidden")
    visitor.draw(prompt="a cone", seed=4, steps=2).drawn()
    mask = np.asarray(opened(client.get(f"/v1/files/{latest(client)['request']['mask']}").content))[..., 0]
    assert mask[64, 64] == 0 and mask[64, 80] == 0 and mask[10, 10] == 255


def test_a_file_of_another_shape_begins_a_picture(visitor, client, tmp_path):
    from PIL import Image

    file = tmp_path / "start.png"
    Image.new("RGB", (200, 150), (30, 90, 160)).save(file)
    visitor.page.set_input_files("#start input[type=file]", str(file))
    visitor.page.wait_for_selector("#start .slot-frame")
    visitor.draw(prompt="a blue cube", steps=4, seed=1).drawn()
    request = latest(client)["request"]
    assert request["size"] == [208, 144] and request["fit"] == "cover" and request["strength"] == 0.75
    visitor.page.get_by_role("button", name="Remove the picture").click()
    visitor.draw(steps=2).drawn()
    assert "image" not in latest(client)["request"]


def test_what_is_no_picture_is_said(visitor, tmp_path):
    file = tmp_path / "start.png"
    file.write_bytes(b"hello")
    visitor.page.set_input_files("#start input[type=file]", str(file))
    visitor.page.wait_for_selector("#start .trouble-line:has-text('no picture')")


def test_a_control_picture_is_followed(visitor, client, gallery):
    data = client.get(gallery[0]["pictures"][0]).content
    files = [{"name": "edges.png", "mimeType": "image/png", "buffer": data}]
    visitor.page.set_input_files("[aria-label='A picture of kind edge'] input[type=file]", files)
    visitor.page.wait_for_selector("#controls .slot-frame")
    visitor.draw(prompt="a blue cube", steps=4, seed=1).drawn()
    (control,) = latest(client)["request"]["controls"]
    assert control["name"] == "edge" and control["weight"] == 1
    assert visitor.recipe()["Follows"] == "edge 1"


# --- clips ------------------------------------------------------------------------------------------------------------


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
    assert visitor.page.locator(".tile video").count() == 1 and violations(visitor) == {}
    visitor.press("Make again")
    visitor.page.wait_for_selector("#stage:not(.succeeded)")
    visitor.drawn()
    again = latest(client)
    assert again["id"] != job["id"] and again["request"] == {**job["request"], "count": 1}
    visitor.press("Use this frame")
    visitor.page.wait_for_selector("#start .slot-full:has-text('56 × 56')")
    visitor.close()


def test_without_a_model_of_clips_nothing_is_animated(visitor):
    visitor.drawn()
    assert visitor.page.get_by_role("button", name="Animate").count() == 0
    assert visitor.page.is_hidden("#kinds")


# --- before it is paid, and what goes wrong ---------------------------------------------------------------------------


def test_what_will_not_survive_is_said_beside_the_button(visitor):
    visitor.fill(prompt='a poster with the words "Grand opening of the new library"')
    note = visitor.page.locator("#preflight .note")
    note.wait_for()
    assert "will be lost" in note.inner_text()
    note.locator("summary").click()
    assert "ask for fewer words" in note.inner_text().lower()
    visitor.fill(prompt="a red cube")
    note.wait_for(state="detached")


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


# --- keys ------------------------------------------------------------------------------------------------------------


def enter(visitor, key):
    visitor.page.wait_for_selector("#key-dialog[open]")
    visitor.page.fill("#key", key)
    visitor.page.get_by_role("button", name="Enter").click()


def test_two_tenants_do_not_see_each_other_s_pictures(guarded, browser):
    server, ring = guarded
    a, b = Visitor(browser, server.url), Visitor(browser, server.url)
    enter(a, "sfk_wrong")
    a.page.wait_for_selector("#key-trouble:has-text('not in use')")
    enter(a, ring["a"])
    a.ready().draw(prompt="a red cube", seed=1, steps=4).drawn()
    assert a.page.locator(".tile").count() == 1
    assert a.page.locator(".final").get_attribute("src").startswith("blob:")
    enter(b, ring["b"])
    b.ready()
    assert b.page.locator(".tile").count() == 0 and "Nothing drawn yet" in b.text("#stage")
    path = Client(server, ring["a"]).get("/v1/jobs").json()["data"][0]["pictures"][0]
    status = "async ([path, key]) => (await fetch(path, {headers: {authorization: `Bearer ${key}`}})).status"
    assert (
        b.page.evaluate(status, [path, ring["b"]]) == 404
        and b.page.evaluate(status, [path, ring["a"]]) == 200
    )
    a.page.reload()
    a.ready().drawn()
    a.page.click("#account")
    a.page.wait_for_selector("#account-dialog[open]")
    assert re.search(r"1 picture\s+\$0\.00", a.text("#account-body"))
    a.page.click("#leave")
    enter(a, ring["b"])
    a.ready()
    assert a.page.locator(".tile").count() == 0
    a.close()
    b.close()


def test_a_budget_that_is_used_up_is_said(guarded, browser):
    server, ring = guarded
    poor = Visitor(browser, server.url)
    enter(poor, ring["poor"])
    poor.ready().draw(prompt="a red cube", steps=40)
    poor.page.wait_for_selector("#trouble:not([hidden])")
    assert "Not enough money left this month" in poor.text("#trouble") and "0.003 USD left" in poor.text(
        "#trouble"
    )
    poor.close()


# --- everybody -------------------------------------------------------------------------------------------------------


def violations(visitor):
    """What axe has against the page as it stands."""
    module = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe: pip install -e '.[dev]'"
    )
    found = module.Axe().run(visitor.page).response["violations"]
    return {each["id"]: [node["html"][:200] for node in each["nodes"]] for each in found}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(server, guarded, browser, scheme):
    stranger = Visitor(browser, guarded[0].url, color_scheme=scheme, reduced_motion="reduce")
    stranger.page.wait_for_selector("#key-dialog[open]")
    assert violations(stranger) == {}
    enter(stranger, guarded[1]["poor"])
    stranger.ready()
    assert "Nothing drawn yet" in stranger.text("#stage") and violations(stranger) == {}
    stranger.close()
    visitor = Visitor(browser, server.url, color_scheme=scheme, reduced_motion="reduce").ready().drawn()
    visitor.recipe()
    assert violations(visitor) == {}
    visitor.draw(prompt="a red cube", **LONG)
    visitor.page.wait_for_selector("#stage.running .preview:not([hidden])")
    assert violations(visitor) == {}
    visitor.press("Cancel")
    visitor.page.wait_for_selector("#stage.cancelled")
    assert violations(visitor) == {}
    visitor.fill(prompt='the words "Grand opening of the new library"', width=130, count=1, steps=20)
    visitor.page.wait_for_selector("#price .cannot")
    visitor.page.click("#draw")
    visitor.page.wait_for_selector("#trouble:not([hidden])")
    assert violations(visitor) == {}
    visitor.fill(width=128)
    visitor.page.wait_for_selector("#preflight .note")
    visitor.page.locator(".tile").first.click()
    visitor.drawn()
    visitor.press("Paint over")
    visitor.page.wait_for_selector("#mask-dialog[open]")
    assert violations(visitor) == {}
    visitor.close()


def test_it_is_used_with_the_keyboard_alone(visitor, client):
    page = visitor.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert (
        page.evaluate("document.activeElement.id") == "prompt" or page.evaluate("location.hash") == "#prompt"
    )
    page.focus("#prompt")
    page.keyboard.type("a green cone")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stage.running, #stage.queued")
    visitor.drawn()
    assert latest(client)["request"]["prompt"] == "a green cone"
    page.locator(".tile").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tiles li:nth-child(2) [aria-current=true]")


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_it_without_scrolling_sideways(server, browser, width):
    visitor = (
        Visitor(browser, server.url, size=(width, PHONE[1]), has_touch=True, is_mobile=True).ready().drawn()
    )
    page = visitor.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#draw").bounding_box()["y"] < PHONE[1], "the button stays in reach"
    page.tap("#settings > summary")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    visitor.draw(prompt="a red cube", steps=4).drawn()
    assert page.locator("#stage .final").bounding_box()["y"] < PHONE[1], "what is drawn comes into view"
    small = page.evaluate(
        """[...document.querySelectorAll('button')].filter((b) => b.offsetParent && b.offsetHeight < 36)
            .map((b) => b.outerHTML.slice(0, 80))"""
    )
    assert not small
    visitor.close()


def test_colours_are_chosen_and_kept(visitor):
    page = visitor.page
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    page.click("#theme")
    assert "dark" in page.get_attribute("#theme", "aria-label")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
