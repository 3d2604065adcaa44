"""What the benchmarks share: the model they measure, the probe of the same run, and how a table is printed."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sfumato.families import DEFAULT_MODEL, PACKAGED
from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import fast_dtype, pick_device

RECIPE = Path(__file__).parent.parent / "recipes" / "pocket-cpu-more.toml"


def arguments(doc: str | None, model: bool = False) -> argparse.ArgumentParser:
    """A parser with --json, and -m where a model is measured."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there too")
    if model:
        parser.add_argument(
            "-m", "--model", metavar="FOLDER", help="a model; by default the packaged one, or random weights"
        )
    return parser


def probe() -> dict[str, Any]:
    """The machine as it is now; rates in GFLOP/s, `fast` that of the precision in which models run."""
    device = pick_device()
    rates = {
        str(dtype).removeprefix("torch."): round(matmul_peak(device, dtype, 1.0) / 1e9, 1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    fast = rates[str(fast_dtype(device)).removeprefix("torch.")]
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **rates,
        "fast": fast,
    }


def model_folder(named: str | None, temporary: Path) -> tuple[Path, str]:
    """The folder to measure and what to call it; random weights of the recipe's shape cost what trained ones do."""
    if named:
        return PACKAGED.get(named, Path(named)), named
    if (PACKAGED[DEFAULT_MODEL] / "model.json").exists():
        return PACKAGED[DEFAULT_MODEL], f"packaged {DEFAULT_MODEL}"
    from sfumato.data.scenes import SceneSource
    from sfumato.families.pocket import PocketConfig, build, save_folder
    from sfumato.text import learn_words
    from sfumato.train.recipe import read_recipe

    recipe = read_recipe(RECIPE)
    assert recipe.autoencoder and recipe.denoiser
    captions = SceneSource(300)
    words = learn_words(captions.caption(i) for i in range(300))
    torch.manual_seed(0)
    system = build(PocketConfig(recipe.autoencoder.model, recipe.denoiser.model, words, recipe.preset))
    for parameter in system.denoiser.parameters():
        if not parameter.any():  # what starts at zero would make every picture the same grey
            torch.nn.init.normal_(parameter, std=0.02)
    save_folder(system, temporary / "random")
    return temporary / "random", f"random weights of the shape of {RECIPE.name}"


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call, with the GPU's work done."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call over `rounds` rounds in the order A B, B A, …; each is called once before."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            times[name].append(seconds(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, machine: dict[str, Any], rows: list[tuple[str, str, str]]) -> None:
    """Print the table. rows: (what, measured, target or remark)."""
    print(title)
    print(f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}")
    print(f"probe: float32 {machine['float32']:.0f}, bfloat16 {machine['bfloat16']:.0f} GFLOP/s")
    for what, measured, remark in rows:
        print(f"{what:34} {measured:>14}   {remark}".rstrip())


def keep(path: Path | None, values: dict[str, Any]) -> None:
    """Write the numbers as JSON if the user wants them."""
    if path:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def in_own_process(*words: str) -> Any:
    """What this benchmark, begun anew with these words, prints last, as JSON."""
    done = subprocess.run([sys.executable, sys.argv[0], *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when the benchmark ends."""
    return tempfile.TemporaryDirectory(prefix="sfumato-bench-")
