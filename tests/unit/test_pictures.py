"""Safe decoding: what the three formats become, and that hostile bytes end in one sentence."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sfumato import pictures
from sfumato.errors import DataError, InputError
from sfumato.pictures import (
    binary,
    decode,
    decode_mask,
    fingerprint,
    flatten,
    from_array,
    read_file,
    read_header,
    sniff,
    texts,
    user_comment,
)


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, colour, rows, *extra):
    """A PNG written by hand, so that nothing of the decoder under test made it."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + b"".join(extra)
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def quarters():
    """A 6×4 picture whose four quarters differ, so that any turn shows."""
    array = np.zeros((4, 6, 3), np.uint8)
    array[:2, :3], array[:2, 3:], array[2:, :3], array[2:, 3:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
    )
    return Image.fromarray(array)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 200
    return text


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(quarters(), kind, **options)), quarters())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "lossless": True}])
def test_header_agrees_with_the_decoder(kind, options):
    data = encoded(Image.new("RGB", (37, 53), "teal"), kind, **options)
    header = read_header(data)
    assert (header.format, header.width, header.height) == (kind.lower(), 37, 53)
    assert decode(data).size == (37, 53)


def test_webp_with_alpha_has_an_extended_header():
    data = encoded(Image.new("RGBA", (37, 53), (0, 0, 0, 0)), "WEBP")
    assert (read_header(data).width, read_header(data).height) == (37, 53)
    assert np.asarray(decode(data)).min() == 255


def test_transparency_is_laid_on_white():
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8), "RGBA")
    assert np.asarray(decode(encoded(rgba))).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert np.asarray(decode(encoded(grey))).tolist() == [[[10] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert np.asarray(decode(encoded(palette, transparency=1))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = [0, 257 * 128, 65535, 300]
    data = png(4, 1, 16, 0, [struct.pack(">4H", *values)])
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 128, 255, 1]


def test_sixteen_bit_grey_with_a_transparent_value():
    data = png(2, 1, 16, 0, [struct.pack(">2H", 1000, 257 * 9)], chunk(b"tRNS", struct.pack(">H", 1000)))
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 9]


def test_sixteen_bit_colour():
    data = png(2, 1, 16, 2, [struct.pack(">6H", 257 * 10, 257 * 20, 257 * 30, 65535, 0, 257)])
    assert np.asarray(decode(data)).tolist() == [[[10, 20, 30], [255, 0, 1]]]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_fill_the_range(depth):
    data = png(2, 1, depth, 0, [bytes([((1 << depth) - 1) << (8 - depth)])])
    assert np.asarray(decode(data))[0, :, 0].tolist() == [255, 0]


def test_cmyk_jpeg_is_converted():
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow in full: red
    red = np.asarray(decode(encoded(inks, "JPEG", quality=100)))
    assert np.abs(red.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied_once(kind, value):
    """Each orientation is undone: a picture stored turned comes out as it was meant."""
    back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[value]
    upright = np.asarray(quarters().resize((48, 32), Image.Resampling.NEAREST))
    exif = Image.Exif()
    exif[0x0112] = value
    stored = Image.fromarray(np.ascontiguousarray(back(upright)))
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    result = np.asarray(decode(encoded(stored, kind, exif=exif, **options)))
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).max() <= 8


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_a_senseless_orientation_changes_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(decode(encoded(quarters(), exif=exif)), quarters())


def test_broken_exif_and_profile_do_no_harm():
    data = encoded(quarters(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", icc_profile=b"not a profile" * 9)
    assert np.array_equal(decode(data), quarters())
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(encoded(quarters(), icc_profile=whole[: len(whole) // 2])), quarters())


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_a_moving_picture_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_cut_is_refused_in_a_sentence(kind):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    data = encoded(picture, kind)
    for length in range(0, len(data) - 12, max(1, len(data) // 60)):
        with pytest.raises(DataError) as error:
            decode(data[:length], "a.png")
        assert one_sentence(error).startswith("a.png ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_random_damage_is_a_picture_or_a_data_error(kind):
    generator = np.random.default_rng(1)
    data = encoded(quarters().resize((32, 32)), kind)
    for _ in range(300):
        bad = bytearray(data)
        for place in generator.integers(0, len(bad), generator.integers(1, 6)):
            bad[place] = generator.integers(0, 256)
        try:
            picture = decode(bytes(bad))
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert picture.mode == "RGB"


def test_a_wrong_checksum_is_found():
    data = bytearray(encoded(quarters()))
    data[data.index(b"IDAT") + 6] ^= 1
    with pytest.raises(DataError, match="checksum of its 'IDAT' chunk is wrong"):
        decode(bytes(data))


@pytest.mark.parametrize("size", [(65_500, 65_500), (2**31 - 1, 2**31 - 1), (100_000, 1), (0, 5)])
def test_a_bomb_is_refused_by_its_header_alone(size, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("a decoder saw the bomb"))
    with pytest.raises(DataError) as error:
        decode(png(*size, 8, 2, [b"\0"]), "bomb.png")
    assert f"{size[0]}×{size[1]}" in one_sentence(error)


def test_jpeg_and_webp_bombs_too(monkeypatch):
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    webp = bytearray(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 9)), "WEBP"))
    webp[24:30] = b"\xff\xff\xff" * 2
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("a decoder saw the bomb"))
    for data in (bytes(jpeg), bytes(webp)):
        with pytest.raises(DataError, match="are decoded"):
            decode(data)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_bomb_is_refused(kind):
    bomb = zlib.compress(bytes(64 * 2**20), 9)
    body = {b"zTXt": b"Comment\0\0", b"iCCP": b"profile\0\0", b"iTXt": b"Comment\0\1\0en\0x\0"}[kind] + bomb
    with pytest.raises(DataError, match=f"{kind.decode()} chunk that unfolds"):
        decode(png(1, 1, 8, 2, [b"\1\2\3"], chunk(kind, body)))


def test_ordinary_text_is_no_hindrance():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a red <script>alert(1)</script> cube", zip=True)
    info.add_itxt("note", "für Ärzte", zip=True)
    assert np.array_equal(decode(encoded(quarters(), pnginfo=info)), quarters())


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"", "an empty file"),
        (bytes(40), "filled with zero bytes"),
        (b"GIF89a" + bytes(9), "a GIF"),
        (b"8BPS" + bytes(9), "a Photoshop file"),
        (b"%!PS-Adobe", "a PostScript file"),
        (b"SIMPLE  =    T", "a FITS file"),
        (b"II*\0aaaa", "a TIFF"),
        (b"\0\0\0\x18ftypheic", "a HEIC"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"\0\0\0\x18ftypavif", "an AVIF"),
        (b"<svg xmlns=", "an SVG"),
        (b"\x80\x04\x95cos\nsystem", "not a picture"),
    ],
)
def test_other_content_is_named(start, words):
    assert sniff(start) is None
    with pytest.raises(DataError) as error:
        decode(start, "x.png")
    assert one_sentence(error) == f"x.png is {words}; PNG, JPEG and WebP are read"


def test_too_many_bytes(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 50)
    with pytest.raises(DataError, match="at most 50 are read"):
        decode(encoded(quarters()))


# --- masks, arrays, fingerprints -----------------------------------------------------------------------------------


def test_a_mask_is_white_from_half_of_white_on():
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    for mask in (grey, grey.convert("RGB"), grey.convert("RGBA")):
        assert np.asarray(binary(mask)).tolist() == [[0, 0, 255, 255]]
        assert np.asarray(decode_mask(encoded(mask))).tolist() == [[0, 0, 255, 255]]
        assert binary(binary(mask)).tobytes() == binary(mask).tobytes()
    wide = png(4, 1, 16, 0, [struct.pack(">4H", 0, 257 * 127, 257 * 128, 65535)])
    assert np.asarray(decode_mask(wide)).tolist() == [[0, 0, 255, 255]]


def test_what_is_transparent_in_a_mask_was_not_painted():
    strokes = Image.new("RGBA", (3, 1), (255, 255, 255, 0))
    strokes.putpixel((1, 0), (255, 255, 255, 255))
    assert np.asarray(decode_mask(encoded(strokes))).tolist() == [[0, 255, 0]]


def test_a_mask_is_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = Image.new("L", (4, 2), 0)
    mask.putpixel((0, 0), 255)
    turned = decode_mask(encoded(mask, exif=exif))
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == 255


def test_flattening_twice_changes_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(quarters(), exif=exif)))
    once = flatten(opened)
    assert once.size == (4, 6) and once.info == {}
    assert flatten(once).tobytes() == once.tobytes()
    assert opened.size == (6, 4)  # and the caller's picture is left as it was


def test_a_lazily_opened_picture_that_breaks_off():
    data = encoded(Image.effect_noise((64, 64), 50))
    with pytest.raises(DataError, match="image cannot be read as a picture"):
        flatten(Image.open(io.BytesIO(data[: len(data) // 2])), "image")


def test_floating_point_pictures_have_no_white():
    for value in (np.nan, np.inf, 0.5):
        with pytest.raises(DataError, match="holds floating-point values"):
            flatten(Image.fromarray(np.full((4, 4), value, np.float32)))


def test_arrays_become_pictures():
    values = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(from_array(values), values)
    assert np.array_equal(from_array(values / 255), values)
    assert np.asarray(from_array(np.array([[0.0, 0.5, 1.0]]))).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.array([[0.0, np.inf]]), "NaN or infinite"),
        (np.full((4, 4, 3), 255.0), r"must lie in \[0, 1\], not \[255, 255\]"),
        (np.full((4, 4, 3), -0.1), "must lie in"),
        (np.zeros((4, 4, 4), np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((4, 4), np.int64), "uint8"),
        (np.zeros((4, 4), object), "uint8"),
        (np.zeros((4, 4), complex), "uint8"),
    ],
)
def test_arrays_that_are_no_pictures(array, said):
    with pytest.raises(InputError, match=said):
        from_array(array)


def test_a_fingerprint_is_of_pixels_and_not_of_files():
    base = quarters()
    assert fingerprint(decode(encoded(base))) == fingerprint(decode(encoded(base, "WEBP", lossless=True)))
    assert fingerprint(base).startswith("sha256:") and len(fingerprint(base)) == 71
    other = base.copy()
    other.putpixel((5, 3), (255, 255, 1))
    flat = Image.frombytes("RGB", (4, 6), base.tobytes())  # the same bytes in another shape
    assert len({fingerprint(p) for p in (base, other, flat, base.convert("L"))}) == 4


# --- what a picture says ----------------------------------------------------------------------------------------------


def test_texts_of_every_format():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a <script>alert(1)</script>\nSteps: 3", zip=True)
    info.add_itxt("note", "für Ärzte", zip=True)
    info.add_itxt("XML:com.adobe.xmp", "<x>")
    found = texts(encoded(quarters(), pnginfo=info))
    assert found["parameters"] == "a <script>alert(1)</script>\nSteps: 3"
    assert (found["note"], found["xmp"]) == ("für Ärzte", "<x>")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "été 😀".encode("utf-16-be")
    for kind in ("JPEG", "WEBP", "PNG"):
        assert texts(encoded(quarters(), kind, exif=exif.tobytes()))["comment"] == "été 😀"
    assert texts(encoded(quarters())) == {}


def test_texts_behind_the_pixels_are_found_too():
    data = encoded(quarters())
    late = data[:-12] + chunk(b"tEXt", b"parameters\0Steps: 3") + data[-12:]
    assert texts(late) == {"parameters": "Steps: 3"}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"UNICODE\0" + "Steps: 20, é".encode("utf-16-be"), "Steps: 20, é"),
        (b"UNICODE\0" + "Steps: 20, é".encode("utf-16-le"), "Steps: 20, é"),
        (b"UNICODE\0" + "\ufeffSteps".encode("utf-16-be"), "Steps"),
        (b"UNICODE\0" + "城, Steps: 20".encode("utf-16-be") + b"\0\0", "城, Steps: 20"),
        (b"ASCII\0\0\0Steps: 20", "Steps: 20"),
        (b"\0" * 8 + "été".encode(), "été"),
        (b"Steps: 20, without a kind", "Steps: 20, without a kind"),
        (b"", ""),
        (b"UNICODE\0\xff", "�"),
    ],
)
def test_the_comment_of_exif_in_whatever_order_of_bytes(raw, said):
    assert user_comment(raw) == said


def test_texts_of_what_is_no_picture_or_hides_a_bomb():
    bomb = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**23)))
    for data in (b"", b"GIF89a", png(65_500, 65_500, 8, 2, [b"\0"]), png(1, 1, 8, 2, [b"\1\2\3"], bomb)):
        with pytest.raises(DataError) as error:
            texts(data, "like 'a.png'")
        assert one_sentence(error).startswith("like 'a.png' ")


# --- files ------------------------------------------------------------------------------------------------------------


def test_only_ordinary_files_are_read(tmp_path, monkeypatch):
    import os

    (tmp_path / "a.png").write_bytes(b"x" * 60)
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "a.png") == b"x" * 60
    monkeypatch.setattr(pictures, "MAX_BYTES", 50)
    cases = {
        tmp_path / "absent.png": "does not exist",
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",
        "/dev/zero": "is not a file",
        "a\0b": "no file can have this name",
        "x" * 5000: "cannot be read: File name too long",
        tmp_path / "a.png": "has 60 bytes; at most 50 are read",
    }
    for path, said in cases.items():
        with pytest.raises(InputError, match=said) as error:
            read_file(path, "mask")
        assert one_sentence(error).startswith("mask '") if len(str(path)) < 100 else True
        assert error.value.argument == "mask"
