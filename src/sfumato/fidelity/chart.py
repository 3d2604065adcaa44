"""The chart of an autoencoder: its sections measured, and the limits that they tell, in pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sfumato.errors import InputError
from sfumato.fidelity import sections, things
from sfumato.fidelity.instrument import Instrument
from sfumato.fidelity.ocr import MISSING, Reader
from sfumato.fidelity.predict import Transfer, Waves, predict
from sfumato.fidelity.signal import CHANNELS
from sfumato.fidelity.words import CAPITALS

FORMAT = "sfumato chart 2"
HALF = 0.5  # of a contrast: what is kept less is called lost
READ = 0.9  # of letters, shapes or colours told right: what is told more often is called legible
Row = dict[str, Any]
# name of a section to what is said while it is measured
SECTIONS: Mapping[str, str] = {
    "gratings": "gratings",
    "edges": "edges",
    "star": "star",
    "checkers": "checkerboards",
    "lines": "lines",
    "objects": "objects",
    "text": "words",
    "colour": "colours",
    "noise": "noise",
}


@dataclass(frozen=True)
class Chart:
    """What an autoencoder keeps. model: as the user calls it. digest: SHA-256 of its weights. sections: rows of
    plain numbers by section, see `sections.py`. reader: the OCR engine that read the words, "" where none did.
    """

    model: str
    digest: str
    factor: int
    channels: int
    precision: str
    reader: str
    sections: Mapping[str, list[Row]]
    version: str

    @property
    def limits(self) -> dict[str, float | None]:
        return limits(self)

    def rows(self, section: str, **where: Any) -> list[Row]:
        """The rows of a section in which these fields have these values."""
        return [row for row in self.sections[section] if all(row[name] == v for name, v in where.items())]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers with four digits, with the limits and what is missing."""
        notes = [] if self.reader else [MISSING]
        whole = {"format": FORMAT, **asdict(self), "limits": self.limits, "notes": notes}
        return _rounded(whole)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the chart") -> Chart:
        """Read what `to_dict` gave. `InputError` when it is of another format or lacks a section."""
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise InputError(f"{source} is no chart of this version; measure again with `sfumato chart`")
        try:
            chart = cls(**{name: values[name] for name in cls.__dataclass_fields__})
            if set(chart.sections) != set(SECTIONS):
                raise KeyError("sections")
            limits(chart)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{source} is damaged or incomplete: {error!r}; measure again") from None
        return chart


def measure(
    instrument: Instrument,
    reader: Reader | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Chart:
    """Show the instrument every target. on_progress: hears (section, pictures done, pictures in all)."""
    import sfumato

    found: dict[str, list[Row]] = {}
    for name, doing in SECTIONS.items():

        def told(done: int, total: int, doing: str = doing) -> None:
            if on_progress is not None:
                on_progress(doing, done, total)

        if name == "text":
            found[name] = things.text(instrument, foretell(found), reader, told)
        elif name == "lines":
            found[name] = things.lines(instrument, foretell(found), told)
        elif name == "objects":
            found[name] = things.objects(instrument, foretell(found), told)
        else:
            found[name] = getattr(sections, name)(instrument, told)
    return Chart(
        instrument.name,
        instrument.digest,
        instrument.factor,
        instrument.channels,
        instrument.precision,
        reader.name if reader is not None else "",
        found,
        sfumato.__version__,
    )


def foretell(measured: Mapping[str, list[Row]]) -> things.Foretell:
    """What the gratings say, uncorrected, that a picture will lose."""
    transfer = Transfer.of({"gratings": measured["gratings"]})
    return lambda picture: predict(Waves.of(picture), transfer)


def named(chart: Chart, name: str) -> Chart:
    """The same measurements under what the user calls the model now."""
    return replace(chart, model=name)


def limits(chart: Chart) -> dict[str, float | None]:
    """What the chart comes to. Sizes in pixels; None where even the largest target did not pass.

    finest_…: period of the finest grating of full contrast of which half is kept, at the worse of its angles. text_…:
    font size (em) from which 90 % of letters are read right, by the engine where there is one, else by shape.
    """
    found: dict[str, float | None] = {}
    for channel in CHANNELS:
        angles = sorted({row["angle"] for row in chart.rows("gratings", channel=channel)})
        cuts = [_cutoff(chart, channel, angle) for angle in angles]
        periods = [None if cut is None else 1 / cut for cut in cuts]
        found[f"finest_{channel.replace('-', '_')}"] = (
            None if None in periods else max(p for p in periods if p is not None)
        )
    for name, weight, contrast in (
        ("text", "regular", 1.0),
        ("text_bold", "bold", 1.0),
        ("text_half_contrast", "regular", 0.5),
        ("text_quarter_contrast", "regular", 0.25),
    ):
        found[name] = legible(chart, weight, contrast)
    found["capitals"] = None if found["text"] is None else found["text"] * CAPITALS
    found["line"] = crossing(_by("thickness", chart.rows("lines", contrast=0.9), "kept"), HALF)
    found["faint_line"] = crossing(_by("thickness", chart.rows("lines", contrast=0.3), "kept"), HALF)
    found["object"] = crossing(_by("size", chart.rows("objects"), "shape"), READ)
    found["object_colour"] = crossing(_by("size", chart.rows("objects"), "colour"), READ)
    found["checker"] = crossing(_by("cell", chart.rows("checkers"), "kept"), HALF)
    luma = chart.rows("edges", channel="luma", contrast=0.8)
    found["edge"] = float(np.mean([row["rise"] for row in luma]))
    found["overshoot"] = float(np.mean([row["overshoot"] for row in luma]))
    found["bend"] = max(row["bend"] for row in chart.rows("lines", contrast=0.9) if row["thickness"] >= 3)
    found["colour_mean"] = float(np.mean([row["delta_e"] for row in chart.rows("colour")]))
    found["colour_worst"] = max(row["delta_e"] for row in chart.rows("colour"))
    found["noise_kept"] = chart.rows("noise")[-2]["kept"]
    found["position"] = max(
        (row["mtf_high"] - row["mtf_low"] for row in chart.rows("gratings", channel="luma", contrast=0.9)),
        default=0.0,
    )
    return found


def text_score(chart: Chart) -> str:
    """The column of the text section that says what was read: by the engine where there was one."""
    return "ocr" if chart.reader else "letters"


def legible(chart: Chart, weight: str = "regular", contrast: float = 1.0) -> float | None:
    """The font size (em) in pixels from which words are read; what the engine itself cannot read does not count."""
    rows = chart.rows("text", weight=weight, contrast=contrast)
    score = text_score(chart)
    return crossing([(row["size"], row[score]) for row in rows], READ)


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """The size from which all sizes reach `level`: between two measured sizes by the straight line, or the smallest
    measured if that reaches it; None if the largest does not."""
    points = sorted(points)
    if not points or points[-1][1] < level:
        return None
    below = [index for index, (_, value) in enumerate(points) if value < level]
    if not below:
        return float(points[0][0])
    (x0, y0), (x1, y1) = points[below[-1]], points[below[-1] + 1]
    return float(x0 + (x1 - x0) * (level - y0) / (y1 - y0))


def _cutoff(chart: Chart, channel: str, angle: float) -> float | None:
    """The frequency up to which at least half of the contrast of strong gratings is kept."""
    rows = chart.rows("gratings", channel=channel, contrast=0.9, angle=angle)
    points = [(-row["frequency"], min(row["mtf"], 1.0)) for row in rows]
    found = crossing(points, HALF)
    return None if found is None else -found


def _by(size: str, rows: list[Row], value: str) -> list[tuple[float, float]]:
    """(size, mean value over the rows of that size)."""
    sizes = sorted({row[size] for row in rows})
    return [(s, float(np.mean([row[value] for row in rows if row[size] == s]))) for s in sizes]


def _rounded(value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.4g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value]
