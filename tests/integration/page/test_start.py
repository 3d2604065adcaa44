"""Pictures to begin with and to follow: files, masks, controls; and LoRAs."""

from __future__ import annotations

import numpy as np
import pytest

from browsing import SHAPES, latest, picture
from serving import opened

pytestmark = pytest.mark.full  # a server and a browser


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
