"""What of a request will not survive a model's autoencoder, told by its chart (`sfumato.fidelity`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sfumato import checks
from sfumato.errors import InputError
from sfumato.fidelity import store
from sfumato.fidelity.advice import MASK
from sfumato.fidelity.instrument import open_instrument
from sfumato.fidelity.preflight import preflight
from sfumato.fidelity.prompt import examine, score
from sfumato.generate import Model
from sfumato.serve.settings import ModelSpec
from sfumato.serve.worker.together import Bench
from sfumato.tasks.canvas import Canvas, canvas, in_image
from sfumato.types import Request

MOTION = "each frame is looked at as a picture; what is lost in motion is not foretold"
WORDS = "without a picture to begin with it is told by the words of the prompt alone"
MOST_PIXELS = 4 * 2**20  # of a picture that is looked at while others wait for an answer


class Preflights:
    """Of one model, whose autoencoder is opened beside it. `InputError` if it has no chart."""

    def __init__(self, spec: ModelSpec, model: Model, bench: Bench):
        found = open_instrument(spec.source, str(model.device), dtype=model.dtype, vae=spec.vae)
        chart = store.find(found, any_precision=True)
        if chart is None:
            raise InputError(
                f"the model {checks.shown(spec.name)} has no chart; its server's keeper makes one by `sfumato chart`"
            )
        self.name, self.chart, self.bench, self.instrument = spec.name, chart, bench, found

    def of(self, request: Request) -> dict[str, Any]:
        """Of a complete request: its prompt and, if it begins with a picture, that as it is drawn on. Plain JSON."""
        assert request.size is not None
        wishes = examine(request.prompt, request.size, self.chart)
        answer: dict[str, Any] = {
            "object": "preflight",
            "model": self.name,
            "prompt": {"score": score(wishes), "wishes": [wish.to_dict() for wish in wishes]},
            "picture": None,
            "notes": [MOTION] * request.moves,
        }
        drawn_on = canvas(request)
        if drawn_on is not None:
            answer["picture"] = self._picture(request, drawn_on)
        elif request.moves:
            answer["notes"].append(WORDS)
        scores = [told["score"] for told in (answer["prompt"], answer["picture"]) if told is not None]
        return answer | {"score": min(scores)}

    def _picture(self, request: Request, drawn_on: Canvas) -> dict[str, Any]:
        """Of the picture at the size that it is drawn at; boxes are of the picture as it was sent, `image_size`."""
        assert request.image is not None
        picture = drawn_on.picture
        if picture.width * picture.height > MOST_PIXELS:
            raise InputError(f"a preflight looks at {MOST_PIXELS:,} pixels at most", argument="image")
        pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
        left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
        redrawn = np.zeros((picture.height, picture.width), bool)  # of what was sent, not around it
        redrawn[top : picture.height - bottom, left : picture.width - right] = True
        if drawn_on.weight is not None:  # what the mask leaves black comes back
            redrawn &= np.asarray(drawn_on.mask) > 0
        report = self.bench.do(
            lambda: preflight(pixels, self.instrument, self.chart, name="image", redrawn=redrawn)
        )
        boxes = [in_image(request, drawn_on, found.region.box) for found in report.findings]
        findings = tuple(
            replace(found, region=replace(found.region, box=box), helps=_possible(found.helps, request))
            for found, box in zip(report.findings, boxes, strict=True)
            if box[0] < box[2] and box[1] < box[3]  # else it is of what was filled in beside the picture
        )
        told = replace(report, findings=findings).to_dict()
        return {**told, "model": self.name, "image_size": list(request.image.size)}


def _possible(helps: tuple[str, ...], request: Request) -> tuple[str, ...]:
    """What helps, without what a clip cannot have."""
    return tuple(way for way in helps if way != MASK or not request.moves)
