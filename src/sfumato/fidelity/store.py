"""Charts that were measured before, by the hash of the weights: beside a model, or in the user's cache."""

from __future__ import annotations

import json
from pathlib import Path

from sfumato.errors import InputError
from sfumato.fidelity.chart import Chart, named
from sfumato.fidelity.instrument import Instrument
from sfumato.storage import cache_folder, write_json

BESIDE = "chart.json"  # in a model's folder


def find(instrument: Instrument) -> Chart | None:
    """The chart of these very weights, if there is one; one that cannot be read is none."""
    places = [cache_folder("charts") / f"{instrument.digest}.json"]
    if instrument.folder is not None:
        places.append(instrument.folder / BESIDE)
    for place in places:
        chart = read(place)
        if chart is not None and chart.digest == instrument.digest:
            return named(chart, instrument.name)
    return None


def keep(chart: Chart) -> Path | None:
    """Put a chart into the cache; where that cannot be written there is none, and None is given."""
    place = cache_folder("charts") / f"{chart.digest}.json"
    try:
        write_json(place, chart.to_dict())
    except OSError:
        return None
    return place


def known(other_than: str) -> list[Chart]:
    """All charts at hand but that of the weights with this hash: of packaged models, and of the cache."""
    from sfumato.families import PACKAGED

    places = [folder / BESIDE for folder in PACKAGED.values()]
    if cache_folder("charts").is_dir():
        places += sorted(cache_folder("charts").glob("*.json"))
    charts = {chart.digest: chart for chart in map(read, places) if chart is not None}
    charts.pop(other_than, None)
    return list(charts.values())


def read(place: Path) -> Chart | None:
    """The chart in a file, None where there is none that can be used."""
    try:
        return Chart.from_dict(json.loads(place.read_text(encoding="utf-8")), str(place))
    except (OSError, ValueError, RecursionError, InputError):
        return None
