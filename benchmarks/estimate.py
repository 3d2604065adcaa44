"""Seconds told before drawing against those measured, on a machine calibrated just before: within 15 % is the target.

Each request is drawn as often as --runs says, and the median counts. What else the machine does meanwhile is in the
difference.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

from common import arguments, keep, probe, show

from sfumato.generate import load
from sfumato.receipts.bill import calibrate, estimate
from sfumato.receipts.machine import Machine
from sfumato.tasks.canvas import nearest_size
from sfumato.types import Request

TARGET = 0.15
PROMPT = "a red metal sphere behind a small blue cube"
SHARES = ((1.0, 1.0), (0.75, 0.75), (1.0, 0.5))  # of the model's own width and height
BARE = 6  # steps of the shorter drawing


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("-m", "--model", action="append", help="models; the packaged one by default")
    parser.add_argument("--runs", type=int, default=3, help="drawings of each request")
    given = parser.parse_args()
    rows, worst = [], 0.0
    for name in given.model or ["pocket"]:
        model = load(name)
        machine = calibrate(model, Machine())
        width, height = model.preset["size"]
        for across, down in SHARES:
            size = nearest_size((int(width * across), int(height * down)), model.system.config.multiple)
            for steps in (BARE, model.preset["steps"]):
                request = Request(PROMPT, size=size, steps=steps)
                told = estimate(model, request, machine)["total_seconds"]
                model.generate(request)
                taken = statistics.median(
                    sum(model.generate(replace(request, seed=seed)).recipe["stages"].values())
                    for seed in range(given.runs)
                )
                worst = max(worst, abs(told / taken - 1))
                rows.append(
                    {
                        "model": name,
                        "size": f"{size[0]}x{size[1]}",
                        "steps": steps,
                        "told_s": round(told, 4),
                        "taken_s": round(taken, 4),
                        "difference": round(told / taken - 1, 3),
                    }
                )
    machine_now = probe()
    show(
        "seconds told and taken",
        machine_now,
        [
            (
                f"{row['model']} {row['size']}, {row['steps']} steps",
                f"{row['told_s']:.3f} s told, {row['taken_s']:.3f} s taken",
                f"{row['difference']:+.0%} (target ±{TARGET:.0%})",
            )
            for row in rows
        ],
    )
    keep(given.json, {"machine": machine_now, "requests": rows, "worst": round(worst, 3)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
