"""For everybody: with keys, with the keyboard alone, on a phone, read aloud, in light and dark."""

from __future__ import annotations

import re

import pytest

from browsing import LONG, PHONE, Visitor, enter, latest, violations
from serving import Client

pytestmark = pytest.mark.full  # a server and a browser


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(server, gallery, guarded, browser, scheme):
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
def test_a_phone_shows_it_without_scrolling_sideways(server, gallery, browser, width):
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


def test_a_picture_is_shown_large_with_the_keyboard(visitor):
    page = visitor.drawn().page
    page.locator("#stage .enlarge").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#light[open] img")
    assert (
        page.locator("#light img").bounding_box()["height"]
        > page.locator("#stage .final").bounding_box()["height"]
    )
    page.keyboard.press("Escape")
    page.wait_for_selector("#light", state="hidden")
    assert page.evaluate("document.activeElement.className") == "enlarge"
    page.keyboard.press("Space")
    page.wait_for_selector("#light[open]")
    page.keyboard.press("Enter")  # on the button that closes it
    page.wait_for_selector("#light", state="hidden")


FOUR = "a map, a menu, a mosaic, a barcode"  # of which each has a note


@pytest.mark.parametrize(("width", "height"), [(1360, 700), (1360, 400), (320, 568), (568, 320)])
def test_whatever_is_noted_the_button_stays_in_sight(server, gallery, browser, width, height):
    visitor = Visitor(browser, server.url, size=(width, height)).ready()
    page = visitor.page
    visitor.fill(prompt=FOUR, steps=4)
    visitor.counts("#preflight .note", 4)

    def seen() -> None:
        bar, draw = (page.locator(name).bounding_box() for name in ("#act", "#draw"))
        assert draw["y"] >= 0 and draw["y"] + draw["height"] <= height, "the button is out of sight"
        assert bar["height"] <= (0.72 if width > 760 else 0.5 if height < 400 else 0.4) * height
        assert page.evaluate("document.documentElement.scrollWidth") == width

    seen()
    for note in page.locator("#preflight .note summary").all():
        note.click()
    seen()
    last = page.locator("#preflight .note").last
    last.scroll_into_view_if_needed()
    notes, shown = page.locator("#preflight").bounding_box(), last.bounding_box()
    assert shown["y"] < notes["y"] + notes["height"], "the last note cannot be reached"
    visitor.fill(width=130)
    page.wait_for_selector("#price .cannot")
    seen()
    page.click("#draw")
    page.wait_for_selector("#trouble:not([hidden])")
    seen()
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    if width <= 760:
        end = page.locator("#main").evaluate("(n) => n.lastElementChild.getBoundingClientRect().bottom")
        assert end <= page.locator("#act").bounding_box()["y"], "the page's end is under the bar"
    visitor.close()


def test_escape_does_not_lose_the_way_in(guarded, browser):
    server, ring = guarded
    stranger = Visitor(browser, server.url)
    stranger.page.wait_for_selector("#key-dialog[open]")
    for _ in range(5):
        stranger.page.keyboard.press("Escape")
    enter(stranger, ring["poor"])
    stranger.ready()
    stranger.close()
