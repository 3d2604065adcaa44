"""Requests, bodies and pictures that are none, for every door of the server."""

from __future__ import annotations

import io
import struct
import zlib

from helpers import noise
from serving import png

HOSTILE = [
    {"prompt": "x" * 100_000}, {"prompt": "a\0b"}, {"prompt": "\ud800"}, {"prompt": 3}, {"prompt": None},
    {"prompt": ["x"]},
    {"size": [513, 512]}, {"size": [0, 0]}, {"size": [10**9, 16]}, {"size": "64x64"}, {"size": [64]},
    {"size": [64.0, 64]},
    {"steps": -1}, {"steps": 0}, {"steps": 10**9}, {"steps": 1.5}, {"steps": True}, {"steps": "2"},
    {"guidance": -1}, {"guidance": 1e300}, {"guidance": "x"}, {"seed": -1}, {"seed": 2**64}, {"seed": 1.5},
    {"seed": "x"},
    {"count": 0}, {"count": 65}, {"count": 10**30}, {"what": 1}, {"sampler": "none"}, {"sampler": ["euler"]},
    {"frames": 8}, {"schedule": 3}, {"schedule": ""}, {"sampler": ""}, {"eta": 1}, {"image": 3},
    {"image": "http://127.0.0.1/x.png"}, {"image": "file:///etc/passwd"},
    {"image": "sha256:" + "0" * 64}, {"image": {"$ref": "x"}}, {"mask": "file_" + "0" * 32}, {"strength": 0.5},
    {"outpaint": [1, 2, 3]}, {"hires": 2}, {"hires": {"scale": 1e9}}, {"hires": {"scale": 2, "x": 1}},
    {"variation": []},
    {"loras": [{"name": "none"}]}, {"loras": "x"}, {"loras": [3]}, {"controls": [{"name": "depth"}]},
    {"controls": [[]]},
    {"controls": [{"name": "none", "image": "file_" + "0" * 32}]}, {"controls": {"a": 1}}, {"reuse": 11},
    {"guidance_interval": [2, 1]}, {"guidance_interval": "x"}, {"clip_skip": 30}, {"micro": {"crop": [1, 1]}},
    {"skip_layers": {"layers": [999]}}, {"skip_layers": {"layers": []}}, {"prompt_rules": "x"}, {"refine_at": 0.5},
    {"prompt": "unheard " * 40}, {"negative": "unheard " * 40},
    {"inpaint": {"blur": 3}}, {"text_length": 3}, {"fit": "cover"},
]  # fmt: skip

NO_BODIES = [
    b"", b"{", b"[]", b"3", b'"x"', b"null", b"{}", b"\xff\xfe", b'{"a":' * 5000, b"[" * 100_000,
    b'{"request": 3}', b'{"request": {}, "request": {}}', b'{"request": {"guidance": NaN}}',
    b'{"request": {"guidance": 1e999}}', b'{"request": {"seed": ' + b"9" * 5000 + b"}}",
    b'{"request": {"prompt": "x"}, "model": 3}', b'{"request": {"prompt": "x"}, "x": 3}',
    b'{"request": {"prompt": "x"}, "format": "gif"}', b'{"request": {"prompt": "x"}, "previews": -1}',
    b'{"request": {"prompt": "x"}, "deadline": 0}', b'{"request": {"prompt": "x"}, "deadline": "soon"}',
    b'{"request": {"prompt": "x"}, "format": []}', b'{"request": {"prompt": "x"}, "\\ud800": 1}',
]  # fmt: skip


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, stream = PngInfo(), io.BytesIO()
    info.add_text("x", "a" * 30_000_000, zip=True)
    noise(8, 8).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


NO_PICTURES = {
    "empty": b"", "zeros": b"\0" * 1000, "text": b"hello", "svg": b"<svg onload='alert(1)'/>", "html": b"<script>",
    "gif": png(noise(8, 8), "GIF"), "bmp": png(noise(8, 8), "BMP"), "tiff": png(noise(8, 8), "TIFF"),
    "truncated": png(noise(64, 64))[:500], "bomb": bomb(60_000, 60_000), "wide": bomb(65_001, 1),
    "text bomb": text_bomb(),
    "psd": b"8BPS" + b"\0" * 100, "eps": b"%!PS-Adobe", "fits": b"SIMPLE  =", "heic": b"\0\0\0\x18ftypheic",
    "zip": b"PK\3\4",
    "pickle": b"\x80\x04\x95", "short": b"\x89PNG\r\n\x1a\n", "zero": bomb(0, 0),
}  # fmt: skip
