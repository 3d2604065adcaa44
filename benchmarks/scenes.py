"""Pictures per second of the procedural world at 128×128 in two processes. Target: ≥ 50."""

from __future__ import annotations

import time

from common import arguments, keep, probe, scratch, show

from sfumato.data.scenes import SceneSource


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    machine = probe()
    marks: list[tuple[float, int]] = []
    with scratch() as temporary:
        source = SceneSource(args.count, size=args.size, cache=temporary, chunk=16)
        started = time.perf_counter()
        source.prepare(args.processes, lambda done, total: marks.append((time.perf_counter(), done)))
        whole = time.perf_counter() - started
    at = args.processes  # each process has made one chunk: imports are over
    (first, done), (last, total) = marks[at - 1], marks[-1]
    steady = (total - done) / (last - first)
    started = time.perf_counter()
    for index in range(min(args.count, 200)):
        source.caption(index)
    captions = min(args.count, 200) / (time.perf_counter() - started)
    show(
        f"{args.count} scenes at {args.size}×{args.size}, {args.processes} processes",
        machine,
        [
            ("rendering", f"{steady:.1f} /s", "target ≥ 50 /s"),
            ("with the start of the processes", f"{args.count / whole:.1f} /s", f"{whole:.1f} s"),
            ("scenes and captions, one process", f"{captions:.0f} /s", ""),
        ],
    )
    keep(
        args.json,
        {
            "probe": machine,
            "count": args.count,
            "size": args.size,
            "processes": args.processes,
            "pictures_per_second": steady,
            "seconds_in_all": whole,
            "captions_per_second": captions,
        },
    )


if __name__ == "__main__":
    main()
