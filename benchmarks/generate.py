"""One guided picture of 128×128 in 8 steps: warm, cold as a process, a batch of 16 against one, and memory.

Targets: warm ≤ 1 s, cold ≤ 4 s, a batch of 16 ≥ 1.5 times as many pictures per second as one alone.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from common import arguments, interleaved, keep, model_folder, probe, scratch, show

import sfumato
from sfumato.flops import count_flops, module_size

PROMPT = "a red metal sphere behind a small blue cube"
MANY = 16
MEMORY = """
import resource, sys
from sfumato.cli.app import run
status = run(sys.argv[1:])
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak)
sys.exit(status)
"""


def cold(folder: Path, out: Path, steps: int, runs: int) -> tuple[float, float]:
    """Median wall seconds of `sfumato generate` as a fresh process, and the peak resident MiB of one."""
    home = str(Path(sfumato.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])}
    command = [
        "generate",
        PROMPT,
        "-m",
        str(folder),
        "-o",
        str(out),
        "--steps",
        str(steps),
        "--size",
        "128x128",
    ]
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "sfumato.cli", *command],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        times.append(time.perf_counter() - started)
    told = subprocess.run(
        [sys.executable, "-c", MEMORY, *command], env=environment, check=True, capture_output=True, text=True
    )
    return statistics.median(times), int(told.stdout.split()[-1]) / 1024


def main() -> None:
    parser = arguments(__doc__, model=True)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, interleaved (default 5)")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with scratch() as temporary:
        folder, name = model_folder(args.model, Path(temporary))
        before = probe()
        process, process_memory = cold(folder, Path(temporary) / "out.png", args.steps, 3)
        model = sfumato.load(folder)
    request = model.complete(sfumato.Request(PROMPT, seed=7, steps=args.steps, size=(128, 128)))
    many = replace(request, count=MANY)
    flops = count_flops(model.generate, request)
    flops_many = count_flops(model.generate, many)
    size = module_size(model.system.autoencoder, model.system.denoiser)
    timed = interleaved(
        {"one": lambda: model.generate(request), "many": lambda: model.generate(many)}, args.rounds
    )
    after = probe()
    gain = MANY * timed["one"] / timed["many"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rates = {"one": flops / timed["one"], "many": flops_many / timed["many"]}
    peak = max(before["fast"], after["fast"]) * 1e9
    values = {
        "model": name,
        "parameters": size.parameters,
        "steps": request.steps,
        "guidance": request.guidance,
        "sampler": request.sampler,
        "dtype": str(model.dtype).removeprefix("torch."),
        "probe_before": before,
        "probe_after": after,
        "flops": flops,
        "warm_seconds": timed["one"],
        "cold_seconds": process,
        "batch": MANY,
        "batch_seconds": timed["many"],
        "batch_gain": gain,
        "share_of_probe": {key: rate / peak for key, rate in rates.items()},
        "process_peak_mib": process_memory,
        "batch_peak_mib": memory,
    }
    show(
        f"{name}: {size.parameters / 1e6:.1f} million parameters, {request.steps} steps, guidance {request.guidance:g}",
        before,
        [
            ("warm, one picture", f"{timed['one']:.3f} s", "target ≤ 1 s"),
            ("cold, sfumato generate", f"{process:.2f} s", "target ≤ 4 s"),
            (f"{MANY} together", f"{MANY / timed['many']:.2f} /s", f"one by one {1 / timed['one']:.2f} /s"),
            ("gain of the batch", f"{gain:.2f} ×", "target ≥ 1.5 ×"),
            ("work of one picture", f"{flops / 1e9:.1f} GFLOP", ""),
            (
                "share of the probe, one",
                f"{rates['one'] / peak:.1%}",
                f"{MANY} together {rates['many'] / peak:.1%}",
            ),
            (
                "peak memory of the process",
                f"{process_memory:.0f} MiB",
                f"with {MANY} together {memory:.0f} MiB",
            ),
            ("probe afterwards", f"{after['fast']:.0f} GFLOP/s", f"before {before['fast']:.0f}"),
        ],
    )
    keep(args.json, values)


if __name__ == "__main__":
    main()
