"""Preflights as HTML pages that need nothing else: a picture's map of losses, a folder's table that can be sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

import numpy as np
from PIL import Image

from sfumato.fidelity.instrument import Picture
from sfumato.fidelity.page import STYLE, data_url
from sfumato.fidelity.preflight import Finding, Preflight
from sfumato.fidelity.prompt import Wish
from sfumato.fidelity.regions.region import KINDS

SHOWN = 560  # pixels of a picture's longer side on the page
SMALL = 160  # of the pictures in a table
SORT = """
for (const head of document.querySelectorAll('th[data-sort]')) head.onclick = () => {
  const table = head.closest('table'), at = [...head.parentNode.children].indexOf(head);
  const down = head.dataset.sort = head.dataset.sort === 'down' ? 'up' : 'down';
  const value = row => { const v = (row.children[at] || row.lastChild).dataset.value; return isNaN(v) ? v : +v; };
  const rows = [...table.tBodies[0].rows].sort((a, b) => (value(a) > value(b) ? 1 : -1) * (down === 'up' ? -1 : 1));
  table.tBodies[0].append(...rows);
};
"""


def picture_page(report: Preflight) -> str:
    """One picture: where its regions are, what each loses and why, and what would help."""
    return _page(f"Preflight: {report.name}", _one(report, SHOWN))


def shrunk(report: Preflight) -> Preflight:
    """The same with its pictures no larger than a page shows them: of a whole folder they would fill the memory."""
    picture, after = (None if p is None else _shown(p, SHOWN) for p in (report.picture, report.after))
    return replace(report, picture=picture, after=after)


def folder_page(reports: Sequence[Preflight], model: str, unread: Sequence[Mapping[str, str]] = ()) -> str:
    """Many pictures: a table, worst first, whose columns sort, and below it each picture that loses something.

    unread: those that cannot be read: `picture` and `error` of each.
    """
    ordered = sorted(reports, key=lambda report: report.score)
    columns = ("picture", "score", "lost", "worn", "kept", "worst region")
    head = "<th></th>" + "".join(f'<th data-sort="">{column}</th>' for column in columns)
    body = "".join(
        f'<tr class=lost><td></td><td data-value="{escape(each["picture"])}">{escape(each["picture"])}</td>'
        f'<td data-value="-1" colspan=5>cannot be read: {escape(each["error"])}</td></tr>'
        for each in unread
    )
    body += "".join(_row(number, report) for number, report in enumerate(ordered))
    parts = "".join(
        f'<section id="p{number}"><h2>{escape(report.name)}</h2>{_one(report, SHOWN)}</section>'
        for number, report in enumerate(ordered)
        if report.count("lost") + report.count("worn")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _page(
        f"Preflight of {len(reports) + len(unread)} pictures with {model}",
        table + parts + f"<script>{SORT}</script>",
    )


def prompt_page(prompt: str, size: tuple[int, int], model: str, score: float, wishes: Sequence[Wish]) -> str:
    """A prompt: what it asks for that takes room."""
    rows = "".join(
        f"<tr class={wish.to_dict()['verdict']}><td>{escape(wish.what)}</td><td>{wish.loss:.2f}</td>"
        f"<td>{escape(wish.reason)}</td><td>{_list(wish.helps)}</td></tr>"
        for wish in wishes
    )
    table = f"<table><tr><th>it asks for</th><th>told wrong</th><th>why</th><th>what helps</th></tr>{rows}</table>"
    said = f"<p>“{escape(prompt)}” at {size[0]}x{size[1]} with {escape(model)}: <b>{score:g}</b> of 100</p>"
    return _page(
        "Preflight of a prompt", said + (table if wishes else "<p>Nothing in it takes much room.</p>")
    )


def _page(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1>{body}</html>\n"
    )


def _one(report: Preflight, side: int) -> str:
    width, height = report.size
    boxes = "".join(_box(number, finding, width, height) for number, finding in enumerate(report.findings, 1))
    rows = "".join(_finding(number, finding) for number, finding in enumerate(report.findings, 1))
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in report.notes)
    shown = ""
    if report.picture is not None:
        shown = f'<div class=map><img alt="" src="{data_url(_shown(report.picture, side))}">{boxes}</div>'
    if report.after is not None:
        shown += f'<img alt="as it comes back" src="{data_url(_shown(report.after, side))}">'
    pictures = f"<div class=two>{shown}</div>"
    table = (
        "<table><tr><th></th><th>what</th><th>foretold loss</th><th>measured</th><th>why</th><th>what helps</th></tr>"
        f"{rows}</table>"
    )
    return (
        f"<p>{width}x{height} with {escape(report.model)}: <b>{report.score:g}</b> of 100; "
        f"{report.count('lost')} lost, {report.count('worn')} worn, {report.count('kept')} kept</p>"
        f"{pictures}{table if rows else '<p>Nothing was found that is small or fine.</p>'}{notes}"
    )


def _box(number: int, finding: Finding, width: int, height: int) -> str:
    left, top, right, bottom = finding.region.box
    place = (
        f"left:{100 * left / width:.2f}%;top:{100 * top / height:.2f}%;"
        f"width:{100 * (right - left) / width:.2f}%;height:{100 * (bottom - top) / height:.2f}%"
    )
    return f'<a class={finding.verdict} style="{place}" title="{number}: {escape(KINDS[finding.region.kind])}"></a>'


def _finding(number: int, finding: Finding) -> str:
    read = ""
    if finding.before is not None:
        read = f"<br><span class=note>reads “{escape(finding.before)}”"
        read += "</span>" if finding.after is None else f", then “{escape(finding.after)}”</span>"
    run = "" if finding.measured is None else f"{finding.measured:.2f}"
    return (
        f"<tr class={finding.verdict}><td>{number}</td><td>{escape(KINDS[finding.region.kind])}{read}</td>"
        f"<td>{finding.predicted:.2f}</td><td>{run}</td><td>{escape(finding.reason)}</td><td>{_list(finding.helps)}</td></tr>"
    )


def _row(number: int, report: Preflight) -> str:
    worst = KINDS[report.findings[0].region.kind] if report.findings else ""
    image = "" if report.picture is None else f'<img alt="" src="{data_url(_shown(report.picture, SMALL))}">'
    values = (
        report.name,
        report.score,
        report.count("lost"),
        report.count("worn"),
        report.count("kept"),
        worst,
    )
    cells = "".join(f'<td data-value="{escape(str(v))}">{escape(str(v))}</td>' for v in values)
    return f'<tr><td><a href="#p{number}">{image}</a></td>{cells}</tr>'


def _list(helps: Sequence[str]) -> str:
    return "<br>".join(escape(each) for each in helps)


def _shown(picture: Picture, side: int) -> Picture:
    """The picture at most `side` pixels long; small ones in whole steps larger, so that pixels stay square."""
    height, width = picture.shape[:2]
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    if max(width, height) > side:
        scale = side / max(width, height)
        image = image.resize(
            (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
        )
    elif (steps := side // max(width, height)) > 1:
        image = image.resize((width * steps, height * steps), Image.Resampling.NEAREST)
    return np.asarray(image, np.float32) / 255
