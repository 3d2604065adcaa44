"""How far the foretold losses can be trusted: against measured ones, region by region, on pictures no chart shows.

python -m sfumato.fidelity.validate -m pocket --each 15 --plot predicted.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.fidelity.chart import Chart
from sfumato.fidelity.heldout import KINDS, HeldOut, held_out
from sfumato.fidelity.instrument import Instrument
from sfumato.fidelity.predict import LOST
from sfumato.fidelity.preflight import preflight
from sfumato.fidelity.regions.region import Region, area, shared
from sfumato.pictures import decode, read_file

FOUND = 0.5  # of something placed that regions must cover for it to count as found


@dataclass(frozen=True)
class Judged:
    """A region of one of the pictures. within: the number of the picture."""

    kind: str
    of: str
    within: int
    predicted: float
    measured: float


def composed(each: int, first: int = 0) -> list[HeldOut]:
    """`each` pictures of every kind, beginning with that number."""
    return [held_out(kind, first + number) for kind in KINDS for number in range(each)]


def of_folder(folder: Path) -> list[HeldOut]:
    """The pictures of a folder, of which nobody says what is in them."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    images = (decode(read_file(file), str(file)) for file in files)
    return [HeldOut("folder", np.asarray(image, np.float64) / 255, ()) for image in images]


def judge(instrument: Instrument, chart: Chart, pictures: Sequence[HeldOut]) -> dict[str, Any]:
    """The regions found in pictures: what was foretold of them, and measured; and how much of what is placed in them
    was not found."""
    judged: list[Judged] = []
    placed: dict[str, list[bool]] = {}
    for within, shown in enumerate(pictures):
        report = preflight(shown.picture.astype(np.float32), instrument, chart)
        for finding in report.findings:
            run = 0.0 if finding.measured is None else finding.measured
            judged.append(Judged(finding.region.kind, shown.kind, within, finding.predicted, run))
        for what, there in seen(shown, [finding.region for finding in report.findings]):
            placed.setdefault(what, []).append(there)

    def by(name: str) -> dict[str, Any]:
        kinds = sorted({getattr(region, name) for region in judged})
        return {kind: summary([r for r in judged if getattr(r, name) == kind]) for kind in kinds}

    return {
        "model": chart.model,
        "pictures": len(pictures),
        "all": summary(judged),
        "kinds": by("kind"),
        "pictures_of": by("of"),
        "found": {what: {"share": float(np.mean(v)), "count": len(v)} for what, v in sorted(placed.items())},
        "regions": [[r.kind, r.of, r.within, round(r.predicted, 4), round(r.measured, 4)] for r in judged],
    }


def seen(shown: HeldOut, regions: Sequence[Region]) -> list[tuple[str, bool]]:
    """Of each thing placed, its kind and whether regions, of whatever name, cover half of it."""
    return [
        (thing.kind, sum(shared(thing.box, r.box) for r in regions) >= FOUND * area(thing.box))
        for thing in shown.placed
    ]


def summary(regions: Sequence[Judged], draws: int = 500) -> dict[str, Any]:
    """Rank correlation with its 95 % interval over pictures, error, and what a threshold at `LOST` does."""
    predicted = np.array([region.predicted for region in regions])
    run = np.array([region.measured for region in regions])
    if len(regions) < 3:
        return {"regions": len(regions), "rank_correlation": None}
    pictures = np.array([region.within for region in regions])
    chance, names = np.random.default_rng(0), np.unique(pictures)
    members = {name: np.nonzero(pictures == name)[0] for name in names}
    drawn = []
    for _ in range(draws):
        rows = np.concatenate([members[name] for name in chance.choice(names, len(names))])
        drawn.append(rank_correlation(predicted[rows], run[rows]))
    said, was = predicted >= LOST, run >= LOST
    return {
        "regions": len(regions),
        "rank_correlation": rank_correlation(predicted, run),
        "interval": [float(v) for v in np.nanquantile(drawn, (0.025, 0.975))],
        "bias": float((predicted - run).mean()),
        "rms": float(np.sqrt(np.square(predicted - run).mean())),
        "lost": int(was.sum()),
        "foretold": int((said & was).sum()),
        "false_alarms": int((said & ~was).sum()),
        "misses": int((~said & was).sum()),
    }


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank; NaN where one does not vary."""
    ranks = [_ranks(np.asarray(values)) for values in (first, second)]
    if any(np.ptp(each) == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def plot(found: dict[str, Any], file: Path) -> None:
    """Measured against foretold loss, a dot for each region."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between([LOST, 1.02], LOST, 1.02, color="#eee8d8", lw=0, zorder=0)
    for kind in found["kinds"]:
        dots = [(p, m) for k, _, _, p, m in found["regions"] if k == kind]
        axes.plot(*zip(*dots, strict=True), ".", ms=5, alpha=0.6, label=f"{kind} ({len(dots)})")
    axes.plot([0, 1], [0, 1], color="#888", lw=1)
    axes.set(xlabel="foretold loss", ylabel="measured loss", xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--each", type=int, default=15, help="pictures of each kind")
    parser.add_argument(
        "--first", type=int, default=2000, help="number of the first; those below 2000 were looked at"
    )
    parser.add_argument("--folder", type=Path, help="judge by the pictures of a folder instead")
    parser.add_argument("--plot", type=Path, help="a picture of the dots")
    parser.add_argument("--json", type=Path, help="every region")
    args = parser.parse_args()
    from sfumato.fidelity import store
    from sfumato.fidelity.chart import measure
    from sfumato.fidelity.instrument import open_instrument
    from sfumato.fidelity.ocr import find_reader

    instrument = open_instrument(args.model)
    chart = store.find(instrument) or measure(instrument, find_reader())
    found = judge(
        instrument, chart, of_folder(args.folder) if args.folder else composed(args.each, args.first)
    )
    if args.plot:
        plot(found, args.plot)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
    told = {key: value for key, value in found.items() if key != "regions"}
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
