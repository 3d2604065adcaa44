"""A chart as one HTML page that needs nothing else, as a picture, as PDF, and as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.errors import InputError
from sfumato.fidelity import draw
from sfumato.fidelity.chart import Chart
from sfumato.fidelity.instrument import Picture
from sfumato.fidelity.specimens import Specimen
from sfumato.fidelity.table import notes_of, rows_of
from sfumato.storage import atomic_file

KINDS = (".html", ".png", ".pdf", ".json")
STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#222}
h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #e4e4e4;vertical-align:top}th{font-weight:600}
.note{color:#666;font-size:.9rem}img{max-width:100%}
.grid{display:grid;gap:.6rem}.grid img{image-rendering:pixelated;width:100%}
figure{margin:0}figcaption{font-size:.8rem;color:#666}
svg{max-width:100%;height:auto}.two{display:flex;gap:1rem;flex-wrap:wrap;align-items:flex-start}
.lost{background:#fbe3de}.worn{background:#fdf3d6}.kept{background:#e6f2e3}
.map{position:relative;display:inline-block}.map a{position:absolute;border:2px solid;box-sizing:border-box}
a.lost{border-color:#c4371d;background:#c4371d22}a.worn{border-color:#c79a14;background:#c79a1422}
a.kept{border-color:#3d7d3a;background:none}th[data-sort]{cursor:pointer;text-decoration:underline dotted}
"""


def write(charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]], place: Path) -> list[Path]:
    """Write all four into a folder, or the one that a file's ending names. The paths written.

    `InputError` for another ending. Each file appears whole or not at all.
    """
    if place.suffix.lower() in KINDS:
        wanted = {place.suffix.lower(): place}
    elif place.suffix and not place.is_dir():
        raise InputError(
            f"output must be a folder or end in {', '.join(KINDS)}, not {place.suffix!r}", argument="output"
        )
    else:
        wanted = {ending: place / f"chart{ending}" for ending in KINDS}
    makers = {
        ".json": lambda: text_of(charts).encode(),
        ".html": lambda: html(charts, seen).encode(),
        ".png": lambda: _saved(charts, seen, "png"),
        ".pdf": lambda: _saved(charts, seen, "pdf"),
    }
    for ending, file in wanted.items():
        made = makers[ending]()
        with atomic_file(file) as temporary:
            temporary.write_bytes(made)
    return list(wanted.values())


def check_place(place: Path) -> None:
    """`InputError`, before anything is measured, for a place that `write` would refuse."""
    if place.suffix and place.suffix.lower() not in KINDS and not place.is_dir():
        raise InputError(
            f"output must be a folder or end in {', '.join(KINDS)}, not {place.suffix!r}", argument="output"
        )
    if place.suffix.lower() not in KINDS and place.is_file():
        raise InputError(
            f"output {str(place)!r} is a file; name a folder or one of {', '.join(KINDS)}", argument="output"
        )


def text_of(charts: Sequence[Chart]) -> str:
    """One chart as its JSON, several as a list of them."""
    values = [chart.to_dict() for chart in charts]
    return json.dumps(values[0] if len(values) == 1 else values, ensure_ascii=False) + "\n"


def html(charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]]) -> str:
    """The page: limits, plots, test pictures, and how to read them."""
    names = ", ".join(chart.model for chart in charts)
    head = "".join(
        f"<th>{escape(chart.model)}<br><span class=note>{chart.factor}×{chart.factor} px a cell, {chart.channels} "
        f"channels, {escape(chart.precision)}</span></th>"
        for chart in charts
    )
    rows = "".join(
        f"<tr><td>{escape(words)}</td>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for words, cells in rows_of(charts)
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>{escape(names)}: what is kept</title>
<style>{STYLE}</style><h1>What the autoencoder keeps</h1>
<p class=note>Test pictures go in and come back; sizes are pixels of the picture.
{escape(" ".join(f"{note}." for note in notes_of(charts)))}</p>
<table><tr><th></th>{head}</tr>{rows}</table>
<h2>Plots</h2>{_svg(charts)}
<p class=note>Bands are the extremes over places in a latent cell. Dotted levels: half of the contrast; nine of ten
letters, shapes or colours. False bands are coarse light and dark where fine squares were.</p>
{_grids(charts, seen)}</html>
"""


def data_url(picture: Picture) -> str:
    """A picture (H, W, 3) or (H, W) in [0, 1] as a PNG in a URL."""
    buffer = io.BytesIO()
    Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grids(charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]]) -> str:
    if not seen:
        return ""
    columns = f"grid-template-columns:repeat({len(seen[0])},1fr)"
    parts = [("As drawn", [(s.name, s.before) for s in seen[0]])]
    parts += [
        (chart.model, [(s.name, s.after) for s in each]) for chart, each in zip(charts, seen, strict=True)
    ]
    return "".join(
        f'<h2>{escape(title)}</h2><div class=grid style="{columns}">'
        + "".join(
            f'<figure><img alt="{escape(name)}" src="{data_url(picture)}">'
            f"<figcaption>{escape(name)}</figcaption></figure>"
            for name, picture in pictures
        )
        + "</div>"
        for title, pictures in parts
    )


def _svg(charts: Sequence[Chart]) -> str:
    buffer = io.StringIO()
    draw.plots(charts).savefig(buffer, format="svg", metadata={"Date": None})
    whole = buffer.getvalue()
    return whole[whole.index("<svg") :]


def _saved(charts: Sequence[Chart], seen: Sequence[Sequence[Specimen]], kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    draw.page(charts, seen).savefig(buffer, format=kind, dpi=110, metadata=metadata)
    return buffer.getvalue()
