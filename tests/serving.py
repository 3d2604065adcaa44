"""A real server for tests: `sfumato serve` in a process of its own, and somebody who asks it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from helpers import apart

PROMPT = "a red metal sphere behind a small blue cube"
PRICES = "[[rule]]\npicture = 0.001\nmegapixel_step = 0.01\n"


class Awake(threading.Thread):
    """Seconds in which this process could run. One that was stopped for a while, with the server, has not waited."""

    TICK = 0.1

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds = 0.0
        self.start()

    def run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(self.TICK)
            now = time.monotonic()
            self.seconds += min(now - last, 10 * self.TICK)
            last = now


@functools.cache
def awake() -> Awake:
    return Awake()


class Patience:
    """So many seconds of waiting, as `Awake` counts them: true until they are over."""

    def __init__(self, seconds: float):
        self._until = awake().seconds + seconds

    def __bool__(self) -> bool:
        return awake().seconds < self._until


def serve(folder: Path, *options: str, python: Path | None = None) -> list[str]:
    """The command line of a server on a free port, with its data in `folder`."""
    command = [str(python or sys.executable), "-m", "sfumato", "serve"]
    return [*command, "--port", "0", "--data", str(folder), *options]


class Server:
    """`sfumato serve` on a free port of this machine. `folder`: its data; options: more of the command line.
    python: what runs it.
    """

    def __init__(self, folder: Path, *options: str, limit: int | None = None, python: Path | None = None):
        self.folder, self.options, self.limit, self.python = folder, options, limit, python
        self.log = folder.parent / f"{folder.name}.log"
        self.process: subprocess.Popen | None = None
        self.url = ""

    def start(self, seconds: float = 120) -> Server:
        """Start it and wait until it can be asked."""
        self.begin()
        patience = Patience(seconds)
        while patience:
            found = re.findall(r"serving .* at (\S+)", self.log.read_text())
            if found:
                self.url = found[-1]
                with contextlib.suppress(requests.ConnectionError):
                    if requests.get(self.url + "/readyz").status_code == 200:
                        return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def begin(self) -> None:
        command = serve(self.folder, *self.options, python=self.python)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        limit = self.limit

        def limited() -> None:
            if limit is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                preexec_fn=limited,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def workers(self) -> list[int]:
        """The processes that it has started."""
        path = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with contextlib.suppress(OSError):
            return [int(text) for text in Path(path).read_text().split()]
        return []

    def kill(self) -> None:
        """As a machine that loses its power, for this process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM, and its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs of its SQLite ledger."""
        with contextlib.closing(sqlite3.connect(self.folder / "ledger.db")) as book:
            book.row_factory = sqlite3.Row
            return [dict(row) for row in book.execute("select * from jobs")]

    def entries(self, kind: str) -> list[str]:
        """The jobs that entries of a kind are about."""
        with contextlib.closing(sqlite3.connect(self.folder / "ledger.db")) as book:
            return [job for (job,) in book.execute("select job from entries where kind = ?", (kind,))]


class Client:
    """Somebody with a key, or without."""

    def __init__(self, server: Server, key: str | None = None):
        self.server = server
        self.session = requests.Session()
        if key is not None:
            self.session.headers["authorization"] = f"Bearer {key}"

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        return self.session.request(method, self.server.url + path, timeout=600, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return self("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> requests.Response:
        return self("POST", path, **({"json": body} if body is not None else {}), **more)

    def submit(self, request: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """A job that is accepted."""
        headers = more.pop("headers", None)
        answer = self.post(
            "/v1/jobs",
            {"request": {"prompt": PROMPT, "steps": 2, **(request or {})}, **more},
            headers=headers,
        )
        assert answer.status_code == 202, answer.text
        return answer.json()

    def wait(self, job: str, seconds: float = 120) -> dict[str, Any]:
        """The job when it has ended."""
        patience = Patience(seconds)
        while patience:
            found = self.get(f"/v1/jobs/{job}").json()
            if found["state"] in ("succeeded", "failed", "cancelled"):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{job} does not end: {found}")

    def upload(self, data: bytes, kind: str = "image/png") -> str:
        answer = self("POST", "/v1/files", data=data, headers={"content-type": kind})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def events(self, job: str) -> list[tuple[str, dict[str, Any]]]:
        """All server-sent events of a job until it has ended."""
        found, name = [], ""
        with self.get(f"/v1/jobs/{job}/events", stream=True) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines(decode_unicode=True):
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    found.append((name, json.loads(line.removeprefix("data: "))))
        return found


def error(answer: requests.Response) -> tuple[int, str]:
    """Status and stable code of an answer that says no."""
    return answer.status_code, answer.json()["error"]["code"]


# --- pictures ------------------------------------------------------------------------------------------------------


def png(picture: Image.Image, format: str = "PNG") -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    picture.save(stream, format)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    """The picture of a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def same(one: Image.Image, two: Image.Image) -> bool:
    """Whether two pictures are one, but for float32's rounding by the batch where a CPU is not fast in bfloat16."""
    return apart(one, two) <= 1
