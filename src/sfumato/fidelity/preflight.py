"""Before a picture goes through an autoencoder: which of its regions will not survive, why, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.advice import helps, reason
from sfumato.fidelity.chart import Chart
from sfumato.fidelity.instrument import Instrument, Picture
from sfumato.fidelity.ocr import Reader, without
from sfumato.fidelity.predict import LOST, WORN, Transfer, Waves, measured, predict
from sfumato.fidelity.regions import faces
from sfumato.fidelity.regions.find import find
from sfumato.fidelity.regions.region import KINDS, Region

SURE = 0.5  # of an engine that a region found as text is text
VERDICTS = ((LOST, "lost"), (WORN, "worn"), (0.0, "kept"))


@dataclass(frozen=True)
class Finding:
    """A region, what it is foretold to lose and what it lost, each 0 to 1 (None where nothing was run), why, and what
    would help. before, after: what an OCR engine reads of a line of text."""

    region: Region
    predicted: float
    measured: float | None
    reason: str
    helps: tuple[str, ...]
    before: str | None = None
    after: str | None = None

    @property
    def loss(self) -> float:
        return self.predicted if self.measured is None else self.measured

    @property
    def verdict(self) -> str:
        return verdict(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        box = dict(zip(("left", "top", "right", "bottom"), self.region.box, strict=True))
        values = {
            "kind": self.region.kind,
            "name": KINDS[self.region.kind],
            "box": box,
            "size": round(self.region.size, 1),
            "predicted_loss": round(self.predicted, 3),
            "measured_loss": None if self.measured is None else round(self.measured, 3),
            "verdict": self.verdict,
            "reason": self.reason,
            "helps": list(self.helps),
        }
        return (
            values
            if self.before is None
            else values | {"reads_before": self.before, "reads_after": self.after}
        )


@dataclass(frozen=True)
class Preflight:
    """All findings of one picture. after: the picture as it came back, if it was run."""

    name: str
    model: str
    size: tuple[int, int]
    findings: tuple[Finding, ...]
    whole: tuple[float, float | None]  # predicted and measured loss of the picture as one region
    notes: tuple[str, ...] = ()
    picture: Picture | None = field(default=None, repr=False)
    after: Picture | None = field(default=None, repr=False)

    @property
    def score(self) -> float:
        """0 to 100: what is left of the region that loses most; of the whole picture where nothing was found."""
        predicted, run = self.whole
        alone = predicted if run is None else run
        return round(100 * (1 - max((finding.loss for finding in self.findings), default=alone)), 1)

    def count(self, verdict: str) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "picture": self.name,
            "model": self.model,
            "size": list(self.size),
            "score": self.score,
            "lost": self.count("lost"),
            "worn": self.count("worn"),
            "kept": self.count("kept"),
            "whole": {
                "predicted_loss": round(self.whole[0], 3),
                "measured_loss": None if self.whole[1] is None else round(self.whole[1], 3),
            },
            "regions": [finding.to_dict() for finding in self.findings],
            "notes": list(self.notes),
        }


def verdict(loss: float) -> str:
    """ "lost" from 0.5 on, "worn" from 0.25 on, else "kept"."""
    return next(word for least, word in VERDICTS if loss >= least)


def preflight(
    picture: Picture,
    instrument: Instrument,
    chart: Chart,
    *,
    name: str = "",
    run: bool = True,
    reader: Reader | None = None,
    others: Sequence[Chart] = (),
    redrawn: NDArray[np.bool_] | None = None,
) -> Preflight:
    """Find the regions of a picture (H, W, 3) in [0, 1], foretell what each loses, and measure it.

    run: put the picture through the autoencoder too; without, losses are foretold alone. reader: an OCR engine, which
    also says whether what looks like text is. others: charts of other models that might keep more.
    redrawn: (H, W), true where the picture is painted over; elsewhere it comes back as it was.
    """
    before = np.asarray(picture, np.float64)
    height, width = before.shape[:2]
    after = instrument.picture(np.asarray(picture, np.float32)).astype(np.float64) if run else None
    if after is not None and redrawn is not None:
        after = np.where(redrawn[..., None], after, before)
    transfer = Transfer.of(chart.sections)
    elsewhere = [(other.model, Transfer.of(other.sections)) for other in others]
    found = []
    for region in find(before):
        where = _where(region)
        if redrawn is not None and not redrawn[where].any():
            continue
        read_before = read_after = None
        if region.kind == "text" and reader is not None:
            read_before, sure = reader.read(before[where])
            if sure < SURE or sum(letter.isalnum() for letter in read_before) < 2:
                region, read_before = _no_text(region), None
            elif after is not None:
                read_after = reader.read(after[where])[0]
        waves = Waves.of(before[where])
        loss = predict(waves, transfer, region.kind)
        found.append(
            Finding(
                region,
                loss,
                None if after is None else measured(before[where], after[where]),
                reason(region, chart),
                helps(region, waves, loss, chart, transfer, (width, height), elsewhere),
                read_before,
                read_after,
            )
        )
    whole = Waves.of(before)
    return Preflight(
        name,
        instrument.name,
        (width, height),
        tuple(sorted(found, key=lambda finding: -finding.loss)),
        (predict(whole, transfer), None if after is None else measured(before, after)),
        tuple(_notes(reader)),
        picture,
        None if after is None else after.astype(np.float32),
    )


def keep_mask(report: Preflight) -> Picture:
    """(H, W), 0 where a region that is not kept lies and 1 elsewhere: what may be painted, as `--mask` takes it."""
    width, height = report.size
    mask = np.ones((height, width), np.float32)
    for finding in report.findings:
        if finding.verdict != "kept":
            mask[_where(finding.region)] = 0
    return mask


def _where(region: Region) -> tuple[slice, slice]:
    left, top, right, bottom = region.box
    return slice(top, bottom), slice(left, right)


def _no_text(region: Region) -> Region:
    """What looked like text and is not read as any: detail."""
    left, top, right, bottom = region.box
    return Region("detail", region.box, float(max(right - left, bottom - top)))


def _notes(reader: Reader | None) -> list[str]:
    notes = []
    if reader is None:
        notes.append(without())
    if faces.cascade() is None:
        notes.append(faces.MISSING)
    return notes
