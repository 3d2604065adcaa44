"""The plan of memory against what processes then took: their peak resident memory, each in a process of its own.

Target: within 10 %. A checkpoint is given by -m; random weights take what trained ones do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from common import arguments, keep, scratch

HEADER = f"{'size':>9} {'type':>5} {'offload':>11} {'planned':>12} {'peak':>12} {'apart':>7} {'seconds':>8}"


def measured(model: str, size: str, dtype: str, offload: str, steps: int, folder: str) -> dict[str, float]:
    """Draw a picture by the command line in a fresh process; bytes planned and taken, and seconds."""
    code = "import sys; from sfumato.cli.app import run; sys.exit(run(sys.argv[1:]))"
    options = {
        "-m": model, "--size": size, "--dtype": dtype, "--offload": offload, "--steps": str(steps),
        "-o": os.path.join(folder, "out.png"), "--device": "cpu",
    }  # fmt: skip
    words = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "a lighthouse at dusk", *words, "--json"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    answer = json.loads(done.stdout)
    return answer["memory"] | {"seconds": answer["seconds"]}


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument("--sizes", nargs="+", default=["256", "512"], help="pixels (default 256 512)")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], help="of fp32, bf16, fp16 (default bf16)")
    parser.add_argument("--offloads", nargs="+", default=["none", "model", "sequential"])
    parser.add_argument("--steps", type=int, default=2, help="sampling steps (default 2)")
    args = parser.parse_args()
    if not args.model:
        print("a checkpoint is needed: -m FILE or FOLDER")
        return
    print(f"{HEADER}   ({args.model}, {args.steps} steps)")
    rows = []
    with scratch() as folder:
        for dtype in args.dtypes:
            for size in args.sizes:
                for offload in args.offloads:
                    got = measured(args.model, size, dtype, offload, args.steps, folder)
                    rows.append({"size": size, "dtype": dtype, "offload": offload, **got})
                    apart = got["planned"] / got["peak"] - 1
                    print(
                        f"{size:>9} {dtype:>5} {offload:>11} {got['planned'] / 2**20:>8.0f} MiB "
                        f"{got['peak'] / 2**20:>8.0f} MiB {apart:>+7.1%} {got['seconds']:>8.1f}",
                        flush=True,
                    )
    keep(args.json, {"model": args.model, "steps": args.steps, "rows": rows})


if __name__ == "__main__":
    main()
