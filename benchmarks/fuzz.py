"""Anything sent to a server: bodies that are nearly right, bytes that are nothing, paths, headers.

Target: no 5xx, but for 503 that say when to come back.

Bounded by --requests, over loopback, by 32 connections of this process. What is right by accident is drawn.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from common import arguments, keep, probe, scratch, show
from serve import Served

CONNECTIONS = 32
PATIENCE = 600.0  # seconds for an answer, on a machine that does other things
WISH: dict[str, Any] = {
    "prompt": "a cube", "negative": "x", "count": 1, "seed": 7, "steps": 1, "guidance": 2.0, "sampler": "euler",
    "schedule": "simple", "size": [32, 32],
}  # fmt: skip
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/jobs", {"model": "pocket", "request": WISH, "format": "png", "previews": 0, "deadline": 60}),
    ("/v1/estimate", {"request": {**WISH, "hires": {"scale": 2.0}, "loras": [], "controls": []}}),
    ("/v1/estimate", {"request": {**WISH, "image": "file_" + "0" * 32, "strength": 0.5, "mask": None}}),
    ("/v1/preflight", {"request": WISH}),
    ("/v1/videos", {"request": {**WISH, "frames": 2, "fps": 8, "clip": None}, "format": "mp4"}),
    ("/v1/videos/estimate", {"request": {**WISH, "frames": 5, "motion": {"bucket": 3}}}),
    ("/v1/images/generations", {
        "prompt": "a", "n": 1, "size": "32x32", "quality": "low", "steps": 1, "stream": False, "output_format": "png",
    }),
    ("/sdapi/v1/txt2img", {
        "prompt": "a", "steps": 1, "width": 32, "height": 32, "cfg_scale": 2, "sampler_name": "Euler", "batch_size": 1,
        "enable_hr": False, "override_settings": {}, "alwayson_scripts": {},
    }),
    ("/sdapi/v1/img2img", {"init_images": ["iVBORw0KGgo="], "prompt": "a", "steps": 1, "denoising_strength": 0.5}),
    ("/sdapi/v1/options", {"sd_model_checkpoint": "pocket"}),
]  # fmt: skip
PATHS = (
    "v1", "sdapi", "jobs", "videos", "files", "models", "usage", "pictures", "clips", "receipt", "cancel", "page", "..",
    "job_" + "0" * 32, "file_" + "0" * 32, "0", "-1", "%00", "%ff", "%2e%2e", "pocket", "options", "progress", "edits",
    "metrics", "openapi.json", "samplers", "loras", "estimate", "images", "generations", "?limit=x", "?before=nan", "",
)  # fmt: skip
KINDS = (
    "application/json", "application/json; charset=utf-16", "multipart/form-data; boundary=b", "multipart/form-data",
    "text/plain", "image/png", "video/mp4", "application/octet-stream", "", "application/x-www-form-urlencoded",
)  # fmt: skip
STARTS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\0\0\0\0WEBP",
    b"\0\0\0\x18ftypmp42",
    b"\x1a\x45\xdf\xa3",
    b"GIF89a",
    b"",
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 0.5, -0.0, 1e300, "", "x", "\0", "\ud800", "😀", "../x",
    "file_" + "f" * 32, "http://127.0.0.1/", [], {}, [[]], {"": None}, [1, 2], ["x"], {"name": "x"}, "euler",
    "x" * 5000,
)  # fmt: skip


def value(chance: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold."""
    if depth < 3 and chance.random() < 0.15:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if depth < 3 and chance.random() < 0.15:
        return {word(chance): value(chance, depth + 1) for _ in range(chance.randrange(4))}
    return chance.choice(VALUES)


def word(chance: random.Random) -> str:
    known = [
        *WISH,
        "image",
        "mask",
        "clip",
        "frames",
        "hires",
        "scale",
        "loras",
        "controls",
        "request",
        "model",
    ]
    if chance.random() < 0.8:
        return chance.choice(known)
    return "".join(chance.choices(string.printable, k=chance.randrange(12)))


def changed(chance: random.Random, body: Any) -> Any:
    """The body with something in it left out, put in or put in its place."""
    if not isinstance(body, dict) or not body or chance.random() < 0.05:
        return value(chance)
    body, name = dict(body), chance.choice(list(body))
    way = chance.random()
    if way < 0.35 and isinstance(body[name], dict):
        body[name] = changed(chance, body[name])
    elif way < 0.75:
        body[name] = value(chance)
    elif way < 0.88:
        body[word(chance)] = value(chance)
    else:
        del body[name]
    return body


def form(chance: random.Random) -> bytes:
    """A form, or something like one."""
    parts = []
    for _ in range(chance.randrange(5)):
        name, data = word(chance), chance.choice(STARTS) + chance.randbytes(chance.randrange(60))
        if chance.random() < 0.5:
            data = json.dumps(value(chance)).encode()
        file = '; filename="x"' if chance.random() < 0.5 else ""
        parts.append(b'--b\r\nContent-Disposition: form-data; name="' + name.encode("utf-8", "replace") + b'"'
                     + file.encode() + b"\r\n\r\n" + data + b"\r\n")  # fmt: skip
    whole = b"".join(parts) + b"--b--\r\n"
    return whole if chance.random() < 0.8 else whole[: chance.randrange(len(whole) + 1)]


def request(chance: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """(method, path, headers, body)."""
    way, headers = chance.random(), {"content-type": "application/json"}
    path, body = chance.choice(BODIES)
    data = b""
    method = "POST"
    if way < 0.6:
        for _ in range(chance.randint(1, 3)):
            body = changed(chance, body)
        data = json.dumps(body).encode("utf-8", "replace")
    elif way < 0.7:
        data = json.dumps(body).encode()
        place = chance.randrange(len(data))
        data = data[:place] + chance.randbytes(chance.randrange(4)) + data[place + chance.randrange(4) :]
    elif way < 0.85:
        path = chance.choice(("/v1/files", "/v1/videos", "/v1/images/edits", "/v1/videos/estimate"))
        headers["content-type"] = "multipart/form-data; boundary=b"
        data = form(chance)
        if path == "/v1/files" and chance.random() < 0.5:
            headers["content-type"], data = "image/png", chance.choice(STARTS) + chance.randbytes(200)
    else:
        method = chance.choice(("GET", "GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH"))
        path = "/" + "/".join(chance.choices(PATHS, k=chance.randint(1, 5)))
    if chance.random() < 0.1:
        headers["content-type"] = chance.choice(KINDS)
    if chance.random() < 0.05:
        headers["idempotency-key"] = chance.choice(("a", "b", "x" * 300))
    if chance.random() < 0.05:
        headers[chance.choice(("x-stainless-retry-count", "range", "accept", "origin"))] = "1"
    return method, path, headers, data


async def ask(
    served: Served, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, bool]:
    """(status, whether it says when to come back), on a connection of its own."""
    reader, writer = await asyncio.open_connection(served.host, served.port)
    try:
        lines = [f"{name}: {text}" for name, text in headers.items()]
        head = f"{method} {path} HTTP/1.1\r\nHost: {served.host}\r\nConnection: close\r\n" + "\r\n".join(
            lines
        )
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()
    return int(answer.split(b" ", 2)[1]), b"\r\nretry-after:" in answer.split(b"\r\n\r\n", 1)[0].lower()


async def fuzzed(served: Served, count: int, seed: int) -> tuple[Counter[int], list[Any]]:
    """How many answers of each status there were, and what was answered by a 5xx."""
    chance, left = random.Random(seed), iter(range(count))
    statuses: Counter[int] = Counter()
    wrong: list[Any] = []

    async def some() -> None:
        for _ in left:
            asked = request(chance)
            status, later = await ask(served, *asked)
            statuses[status] += 1
            if status >= 500 and not (status == 503 and later):
                wrong.append([status, *asked[:3], asked[3].decode("latin-1")])

    await asyncio.gather(*(some() for _ in range(CONNECTIONS)))
    return statuses, wrong


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2_000, help="default 2,000; at most 1,000,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = probe()
    with scratch() as place:
        served = Served(Path(place) / "data", "--queue", "16")
        statuses, wrong = asyncio.run(fuzzed(served, min(args.requests, 1_000_000), args.seed))
        code, log = served.stop(), served.log.read_text()
    rows = [(str(status), f"{count:,}", "") for status, count in sorted(statuses.items())]
    rows += [("5xx, but for 503 that say when to come back", str(len(wrong)), "target: none")]
    rows += [("failures in its log", str(log.count("Traceback")), f"exit {code}")]
    show(f"{sum(statuses.values()):,} requests of any kind", before, rows)
    keep(
        args.json, {"statuses": {str(k): v for k, v in statuses.items()}, "wrong": wrong[:100], "exit": code}
    )
    if wrong or "Traceback" in log:
        sys.exit(json.dumps(wrong[:5])[:3000] + log[-2000:])


if __name__ == "__main__":
    main()
