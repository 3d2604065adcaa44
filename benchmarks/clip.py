"""A clip of pocket's from a warm model: seventeen frames of 128×128 in eight steps.

Target: 6 s on two cores.
"""

from __future__ import annotations

import statistics

from common import arguments, keep, probe, seconds, show

from sfumato.generate import load
from sfumato.types import Request

PROMPT = "a red ball rolls to the left past a blue cube"
FRAMES, STEPS, REPEATS, TARGET = 17, 8, 5, 6.0


def main() -> None:
    args = arguments(__doc__, model=True).parse_args()
    model = load(args.model or "pocket")
    request = Request(PROMPT, frames=FRAMES, steps=STEPS)
    model.generate(request)
    times = [seconds(lambda: model.generate(request)) for _ in range(REPEATS)]
    middle, machine = statistics.median(times), probe()
    show(
        f"A clip of {FRAMES} frames, {STEPS} steps, warm, {model.dtype}",
        machine,
        [("one clip", f"{middle:.2f} s", f"target ≤ {TARGET:g} s")],
    )
    keep(args.json, {**machine, "frames": FRAMES, "steps": STEPS, "seconds": round(middle, 3)})


if __name__ == "__main__":
    main()
