"""A server on this machine: what drawing together gains, how soon it is ready again after `kill -9`, and a thousand
clients at ten times what it can draw.

Targets: ready within 30 s more than a model's first loading; every accepted job ends; the others get 429 with
Retry-After, 99 of 100 within 100 ms; memory grows by < 5 %.
Bounded: --seconds of load, over loopback, by connections of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from common import arguments, interleaved, keep, probe, scratch, show

PROMPT = "a red metal sphere behind a small blue cube"
STEPS = 8


class Served:
    """`sfumato serve` in a process of its own."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.log = folder, folder.with_suffix(".log")
        command = [sys.executable, "-m", "sfumato", "serve", "--port", "0", "--data", str(folder), *options]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        while not (found := re.search(r"serving .* at http://([\d.]+):(\d+)", self.log.read_text())):
            if self.process.poll() is not None:
                sys.exit(self.log.read_text())
            time.sleep(0.05)
        self.host, self.port = found[1], int(found[2])

    def workers(self) -> list[int]:
        """The processes that it has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(child) for child in children.read_text().split()]

    def resident(self) -> dict[str, int]:
        """Bytes in memory of the front and of its worker."""
        return {"front": _resident(self.process.pid), "worker": sum(map(_resident, self.workers()))}

    def until_ready(self) -> None:
        """Wait until it would draw."""
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://{self.host}:{self.port}/readyz", timeout=10)
                return
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(600)

    def states(self) -> Counter[str]:
        """Jobs of its ledger by how they ended."""
        with contextlib.closing(sqlite3.connect(self.folder / "ledger.db")) as book:
            return Counter(state for (state,) in book.execute("select state from jobs"))


def _resident(process: int) -> int:
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


class Connection:
    """One client's connection, kept open."""

    def __init__(self, served: Served):
        self.served = served
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes, float]:
        """(status, headers, body, seconds until all of it was there)."""
        if self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection(self.served.host, self.served.port)
        assert self.reader is not None
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.served.host}\r\nContent-Type: application/json\r\n"
        started = time.perf_counter()
        self.writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        try:
            status = int((await self.reader.readuntil(b"\r\n")).split()[1])
        except (
            asyncio.IncompleteReadError,
            ConnectionError,
        ):  # it was silent for too long, and the server hung up
            self.writer.close()
            return await self.ask(method, path, body)
        headers = {}
        while line := (await self.reader.readuntil(b"\r\n")).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        found = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return status, headers, found, time.perf_counter() - started


def killed(folder: Path, kills: int) -> dict[str, list[float]]:
    """Seconds from its start, and from each `kill -9` of its worker and of all its processes, until it would draw."""

    def started() -> Served:
        served = Served(folder)
        served.until_ready()
        return served

    took: dict[str, list[float]] = {"start": [], "worker": [], "all": []}
    began = time.perf_counter()
    served = started()
    took["start"].append(time.perf_counter() - began)
    for _ in range(kills):
        [worker] = served.workers()
        began = time.perf_counter()
        os.kill(worker, signal.SIGKILL)
        while worker in served.workers():  # until the front knows
            time.sleep(0.01)
        served.until_ready()
        took["worker"].append(time.perf_counter() - began)
        for process in (served.process.pid, *served.workers()):
            os.kill(process, signal.SIGKILL)
        began = time.perf_counter()
        served.process.wait()
        served = started()
        took["all"].append(time.perf_counter() - began)
    served.stop()
    return took


async def drawn(served: Served, count: int, seed: int) -> None:
    """So many pictures from as many clients at once."""

    async def one(number: int) -> None:
        body = {"prompt": PROMPT, "steps": STEPS, "seed": seed + number}
        status, _, answer, _ = await Connection(served).ask("POST", "/v1/images/generations", body)
        assert status == 200, answer[:300]

    await asyncio.gather(*(one(number) for number in range(count)))


async def loaded(served: Served, clients: int, rate: float, seconds: float) -> dict[str, Any]:
    """Submissions at `rate` a second from so many clients. What was answered, and how fast."""
    chance, until = random.Random(0), time.perf_counter() + seconds
    answers: Counter[int] = Counter()
    refusals: list[float] = []
    waits: list[int] = []
    pause = clients / rate

    async def client(number: int) -> None:
        connection = Connection(served)
        await asyncio.sleep(chance.uniform(0, pause))
        while time.perf_counter() < until:
            body = {"request": {"prompt": PROMPT, "steps": STEPS, "seed": chance.randrange(2**32)}}
            status, headers, _, took = await connection.ask("POST", "/v1/jobs", body)
            answers[status] += 1
            if status == 429:
                refusals.append(took)
                waits.append(int(headers["retry-after"]))
            left = until - time.perf_counter()
            await asyncio.sleep(max(0.0, min(left, chance.expovariate(1 / pause))))

    await asyncio.gather(*(client(number) for number in range(clients)))
    refusals.sort()
    return {
        "answers": {str(status): count for status, count in sorted(answers.items())},
        "offered_per_second": sum(answers.values()) / seconds,
        "refusal_median": refusals[len(refusals) // 2] if refusals else None,
        "refusal_p99": refusals[int(len(refusals) * 0.99)] if refusals else None,
        "retry_after": [min(waits), max(waits)] if waits else None,
    }


async def until_idle(served: Served) -> None:
    connection = Connection(served)
    while True:
        _, _, text, _ = await connection.ask("GET", "/metrics")
        waiting = re.findall(rb"^sfumato_(?:queue|running)_jobs ([\d.]+)", text, re.MULTILINE)
        if not any(float(value) for value in waiting):
            return
        await asyncio.sleep(0.2)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, interleaved (default 5)")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=3, help="of the worker, and of all (default 3)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load, at most 300 (default 30)")
    args = parser.parse_args()
    before = probe()
    with scratch() as place:
        took = killed(Path(place) / "c", args.kills)
        together, alone = Served(Path(place) / "a"), Served(Path(place) / "b", "--batch", "1")
        calls = {
            "together": lambda: asyncio.run(drawn(together, 8, 1)),
            "one by one": lambda: asyncio.run(drawn(alone, 8, 1)),
        }
        times = interleaved(calls, args.rounds)
        alone.stop()
        capacity = 8 / times["together"]
        asyncio.run(
            loaded(together, args.clients, 10 * capacity, min(300.0, args.seconds))
        )  # caches, buffers
        asyncio.run(until_idle(together))
        began = together.resident()
        found = asyncio.run(loaded(together, args.clients, 10 * capacity, min(300.0, args.seconds)))
        asyncio.run(until_idle(together))
        ended = together.resident()
        code = together.stop()
        states = together.states()
    growth = {name: ended[name] / began[name] - 1 for name in began}
    after = probe()
    values = {
        "probe_before": before,
        "probe_after": after,
        "seconds_until_ready": took,
        "seconds_of_8": times,
        "capacity_per_second": capacity,
        **found,
        "states": dict(states),
        "exit": code,
        "resident": {"before": began, "after": ended},
        "growth": growth,
    }
    show(
        f"a server of pocket, {STEPS} steps of 128x128",
        before,
        [
            ("ready after its start", f"{took['start'][0]:.1f} s", ""),
            *(
                (f"after kill -9 of {what}, longest", f"{max(took[key]):.1f} s", "target: 30 s more at most")
                for key, what in (("worker", "its worker"), ("all", "all"))
                if took[key]
            ),
            (
                "8 clients, drawn together",
                f"{capacity:.2f} /s",
                f"one by one {8 / times['one by one']:.2f} /s",
            ),
            ("gain", f"{times['one by one'] / times['together']:.2f} ×", ""),
            (
                f"{args.clients} clients, offered",
                f"{found['offered_per_second']:.0f} /s",
                f"10 × {capacity:.1f}",
            ),
            (
                "answers",
                " ".join(f"{k}:{v}" for k, v in found["answers"].items()),
                "202 accepted, 429 come back",
            ),
            ("refused within, median", f"{1000 * (found['refusal_median'] or 0):.1f} ms", ""),
            ("refused within, 99 of 100", f"{1000 * (found['refusal_p99'] or 0):.1f} ms", "target < 100 ms"),
            ("Retry-After", str(found["retry_after"]), "s, target ≤ 120"),
            (
                "jobs by how they ended",
                " ".join(f"{k}:{v}" for k, v in states.items()),
                "target: all succeeded",
            ),
            ("growth of the front", f"{growth['front']:+.1%}", "target < 5 %"),
            ("growth of the worker", f"{growth['worker']:+.1%}", "target < 5 %"),
        ],
    )
    keep(args.json, values)


if __name__ == "__main__":
    main()
