"""The pictures of the page in the README, taken of the page itself: `python docs/page_pictures.py`, with Chromium."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browsing import DESKTOP, PHONE, Visitor, chromium  # noqa: E402
from serving import Client, Server  # noqa: E402

FOLDER = ROOT / "docs" / "pictures"
PRICES = "[[rule]]\npicture = 0.0005\nmegapixel_step = 0.0004\n"
DRAWN = [  # prompts with seeds, the last one first in the gallery
    ("a small gray metal torus", 3), ("two yellow spheres", 3), ("a large green rubber cylinder", 7),
    ("a blue cone behind a red ring", 1), ("a purple metal capsule", 6), ("a cyan cube left of an orange sphere", 4),
    ("a large brown rubber sphere", 8), ("a pink cone", 2), ("a green cube behind a yellow cylinder", 5),
    ("a red metal sphere behind a small blue cube", 7),
]  # fmt: skip
MOST = 300_000  # bytes of a picture


def main() -> None:
    """Start a server, draw, and take the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "prices.toml").write_text(PRICES)
        server = Server(Path(folder) / "data", "--prices", str(Path(folder) / "prices.toml")).start(600)
        try:
            with chromium() as browser:
                take(browser, server)
        finally:
            server.kill()


def take(browser, server: Server) -> None:
    client = Client(server)
    for prompt, seed in DRAWN:
        client.wait(client.submit({"prompt": prompt, "seed": seed, "steps": 20})["id"], 600)

    light = Visitor(browser, server.url, size=DESKTOP, color_scheme="light").ready().drawn()
    light.fill(prompt='a poster with the words "Grand opening of the new library"')
    light.page.wait_for_selector("#preflight .note")
    light.recipe()
    keep(light, "page-light")
    light.press("Paint over")
    box = light.page.locator("#sheet canvas").bounding_box()
    mouse = light.page.mouse
    mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.62)
    mouse.down()
    for across, down in ((0.3, 0.5), (0.42, 0.62), (0.3, 0.74), (0.22, 0.64)):
        mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down, steps=4)
    mouse.up()
    keep(light, "page-mask")
    light.close()

    phone = Visitor(
        browser, server.url, size=PHONE, color_scheme="light", device_scale_factor=1.5, is_mobile=True
    )
    phone.ready().drawn().page.fill("#prompt", "a red metal sphere behind a small blue cube")
    phone.page.mouse.wheel(0, 260)
    phone.page.wait_for_timeout(500)
    keep(phone, "page-phone")
    phone.close()

    dark = Visitor(browser, server.url, size=DESKTOP, color_scheme="dark").ready()
    for prompt, seed in (("three orange cubes", 5), ("a red metal sphere behind a small blue cube", 12)):
        dark.draw(prompt=prompt, seed=seed, steps=400)
    dark.page.wait_for_selector("#queue-list li:nth-child(2) img:not([hidden])")
    dark.page.wait_for_selector("#stage.running .preview:not([hidden])")
    keep(dark, "page-dark")
    dark.page.click("#cancel-all")
    dark.page.wait_for_selector("#queue", state="hidden")
    dark.close()


def keep(visitor: Visitor, name: str) -> None:
    """Write what is seen, small enough for a README."""
    picture = Image.open(io.BytesIO(visitor.page.screenshot())).convert("RGB")
    path = FOLDER / f"{name}.png"
    picture.save(path, optimize=True)
    if path.stat().st_size > MOST:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.relative_to(ROOT), path.stat().st_size)  # noqa: T201


if __name__ == "__main__":
    main()
