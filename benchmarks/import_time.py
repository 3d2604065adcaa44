"""How long `import sfumato` and a cold `sfumato --help` take, beside `import torch`: medians of fresh processes."""

import statistics
import subprocess
import sys
import time

RUNS = 5


def seconds(code: str) -> float:
    """Median wall seconds of `python -c code`."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    empty = seconds("")
    rows = {
        "import torch": seconds("import torch"),
        "import sfumato": seconds("import sfumato"),
        "import torch, sfumato": seconds("import torch, sfumato"),
        "from sfumato import load": seconds("from sfumato import load"),
        "sfumato --help": seconds("from sfumato.cli.app import run; run(['--help'])"),
    }
    print(f"an empty Python takes {empty:.3f} s, which is taken off below")
    for name, value in rows.items():
        print(f"{name:26} {value - empty:.3f} s")
    beyond = rows["import torch, sfumato"] - rows["import torch"]
    print(f"sfumato beyond torch       {beyond:.3f} s (target 0.15 s)")
