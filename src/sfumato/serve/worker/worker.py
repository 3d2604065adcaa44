"""What draws: models on one device, told what to do by a front.

It hears      start, check, draw, cancel
and answers   ready, checked, step, look, done or failed, and a pulse
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from sfumato.errors import InputError, SfumatoError
from sfumato.serve.wire import Broken, Line

PULSE = 1.0  # seconds
NICE = 5  # steps by which the front goes before what draws on a CPU; opening models is not held up by it
log = logging.getLogger("sfumato.serve.worker")


class Sends(Protocol):
    """Where a worker's messages go. `Broken` when nobody is there any more."""

    def send(self, message: dict[str, Any], parts: Sequence[bytes] = ()) -> None: ...


class Worker:
    """Models on one device, and the jobs that are drawn with them. line: to the front."""

    def __init__(self, line: Sends, start: dict[str, Any]):
        import torch

        from sfumato.memory import available
        from sfumato.runtime import pick_device
        from sfumato.serve.settings import ModelSpec
        from sfumato.serve.worker.costs import Costs
        from sfumato.serve.worker.discreet import of_models
        from sfumato.serve.worker.models import open_model
        from sfumato.serve.worker.together import Bench, Together

        self.line = line
        place = pick_device(start["device"])
        if start.get("threads"):
            torch.set_num_threads(start["threads"])
        self.together = Together(Bench(place), 2 * start["batch"])
        self.models = {}
        self.specs = [ModelSpec(**row) for row in start["models"]]
        self.discreet = of_models(self.specs)
        self.preflights: dict[str, Any] = {}
        for spec in self.specs:
            opened = open_model(spec, start["device"], self.together, start["memory"])
            self.models[opened.name] = opened
        room = available(place)
        room = room if start["memory"] is None else min(room, start["memory"])
        self.costs = {name: Costs(o.model, room) for name, o in self.models.items()}
        self.stops: dict[str, threading.Event] = {}  # of the jobs at work
        self.checks = ThreadPoolExecutor(1, "check")
        for name in self.models:
            self._warm(name)
        if place.type == "cpu":
            _step_back()
        facts = [opened.facts() for opened in self.models.values()]
        self.tell({"is": "ready", "models": facts, "room": room, "device": str(place), "pid": os.getpid()})
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def tell(self, message: dict[str, Any], parts: Any = ()) -> None:
        try:
            self.line.send(message, parts)
        except Broken:
            os._exit(0)

    def hear(self, line: Line) -> None:
        """Until the front is gone."""
        while True:
            self.take(*line.receive())

    def take(self, message: dict[str, Any], parts: list[bytes]) -> None:
        """Begin with what the front wants."""
        if message["do"] in ("check", "preflight"):
            self.checks.submit(self._answer, message, parts)
        elif message["do"] == "draw":
            stop = self.stops[message["job"]] = threading.Event()
            threading.Thread(target=self._draw, args=(message, parts, stop), name=message["job"]).start()
        elif message["do"] == "cancel" and (found := self.stops.get(message["job"])) is not None:
            found.set()

    def stop(self) -> None:
        """Have everything end that is drawn."""
        for stop in list(self.stops.values()):
            stop.set()

    def _asked(self, message: dict[str, Any], parts: list[bytes]) -> Any:
        """(the complete request, what it will take, what is to be said of it), while its LoRAs are open."""
        from dataclasses import replace

        from sfumato.receipts.provenance import check_recipe
        from sfumato.serve.asked import request_of
        from sfumato.serve.worker.job import SUFFIXES
        from sfumato.video.write import check_shape

        opened = self.models[message["model"]]
        given = request_of(message["request"], dict(zip(message["files"], parts, strict=True)))
        request = opened.asked(given, message["kind"], message["loras"])
        adapters = opened.model.system.adapters
        notes = [] if adapters is None else [self.discreet(note) for note in adapters.notes(given)]
        if request.loras is None:
            request = replace(request, loras=() if adapters else None)
        kind = message["format"]
        if request.moves and request.frames and request.size:
            check_shape(kind, request.frames, request.size, "format")
        else:
            check_recipe(request, SUFFIXES[kind])
        return request, self.costs[message["model"]].expected(request, kind), notes

    def _answer(self, message: dict[str, Any], parts: list[bytes]) -> None:
        """What a request will take, or what of it will not survive; or the error that it is."""
        answer: dict[str, Any]
        try:
            with self.models[message["model"]].sent.opened(message["loras"]):
                request, expected, notes = self._asked(message, parts)
            if message["do"] == "preflight":
                answer = {"preflight": self._survives(message["model"], request)}
            else:
                tune = [use.to_json() for use in request.loras or ()]
                answer = {"expected": expected.to_json(), "sampler_steps": expected.steps, "tune": tune}
                answer["notes"] = notes
        except Exception as error:
            answer = {"error": told(error, self.discreet)}
        self.tell({"is": "checked", "number": message["number"], **answer})

    def _survives(self, name: str, request: Any) -> dict[str, Any]:
        from sfumato.serve.worker.preflight import Preflights

        if name not in self.preflights:
            spec = next(spec for spec in self.specs if spec.name == name)
            self.preflights[name] = Preflights(spec, self.models[name].model, self.together.bench)
        return self.preflights[name].of(request)

    def _draw(self, message: dict[str, Any], parts: list[bytes], stop: threading.Event) -> None:
        from sfumato.serve.worker.job import Job

        name = message["job"]
        try:
            with self.models[message["model"]].sent.opened(message["loras"]):
                request, expected, _ = self._asked(message, parts)
                job = Job(
                    name,
                    self.models[message["model"]].shared,
                    request,
                    expected,
                    message["format"],
                    message["looks"],
                    message["look_format"],
                    time.monotonic() + message["left"],
                    self.tell,
                    stop,
                    self.costs[message["model"]].joules,
                )
                spent = job.draw(self.together)
            self.costs[message["model"]].learn(expected, spent)
        except Exception as error:
            self.tell({"is": "failed", "job": name, "error": told(error, self.discreet)})
        finally:
            self.stops.pop(name, None)

    def _warm(self, name: str) -> None:
        """Draw once, so that the first client does not wait for what is only made then, and seconds are known."""
        from sfumato.serve.worker.models import shortest

        opened = self.models[name]
        request = opened.model.complete(shortest(opened.model))
        try:
            expected = self.costs[name].expected(request)
        except InputError as error:
            why = str(error).partition(";")[0]
            raise InputError(
                f"{name} cannot be served: {why}; give more by --memory", argument="memory"
            ) from None
        for _ in range(2):
            self.together.bench.spent()
            opened.shared.generate(request)
            self.together.leave()
        self.costs[name].learn(expected, self.together.bench.spent())

    def _pulse(self) -> None:
        from sfumato.memory import resident

        while True:
            together = self.together
            counts = {"calls": together.calls, "rows": together.called_rows}
            self.tell({"is": "pulse", "jobs": len(self.stops), "resident": resident(), **counts})
            time.sleep(PULSE)


def _step_back() -> None:
    """Have the front go first. On Linux threads have a niceness each, and those that draw are there already."""
    tasks = Path("/proc/self/task")
    with contextlib.suppress(OSError):
        if not tasks.is_dir():
            os.nice(NICE)
            return
        for task in tasks.iterdir():
            thread = int(task.name)
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


def told(error: BaseException, discreet: Callable[[str], str] = str) -> dict[str, Any]:
    """An error as the API tells it. What nobody expected is logged here and told without its insides.

    discreet: takes out of a message what clients are not to know; the server's keeper may know all.
    """
    if isinstance(error, InputError):
        return {"code": error.code, "message": discreet(str(error)), "param": error.argument, "client": True}
    if isinstance(error, SfumatoError):
        return {"code": error.code, "message": discreet(str(error)), "param": None, "client": False}
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        log.warning("out of memory: %s", error)
        message = "the device had not enough memory for this job; ask for fewer or smaller pictures"
        return {"code": "out_of_memory", "message": message, "param": None, "client": False}
    log.error("drawing failed", exc_info=error)
    message = f"drawing failed ({type(error).__name__}); the server's log says more"
    return {"code": "internal", "message": message, "param": None, "client": False}
