"""A browser for tests of the page: Chromium, driven by Playwright, and somebody who uses the page in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import opened

# a browser that asks nobody but the page's server
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, PHONE = (1360, 860), (390, 844)
LONG = {"steps": 1000}
SHAPES = (("a red cube", 3), ("two yellow spheres", 5))  # prompts and seeds of a gallery
DRAWN = "#stage.succeeded .final:not(.loading)"
TRIES = 10
SECONDS = 180  # that anything may take, on a machine that is busy


def executable(own: str) -> str | None:
    """Where Chromium is: as CHROMIUM says, or Playwright's own, or the system's."""
    found = (os.environ.get("CHROMIUM"), own if Path(own).exists() else None, *map(shutil.which, NAMES))
    return next((path for path in found if path), None)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")
    with api.sync_playwright() as playwright:
        path = executable(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium, or set CHROMIUM")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """Somebody with the page open. What the page must never do is remembered in `faults`."""

    def __init__(self, browser: Any, url: str, *, size: tuple[int, int] = DESKTOP, **options: Any):
        self.url, self.faults = url, []
        width, height = size
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("console", self._said)
        self.page.on("request", self._asked)
        self.page.goto(url)

    def _said(self, message: Any) -> None:
        if "Content Security Policy" in message.text or "violates" in message.text:
            self.faults.append(f"policy: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.faults.append(f"elsewhere: {request.url}")

    def close(self) -> None:
        self.context.close()
        assert not self.faults, self.faults

    def ready(self) -> Visitor:
        """When it may be drawn."""
        self.page.wait_for_selector("#draw:enabled")
        return self

    def fill(self, **fields: object) -> Visitor:
        """Fields of the form by their ids."""
        if not self.page.is_visible("#steps"):
            self.page.click("#settings > summary")
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        return self

    def draw(self, **fields: object) -> Visitor:
        """Have it drawn, again where a busy server says to come back; if it is accepted, the stage then shows it."""
        self.fill(**fields)
        for _ in range(TRIES):
            with self.page.expect_response(self._is_submission) as found:
                self.page.click("#draw")
            if found.value.status != 503:
                break
            self.page.wait_for_timeout(2000)
        if found.value.ok:
            self.page.wait_for_selector(f"#stage[data-job={found.value.json()['id']}]")
        return self

    @staticmethod
    def _is_submission(answer: Any) -> bool:
        return answer.request.method == "POST" and answer.url.endswith(("/v1/jobs", "/v1/videos"))

    def drawn(self) -> Visitor:
        """When what the stage shows is there."""
        self.page.wait_for_selector(DRAWN)
        return self

    def press(self, name: str) -> None:
        """A button of the stage."""
        self.page.locator("#stage").get_by_role("button", name=name).click()

    def counts(self, selector: str, number: int) -> None:
        """When there are so many of them."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_count(number, timeout=1000 * SECONDS)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def recipe(self) -> dict[str, str]:
        """What stands beside the picture, when its bill is there."""
        self.page.wait_for_selector(".recipe :text('Took')")
        rows = self.page.locator(".recipe > div").all()
        return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def latest(client: Any) -> dict[str, Any]:
    """The newest job."""
    return client.get("/v1/jobs?limit=1").json()["data"][0]


def picture(client: Any, job: dict[str, Any], number: int = 0) -> np.ndarray:
    """A picture of a job, (H, W, 3)."""
    return np.asarray(opened(client.get(job["pictures"][number]).content)).astype(int)


def enter(visitor: Visitor, key: str) -> None:
    """Give a key to a page that asks for one."""
    visitor.page.wait_for_selector("#key-dialog[open]")
    visitor.page.fill("#key", key)
    visitor.page.get_by_role("button", name="Enter").click()


def violations(visitor: Visitor) -> dict[str, list[str]]:
    """What axe has against the page as it stands."""
    module = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no axe: pip install -e '.[dev]'"
    )
    found = module.Axe().run(visitor.page).response["violations"]
    return {each["id"]: [node["html"][:200] for node in each["nodes"]] for each in found}
