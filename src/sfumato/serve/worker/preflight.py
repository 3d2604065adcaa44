"""What of a request will not survive a model's autoencoder, told by its chart (`sfumato.fidelity`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfumato.errors import InputError
from sfumato.fidelity import store
from sfumato.fidelity.instrument import open_instrument
from sfumato.fidelity.preflight import preflight
from sfumato.fidelity.prompt import examine, score
from sfumato.generate import Model
from sfumato.serve.settings import ModelSpec
from sfumato.serve.worker.together import Bench
from sfumato.types import Request

MOST_PIXELS = 4 * 2**20  # of a picture that is looked at while others wait for an answer


class Preflights:
    """Of one model, whose autoencoder is opened beside it. `InputError` if it has no chart."""

    def __init__(self, spec: ModelSpec, model: Model, bench: Bench):
        found = open_instrument(spec.source, str(model.device), dtype=model.dtype, vae=spec.vae)
        chart = store.find(found, any_precision=True)
        if chart is None:
            raise InputError(
                f"the model {spec.name!r} has no chart; its server's keeper makes one by `sfumato chart`"
            )
        self.name, self.chart, self.bench, self.instrument = spec.name, chart, bench, found

    def of(self, request: Request) -> dict[str, Any]:
        """Of a complete request: its prompt and, if it begins with a picture, that. Plain JSON."""
        assert request.size is not None
        wishes = examine(request.prompt, request.size, self.chart)
        answer: dict[str, Any] = {
            "object": "preflight",
            "model": self.name,
            "prompt": {"score": score(wishes), "wishes": [wish.to_dict() for wish in wishes]},
            "picture": None,
        }
        image = request.image
        if image is not None:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"a preflight looks at {MOST_PIXELS:,} pixels at most", argument="image")
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
            report = self.bench.do(lambda: preflight(pixels, self.instrument, self.chart, name="image"))
            answer["picture"] = {**report.to_dict(), "model": self.name}
        scores = [answer["prompt"]["score"], *([answer["picture"]["score"]] if image is not None else [])]
        return answer | {"score": min(scores)}
