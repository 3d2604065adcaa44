"""A picture's file says how the picture was made, in every format, and nothing is half-written."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import IFD

from sfumato.checks import MAX_PROMPT
from sfumato.errors import InputError, SfumatoError
from sfumato.receipts import provenance
from sfumato.receipts.provenance import COMPOSITE_TYPE, SOURCE_TYPE, check_output, read_recipe, save_images
from sfumato.types import MAX_SEED, Request, Result, Variation

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".PNG"]


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None] * np.array([3, 2, 1]) + 20 * seed
    return Image.fromarray((ramp % 256).astype(np.uint8))


def result(request: Request) -> Result:
    recipe = {
        "request": request.to_dict(),
        "model": "tiny, v1",
        "weights": {"net": "0123"},
        "seconds": 0.5,
    }
    return Result(images=tuple(picture(k) for k in range(request.count)), recipe=recipe)


def request(**values) -> Request:
    return Request(
        **{"prompt": "a red cube", "steps": 8, "guidance": 4.5, "sampler": "dpmpp_2m", "size": (24, 16)}
        | values
    )


def parameters_of(path) -> str:
    with Image.open(path) as image:
        if image.format == "PNG":
            return image.info["parameters"]
        comment = image.getexif().get_ifd(IFD.Exif)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def xmp_of(path) -> str:
    with Image.open(path) as image:
        packet = image.info["xmp"]
    return packet.decode() if isinstance(packet, bytes) else packet


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_recipe_comes_back_and_the_source_is_marked(tmp_path, suffix):
    made = result(request(negative="blur, dark: night", seed=5, schedule="karras"))
    [file] = save_images(made, tmp_path / f"out{suffix}")
    recipe = read_recipe(file)
    assert Request.from_dict(recipe["request"]) == request(
        negative="blur, dark: night", seed=5, schedule="karras"
    )
    assert recipe["model"] == made.recipe["model"]
    assert SOURCE_TYPE in xmp_of(file)
    assert parameters_of(file).startswith(
        "a red cube\nNegative prompt: blur, dark: night\nSteps: 8, Sampler: DPM++ 2M,"
    )
    assert 'Model hash: 1be2e452b4, Model: "tiny, v1", Version: sfumato' in parameters_of(file)
    assert "CFG scale: 4.5, Seed: 5, Size: 24x16" in parameters_of(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_begun_with_another_is_marked_as_a_composite(tmp_path, suffix):
    made = result(request(image=picture(3), strength=0.5))
    [file] = save_images(made, tmp_path / f"out{suffix}")
    assert f"DigitalSourceType>{COMPOSITE_TYPE}<" in xmp_of(file)
    assert Request.from_dict(read_recipe(file)["request"], [picture(3)]) == made_request(made)
    assert "Denoising strength: 0.5" in parameters_of(file)


def made_request(made: Result) -> Request:
    return Request.from_dict(made.recipe["request"], [picture(3)])


def test_of_variations_the_second_seed_is_counted(tmp_path):
    wanted = request(count=3, seed=7, variation=Variation(MAX_SEED, 0.2))
    files = save_images(result(wanted), tmp_path / "out.png")
    found = [read_recipe(file)["request"] for file in files]
    assert [(r["seed"], r["variation"]["seed"], r["count"]) for r in found] == [
        (7, MAX_SEED, 1),
        (7, 0, 1),
        (7, 1, 1),
    ]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_pixels_survive_exactly(tmp_path, suffix):
    made = result(request())
    [file] = made.save(tmp_path / f"out{suffix}")
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(made.images[0]))


def test_jpeg_pixels_stay_close(tmp_path):
    made = result(request())
    [file] = made.save(tmp_path / "out.jpg")
    with Image.open(file) as image:
        difference = np.asarray(image, dtype=float) - np.asarray(made.images[0], dtype=float)
    assert np.sqrt((difference**2).mean()) < 6


def test_several_pictures_are_numbered_and_each_is_reproducible_alone(tmp_path):
    files = save_images(result(request(count=3, seed=MAX_SEED - 1)), tmp_path / "out.png")
    assert [file.name for file in files] == ["out-0.png", "out-1.png", "out-2.png"]
    requests = [read_recipe(file)["request"] for file in files]
    assert [r["seed"] for r in requests] == [MAX_SEED - 1, MAX_SEED, 0]
    assert [r["count"] for r in requests] == [1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_any_valid_prompt_comes_back(tmp_path, suffix, prompt):
    [file] = save_images(result(request(prompt=prompt)), tmp_path / f"out{suffix}")
    assert read_recipe(file)["request"]["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "👩‍👩‍👧",
        "كرة",
        "</sfumato:recipe><x>&amp;",
        "]]>",
        "<script>alert(1)</script>",
        "\ufffe\uffff",
        "a\r\n\x01\x7f\x85b",
        "<!DOCTYPE",
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_awkward_prompts_come_back(tmp_path, suffix, prompt):
    [file] = save_images(result(request(prompt=prompt, negative=prompt)), tmp_path / f"out{suffix}")
    assert read_recipe(file)["request"]["prompt"] == prompt


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("letter", ["x", "😀", "<"])
def test_the_longest_prompt_fits(tmp_path, suffix, letter):
    long = request(prompt=letter * MAX_PROMPT, negative=letter * MAX_PROMPT)
    [file] = save_images(result(long), tmp_path / f"out{suffix}")
    assert read_recipe(file)["request"]["prompt"] == long.prompt


def test_a_jpeg_that_cannot_carry_the_recipe_is_refused_before_any_work(tmp_path):
    long = request(prompt="é" * MAX_PROMPT)
    with pytest.raises(InputError, match="too long for a JPEG"):
        check_output(tmp_path / "out.jpg", 1, long)
    fits = request(prompt="x" * MAX_PROMPT)
    check_output(tmp_path / "out.jpg", 1, fits)
    [file] = save_images(result(fits), tmp_path / "out.jpg")
    assert read_recipe(file)["request"]["prompt"] == fits.prompt


def test_hostile_outputs_are_refused_by_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "taken-1.png").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        tmp_path / "out": "must end in",
        tmp_path / "out.gif": "must end in",
        tmp_path / "out.png.exe": "must end in",
        "": "must end in",
        ".png": "must end in",
        tmp_path: "must end in",
        tmp_path / "folder.png": "is a folder",
        tmp_path / "pipe.png": "not a file",
        tmp_path / "absent" / "out.png": "does not exist",
        tmp_path / "file" / "out.png": "is no folder",
        tmp_path / ("x" * 300 + ".png"): "cannot be written",
        f"{tmp_path}/a\0b.png": "no file name can have",
        f"{tmp_path}/a\ud800b.png": "no file name can have",
        "/proc/out.png": "cannot be written",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            check_output(path)
        assert caught.value.argument == "output"
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path / "taken.png", 2)
    check_output(tmp_path / "taken.png", 1)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png", "pipe.png", "taken-1.png"]


def test_a_folder_one_may_not_write_to_is_refused(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(InputError, match="cannot be written"):
        check_output(folder / "out.png")


def test_a_failure_in_the_last_picture_leaves_the_old_ones(tmp_path, monkeypatch):
    before = save_images(result(request(count=2)), tmp_path / "out.png")
    contents = [file.read_bytes() for file in before]
    real, calls = provenance._save, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(provenance, "_save", full)
    with pytest.raises(SfumatoError, match="No space left"):
        save_images(result(request(count=2, prompt="another")), tmp_path / "out.png")
    assert [file.read_bytes() for file in before] == contents
    assert sorted(os.listdir(tmp_path)) == ["out-0.png", "out-1.png"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(*chunks: bytes, side: int = 1) -> bytes:
    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(chunks)
        + chunk(b"IDAT", b"x")
        + chunk(b"IEND", b"")
    )


def test_files_without_a_usable_recipe_are_refused(tmp_path):
    picture().save(tmp_path / "plain.png")
    picture().save(tmp_path / "plain.jpg")
    picture().save(tmp_path / "gif.png", format="GIF")
    recipe = '<x xmlns:sfumato="urn:sfumato:recipe:1"><sfumato:recipe>&a;</sfumato:recipe></x>'
    entities = f'<!DOCTYPE x [<!ENTITY a "{{}}">]>{recipe}'
    picture().save(tmp_path / "entities.webp", xmp=entities.encode())
    picture().save(tmp_path / "broken.webp", xmp=b"<x>")
    hostile = {
        "empty.png": b"",
        "text.png": b"hello",
        "bomb.png": png(chunk(b"zTXt", b"sfumato\0\0" + zlib.compress(bytes(2**27)))),
        "huge.png": png(side=65_500),
        "damaged.png": png(chunk(b"tEXt", b"sfumato\0{")),
        "list.png": png(chunk(b"tEXt", b"sfumato\0[1]")),
        "deep.png": png(chunk(b"tEXt", b"sfumato\0" + b"[" * 100_000)),
    }
    for name, content in hostile.items():
        (tmp_path / name).write_bytes(content)
    for file in [*tmp_path.iterdir(), tmp_path / "absent.png", tmp_path]:
        with pytest.raises(InputError):
            read_recipe(file)
