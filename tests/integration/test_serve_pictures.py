"""Pictures as they come from cameras and programs: what the server draws from them is what the library does."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from helpers import noise
from serving import PROMPT, Client, opened, png, same
from sfumato import Request
from sfumato.pictures import decode

pytestmark = pytest.mark.full  # a server of its own

WIDTH, HEIGHT = 96, 64
PICTURE = noise(WIDTH, HEIGHT)
ORIENTATION = 0x0112


def saved(picture: Image.Image, format: str, **more) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **more)
    return stream.getvalue()


def deep() -> bytes:
    """Sixteen bits of grey."""
    ramp = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    return png(Image.fromarray(ramp))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(PICTURE, "JPEG", exif=exif, quality=95)


def profiled() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return saved(PICTURE, "PNG", icc_profile=profile)


# name → (bytes, what they are said to be, format, size upright)
ODD = {
    "sixteen bits": (deep(), "image/png", "png", (WIDTH, HEIGHT)),
    "CMYK": (saved(PICTURE.convert("CMYK"), "JPEG", quality=95), "image/jpeg", "jpeg", (WIDTH, HEIGHT)),
    "turned": (turned(6), "image/jpeg", "jpeg", (HEIGHT, WIDTH)),
    "upside down": (turned(3), "image/jpeg", "jpeg", (WIDTH, HEIGHT)),
    "a colour profile": (profiled(), "image/png", "png", (WIDTH, HEIGHT)),
    "a palette with a clear colour": (
        saved(PICTURE.quantize(16), "PNG", transparency=3), "image/png", "png", (WIDTH, HEIGHT)
    ),
    "10,000 by 1": (png(noise(10_000, 1)), "image/png", "png", (10_000, 1)),
    "another name than it is": (saved(PICTURE, "WEBP", lossless=True), "image/png", "webp", (WIDTH, HEIGHT)),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_drawn_from_as_the_library_draws_from_them(a: Client, pocket, name):
    data, kind, format, size = ODD[name]
    answer = a("POST", "/v1/files", data=data, headers={"content-type": kind})
    assert answer.status_code == 201, answer.text
    told = answer.json()
    assert (told["format"], told["width"], told["height"], told["bytes"]) == (format, *size, len(data))
    kept = a.get(f"/v1/files/{told['id']}")
    assert kept.content == data and kept.headers["content-type"] == f"image/{format}"
    wish = {"seed": 3, "steps": 2, "strength": 0.5, "size": (64, 64), "fit": "cover"}
    job = a.wait(a.submit({**wish, "image": told["id"]})["id"])
    assert job["state"] == "succeeded", job["error"]
    drawn = opened(a.get(job["pictures"][0]).content)
    local = pocket.generate(Request(PROMPT, image=decode(data), **wish)).images[0]
    assert same(drawn, local)


@pytest.mark.parametrize("name", ["turned", "CMYK", "sixteen bits", "10,000 by 1"])
def test_odd_pictures_come_in_by_every_door(a: Client, name):
    data = ODD[name][0]
    form = {"image": ("a.png", data), "prompt": (None, PROMPT), "steps": (None, "2"), "size": (None, "64x64")}
    answer = a("POST", "/v1/images/edits", files=form)
    assert answer.status_code == 200, answer.text
    assert opened(base64.b64decode(answer.json()["data"][0]["b64_json"])).size == (64, 64)
    body = {
        "init_images": [base64.b64encode(data).decode()],
        "steps": 2,
        "width": 64,
        "height": 64,
        "prompt": PROMPT,
    }
    answer = a.post("/sdapi/v1/img2img", body)
    assert answer.status_code == 200, answer.text
    assert opened(base64.b64decode(answer.json()["images"][0])).size == (64, 64)
