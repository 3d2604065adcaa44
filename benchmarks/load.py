"""Seconds to load a checkpoint against reading its bytes, interleaved in one process, and the memory it takes.

The file is read once before, so that it lies in the system's cache: what is measured is the work, not the disk. Target:
loading takes at most 1.2 times reading the file whole into new memory.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from common import arguments, interleaved, keep

from sfumato.checkpoint.source import open_weights
from sfumato.families import open_model
from sfumato.runtime import DTYPES, give_back

PEAK = """
import sys, torch
from sfumato.families import open_model
from sfumato.memory import peak_resident, resident
from sfumato.text.clip import CLIP_L, ClipTextEncoder
with torch.device("meta"):
    ClipTextEncoder(CLIP_L)  # imports what loading imports
before = resident()
system = open_model(sys.argv[1], torch.device("cpu"), getattr(torch, sys.argv[2]))
print(peak_resident() - before, resident() - before)
"""


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each, interleaved (default 3)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=list(DTYPES))
    args = parser.parse_args()
    if not args.model:
        print("a checkpoint of one file is needed: -m FILE")
        return
    path = Path(args.model)
    size = path.stat().st_size
    stored = {str(open_weights(path).info(name)[0]).removeprefix("torch.") for name in open_weights(path)}
    cpu = torch.device("cpu")

    def read() -> None:
        path.read_bytes()

    def load(dtype: torch.dtype) -> None:
        open_model(path, cpu, dtype)
        give_back()

    read()
    calls = {"read the file": read}
    calls |= {f"load in {name}": lambda name=name: load(DTYPES[name]) for name in args.dtypes}
    calls["hash the weights, once a process"] = lambda: hash_afresh(path)
    times = interleaved(calls, args.rounds)
    threads = torch.get_num_threads()
    print(f"{path.name}: {size / 1e9:.2f} GB of {', '.join(sorted(stored))}, {threads} threads, warm cache")
    for name, seconds in times.items():
        print(f"{name:34} {seconds:6.2f} s   {seconds / times['read the file']:5.2f}")
    peaks = {}
    for name in args.dtypes:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), name], capture_output=True, text=True, check=True
        )
        peaks[name], kept = map(int, done.stdout.split())
        print(f"{'memory in ' + name:34} {peaks[name] / 2**20:6.0f} MiB at most, {kept / 2**20:.0f} MiB kept")
    keep(
        args.json,
        {"bytes": size, "stored": sorted(stored), "seconds": times, "peaks": peaks, "at": time.time()},
    )


def hash_afresh(path: Path) -> None:
    """What the first picture of a process waits for; a second model of the same file does not."""
    from sfumato.storage import tensors_hash

    tensors_hash(open_weights(path))


if __name__ == "__main__":
    main()
