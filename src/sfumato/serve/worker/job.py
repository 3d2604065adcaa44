"""One request drawn: its progress told, looks at the picture forming, stopped when it is to stop."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sfumato.errors import Cancelled, SfumatoError
from sfumato.receipts import clips
from sfumato.receipts.provenance import encoded, recipe_of
from sfumato.sampling import Step
from sfumato.serve.worker.costs import Expected
from sfumato.serve.worker.together import Spent, Together
from sfumato.types import Request, Result

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
Tell = Callable[[dict[str, Any], Sequence[bytes]], None]


class TooLate(SfumatoError):
    """A job's deadline has passed."""

    code = "deadline_exceeded"


@dataclass(frozen=True)
class Job:
    """What is drawn. request: complete. looks: how many pictures of it forming are wanted, of what format.

    deadline: by `time.monotonic`. tell: hears messages for the front. stop: set to cancel. joules: of seconds.
    """

    id: str
    model: Any
    request: Request
    expected: Expected
    format: str
    looks: int
    look_format: str
    deadline: float
    tell: Tell
    stop: threading.Event
    joules: Callable[[float], float | None]

    def draw(self, together: Together) -> Spent:
        """Draw it and tell the front; returns the device's seconds. Raises what drawing raises, `Cancelled`, `TooLate`.

        Whoever waits for this thread's calls of the network is let go when its sampler is done, however it ends.
        """
        together.bench.spent()  # of an earlier job in a thread of this number
        done, shown, total = 0, 0, self.expected.steps

        def hear(step: Step) -> None:
            nonlocal done, shown
            done += 1
            if step.index + 1 == step.total:
                together.leave()
            self._check()
            self.tell({"is": "step", "job": self.id, "done": done, "total": total}, ())
            if shown < self.looks and done < total and done * (self.looks + 1) >= (shown + 1) * total:
                look = picture(self.model.preview(step.denoised), self.look_format)
                self.tell({"is": "look", "job": self.id, "number": shown}, (look,))
                shown += 1

        try:
            self._check()
            result = self.model.generate(self.request, on_step=hear)
        finally:
            together.leave()
        spent = together.bench.spent()
        seconds = {"network": round(spent.network, 4), "other": round(spent.other, 4)}
        receipt = {
            **self.expected.to_json(),
            "expected_seconds": round(self.expected.seconds, 4),
            "seconds": round(spent.network + spent.other, 4),
            "seconds_of": seconds,
            "joules": self.joules(spent.network + spent.other),
        }
        files = self._files(result, receipt)
        self.tell({"is": "done", "job": self.id, "receipt": receipt, "recipe": result.recipe}, files)
        return spent

    def _files(self, result: Result, receipt: dict[str, Any]) -> list[bytes]:
        """Each picture or clip with its recipe and its share of the receipt, as a file."""
        recipes = [recipe_of(result.recipe | {"receipt": receipt}, k) for k in range(self.request.count)]
        if result.clips:
            return [clips.encoded(*each, self.format) for each in zip(result.clips, recipes, strict=True)]
        suffix = SUFFIXES[self.format]
        return [encoded(*each, suffix) for each in zip(result.images, recipes, strict=True)]

    def _check(self) -> None:
        if self.stop.is_set():
            raise Cancelled("the job was cancelled")
        if time.monotonic() > self.deadline:
            raise TooLate("the job was not done before its deadline")


def picture(image: Image.Image, format: str) -> bytes:
    """A picture without a recipe, small."""
    stream = io.BytesIO()
    image.save(stream, "JPEG" if format == "jpeg" else format.upper(), quality=85)
    return stream.getvalue()
