"""Folders of pictures as the tests of `data` make, read and see them refused."""

import pytest
from PIL import Image

from sfumato.data.folder import FolderSource
from sfumato.errors import DataError


def picture(colour=(200, 30, 40), size=(32, 32)):
    return Image.new("RGB", size, colour)


def put(folder, name, caption=None, colour=(200, 30, 40), size=(32, 32), extension=".txt"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG")
    picture(colour, size).save(path, kind)
    if caption is not None:
        path.with_suffix(extension).write_text(caption, encoding="utf-8")
    return path


def fill(folder, count=4, **options):
    for number in range(count):
        put(folder, f"p{number:03d}.png", f"picture {number}", colour=(number, 0, 9), **options)
    return folder


def read(folder, size=32, **options):
    return FolderSource(folder, size, multiple=8, **options)


def refusal(folder, **options):
    with pytest.raises(DataError) as error:
        read(folder, **options)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def reasons(source):
    return {p.path: p.reason for p in source.problems}
