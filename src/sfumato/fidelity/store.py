"""Charts that were measured before, by the hash of the weights and the precision: beside a model, or in a cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sfumato.errors import InputError
from sfumato.fidelity.chart import Chart, named
from sfumato.fidelity.instrument import Instrument
from sfumato.storage import cache_folder, write_json

BESIDE = "chart*.json"  # in a model's folder: one for each precision


def find(instrument: Instrument, any_precision: bool = False) -> Chart | None:
    """The chart of these very weights in this precision, if there is one; one that cannot be read is none.

    any_precision: where there is none, that of another precision will do.
    """
    charts = [chart for chart in map(read, _places(instrument)) if chart is not None]
    mine = [chart for chart in charts if chart.digest == instrument.digest]
    same = [chart for chart in mine if chart.precision == instrument.precision]
    best = same or (mine if any_precision else [])
    return named(best[0], instrument.name) if best else None


def keep(chart: Chart) -> Path | None:
    """Put a chart into the cache; where that cannot be written there is none, and None is given."""
    place = cache_folder("charts") / f"{chart.digest}-{chart.precision}.json"
    try:
        write_json(place, chart.to_dict())
    except OSError:
        return None
    return place


def known(other_than: str) -> list[Chart]:
    """A chart of each autoencoder at hand but that of the weights with this hash: of packaged models, and the cache."""
    from sfumato.families import PACKAGED

    places = [place for folder in PACKAGED.values() for place in sorted(folder.glob(BESIDE), reverse=True)]
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


def _places(instrument: Instrument) -> Iterator[Path]:
    """Where a chart of these weights may lie, that of the same precision first."""
    cache = cache_folder("charts")
    yield cache / f"{instrument.digest}-{instrument.precision}.json"
    if instrument.folder is not None:
        yield from sorted(instrument.folder.glob(BESIDE))
    if cache.is_dir():
        yield from sorted(cache.glob(f"{instrument.digest}-*.json"))
