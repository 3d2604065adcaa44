"""Reading a picture that nobody vouches for: PNG, JPEG or WebP by content, within limits, as upright 8-bit RGB.

What a file is, and how large, is read from its first bytes here, before any decoder runs. Rules for what
has no single right answer: transparency is laid on white (of a mask, on black: there nothing was painted); of a
moving picture the first frame counts; a colour profile is not applied (values are taken as sRGB), so a broken one
does no harm; the EXIF orientation is applied, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.errors import DataError, InputError

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_000  # pixels; libjpeg itself stops at 65,500
MAX_BYTES = 256 * 2**20
MAX_TEXT = 2**20  # bytes one compressed text chunk may unfold to; Pillow's own bound
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
ORIENTATION = 0x0112  # EXIF tag
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# brands; others are of videos
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
UNKNOWN = "not a picture"  # what `describe` says where it knows no better
_OTHERS = (
    (b"GIF8", "a GIF"),
    (b"8BPS", "a Photoshop file"),
    (b"%!PS", "a PostScript file"),
    (b"SIMPLE  =", "a FITS file"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"BM", "a BMP"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an SVG or other XML"),
    (b"%PDF", "a PDF"),
)


@dataclass(frozen=True)
class Header:
    """What the first bytes say: format (a key of `FORMATS`), width and height in pixels as stored."""

    format: str
    width: int
    height: int


def sniff(start: bytes) -> str | None:
    """The format of a file that begins with `start` (12 bytes are enough): png, jpeg, webp or None."""
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    return None


def describe(start: bytes) -> str:
    """Words for content that is none of the three formats."""
    if not start:
        return "an empty file"
    if not start.strip(b"\0"):
        return "filled with zero bytes"
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        return "an AVIF" if brand in (b"avif", b"avis") else "a HEIC" if brand in HEIC else "a video"
    return next((words for magic, words in _OTHERS if start.lstrip().startswith(magic)), UNKNOWN)


def read_file(path: str | os.PathLike[str], argument: str = "image") -> bytes:
    """The bytes of a picture file, at most `MAX_BYTES` of them.

    Raises `InputError`, naming `argument`, for what is missing, no ordinary file (a pipe would never end) or too large.
    """
    name = shown(path)
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise InputError(f"{argument} {name} is not a file", argument=argument)
        if state.st_size > MAX_BYTES:
            raise InputError(
                f"{argument} {name} has {state.st_size:,} bytes; at most {MAX_BYTES:,} are read",
                argument=argument,
            )
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{argument} {name} does not exist", argument=argument) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise InputError(f"{argument} {name} cannot be read: {reason}", argument=argument) from None


def shown(path: str | os.PathLike[str]) -> str:
    """A path as a message can hold it: quoted and short."""
    text = repr(os.fspath(path))
    return text if len(text) <= 200 else text[:197] + "..."


def read_header(data: bytes, name: str = "the picture") -> Header:
    """Format and size from the bytes alone, checked against the limits.

    Raises `DataError` for other formats, damaged or cut headers, and sizes beyond `MAX_PIXELS` or `MAX_SIDE`.
    """
    kind = sniff(data[:12])
    if kind is None:
        raise DataError(f"{name} is {describe(data[:64])}; PNG, JPEG and WebP are read")
    if len(data) > MAX_BYTES:
        raise DataError(f"{name} has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        width, height = {"png": _png_size, "jpeg": _jpeg_size, "webp": _webp_size}[kind](data)
    except (struct.error, IndexError, ValueError):
        raise DataError(
            f"{name} is damaged or cut short: its {FORMATS[kind]} header cannot be read; give a whole "
            "PNG, JPEG or WebP"
        ) from None
    if width < 1 or height < 1:
        raise DataError(f"{name} is damaged: its header says {width}×{height} pixels")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise DataError(
            f"{name} has {width}×{height} pixels; at most {MAX_PIXELS:,}, and "
            f"{MAX_SIDE:,} on a side, are decoded"
        )
    return Header(kind, width, height)


def decode(data: bytes, name: str = "the picture", ground: tuple[int, ...] = WHITE) -> Image.Image:
    """Decode to an upright RGB picture of 8 bits, transparency on `ground`. Raises `DataError` with one
    sentence.
    """
    return flatten(_decoded(data, name), name, ground)


def decode_mask(data: bytes, name: str = "the mask") -> Image.Image:
    """Decode to an upright mask, see `binary`. Raises `DataError` with one sentence."""
    return binary(_decoded(data, name), name)


def upright_size(data: bytes, name: str = "the picture") -> tuple[int, int]:
    """(width, height) of what `decode` makes, by the header. Raises `DataError` for one that is not sound."""
    opened = _opened(data, name)
    # Pillow decodes a PNG for its orientation, which only these can hold
    bare = opened.format == "PNG" and not any(kind in data for kind in (b"eXIf", b"tEXt", b"iTXt", b"zTXt"))
    turned = not bare and _orientation(opened) >= 5
    return opened.size[::-1] if turned else opened.size


def texts(data: bytes, name: str = "the picture") -> dict[str, str]:
    """What a picture says about itself: the text chunks of a PNG by their keywords, the EXIF comment of any format as
    `comment`, the XMP packet as `xmp`. Unreadable ones are left out.

    Raises `DataError` as `decode` does. The texts are whatever a stranger wrote.
    """
    opened = _opened(data, name)
    if opened.format == "PNG":
        with contextlib.suppress(
            Exception
        ):  # texts may stand behind the pixels, and be sound where these are not
            opened.load()
    found = {str(key): value for key, value in opened.info.items() if isinstance(value, str)}
    packet = opened.info.get("xmp", found.get("XML:com.adobe.xmp"))
    if isinstance(packet, bytes):
        packet = packet.decode("utf-8", "replace")
    if isinstance(packet, str):
        found["xmp"] = packet
    with contextlib.suppress(Exception):  # broken EXIF says nothing
        comment = opened.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
        if isinstance(comment, bytes):
            found["comment"] = user_comment(comment)
        elif isinstance(comment, str):
            found["comment"] = comment
    return found


def user_comment(raw: bytes) -> str:
    """The text of an EXIF UserComment: eight bytes name the encoding, and UNICODE leaves the order of bytes open.

    The order is the one in which more of the text is ASCII, as the settings of a picture are.
    """
    kind, body = raw[:8].rstrip(b"\0"), raw[8:]
    if kind == b"UNICODE":
        readings = [body.decode(encoding, "replace") for encoding in ("utf-16-be", "utf-16-le")]
        return max(readings, key=lambda text: sum(letter < "\x80" for letter in text)).strip("\0\ufeff")
    return (body if kind in (b"ASCII", b"") else raw).decode("utf-8", "replace").strip("\0")


def flatten(picture: Image.Image, name: str = "the picture", ground: tuple[int, ...] = WHITE) -> Image.Image:
    """Any PIL picture → upright RGB of 8 bits on `ground`, without metadata; so doing it twice changes nothing.

    Raises `DataError` for what has no such form: floating-point values (NaN among them), or pixels that cannot be read.
    """
    if picture.mode == "F":
        raise DataError(f"{name} holds floating-point values, of which white is unknown; give 8-bit RGB")
    try:
        flat = _upright(_rgb(picture, ground), _orientation(picture))
    except Exception:  # a lazily opened file fails here in as many ways as a decoder has
        raise DataError(f"{name} cannot be read as a picture") from None
    flat.info = {}
    return flat


def binary(mask: Image.Image, name: str = "the mask") -> Image.Image:
    """Any PIL picture → upright mode L of 0 and 255 alone: white where its brightness is at least half of white.

    What is transparent counts as black. Raises `DataError` as `flatten` does.
    """
    if mask.mode == "L" and not mask.info:
        return mask.point(lambda value: 255 if value >= 128 else 0)
    return flatten(mask, name, BLACK).convert("L").point(lambda value: 255 if value >= 128 else 0)


def from_array(array: np.ndarray) -> Image.Image:
    """Rows of pixels → a picture: (H, W) or (H, W, 3), uint8, or floating-point numbers in [0, 1].

    Raises `InputError` for other shapes and types, and for NaN, infinity and values out of range.
    """
    array = np.asarray(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise InputError(
            f"a picture must have shape (H, W, 3) or (H, W), not {array.shape}", argument="image"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError("the picture holds NaN or infinite values", argument="image")
        if array.min() < 0 or array.max() > 1:
            raise InputError(
                f"the picture's values must lie in [0, 1], not [{array.min():g}, {array.max():g}]",
                argument="image",
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(
            f"a picture must be of uint8, or of floating-point numbers in [0, 1], not {array.dtype}",
            argument="image",
        )
    return Image.fromarray(array).convert("RGB")


def fingerprint(picture: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels, row by row, as `sha256:` and 64 hex digits: equal exactly when the
    pictures are, whatever files they came from.
    """
    digest = hashlib.sha256(f"{picture.mode} {picture.width}x{picture.height}\n".encode())
    digest.update(picture.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _opened(data: bytes, name: str) -> Image.Image:
    """A picture whose header and container are sound; its pixels are still to be decoded."""
    header = read_header(data, name)
    if header.format == "png":
        _check_png(data, name)
    if header.format == "webp" and struct.unpack("<I", data[4:8])[0] + 8 > len(data):
        raise DataError(f"{name} is cut short")
    try:
        opened = Image.open(io.BytesIO(data), formats=[FORMATS[header.format]])
    except Exception:  # Pillow's decoders raise nearly any type for hostile bytes; the text stays ours
        raise DataError(f"{name} is damaged or cut short and cannot be decoded") from None
    if opened.size != (header.width, header.height):
        raise DataError(f"{name} is damaged: its size is given twice, differently")
    return opened


def _decoded(data: bytes, name: str) -> Image.Image:
    opened = _opened(data, name)
    try:
        opened.load()
    except Exception:
        raise DataError(f"{name} is damaged or cut short and cannot be decoded") from None
    return opened


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError
    return struct.unpack(">II", data[16:24])


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker in (0xD9, 0xDA):  # end or scan before any frame header
            raise ValueError
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 4 : at + 8])
            return width, height
        at += (
            1
            if marker == 0x01 or 0xD0 <= marker <= 0xD7
            else 1 + struct.unpack(">H", data[at + 1 : at + 3])[0]
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L" and data[20] == 0x2F:
        bits = struct.unpack("<I", data[21:25])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError


def _check_png(data: bytes, name: str) -> None:
    """Walk the chunks: whole, checksums right, ended by IEND, no compressed text or profile that unfolds
    without bound.
    """
    at = 8
    view = memoryview(data)
    while True:
        if at + 12 > len(data):
            raise DataError(f"{name} is cut short")
        length = struct.unpack(">I", data[at : at + 4])[0]
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            raise DataError(f"{name} is cut short")
        body = view[at + 4 : end]
        if zlib.crc32(body) != struct.unpack(">I", data[end : end + 4])[0]:
            raise DataError(
                f"{name} is damaged: the checksum of its {kind.decode('latin-1')!r} chunk is wrong"
            )
        if kind in (b"zTXt", b"iTXt", b"iCCP") and _unfolds_too_far(kind, bytes(body[4:])):
            raise DataError(
                f"{name} holds a {kind.decode()} chunk that unfolds to more than {MAX_TEXT:,} bytes"
            )
        if kind == b"IEND":
            return
        at = end + 4


def _unfolds_too_far(kind: bytes, body: bytes) -> bool:
    keyword_end = body.find(b"\0")
    if kind == b"iTXt":
        if body[keyword_end + 1 : keyword_end + 2] != b"\x01":  # stored plainly
            return False
        language_end = body.find(b"\0", keyword_end + 3)
        start = body.find(b"\0", language_end + 1) + 1
    else:
        start = keyword_end + 2
    try:
        unfolded = zlib.decompressobj().decompress(body[start:], MAX_TEXT + 1)
    except zlib.error:
        return False  # a broken profile or text is not needed
    return len(unfolded) > MAX_TEXT


def _rgb(picture: Image.Image, ground: tuple[int, ...]) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, 0 … 65535
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        grey = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8), "L")
        clear = picture.info.get("transparency")
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8), "L"))
        picture = grey
    if picture.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing
        return 1
    return value if value in _TURNS else 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture
