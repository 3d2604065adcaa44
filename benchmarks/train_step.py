"""Training steps of the denoiser as a recipe has them: pictures per second, and where the time goes.

The step is the trainer's own, on latents and captions of scenes rendered for the occasion; steps in which a new shape
is compiled are not counted. Targets: ≥ 55 % of the probe, optimisers and averaging ≤ 5 %, waiting for data ≤ 2 %,
cached latents read ≥ 50 times as fast as they are used. `--grid` also measures wider networks, float32, and eager mode.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RECIPE, arguments, keep, probe, scratch, show

from sfumato.autoencoder import Autoencoder
from sfumato.data.latents import LatentCache, build_latents
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Size
from sfumato.families.pocket import PocketConfig, build
from sfumato.flops import module_size
from sfumato.runtime import fast_dtype, pick_device
from sfumato.train.denoiser import Examples, picture_flops
from sfumato.train.lanes import Feed, short_turns
from sfumato.train.loop import Clock, World, open_lanes, optimizer_step
from sfumato.train.optim import Average, make_optimizers
from sfumato.train.recipe import Recipe, read_recipe
from sfumato.train.stages import ModelJob
from sfumato.train.tasks import DenoiserTask

CACHED = 40_000  # latents of the cache whose reading is measured
GRID = [
    {"width": width, "precision": precision, "compile": compiled}
    for width in (256, 384)
    for precision in ("bfloat16", "float32")
    for compiled in (True, False)
]


class Blank:
    """Forty thousand pictures of nothing, to fill a latent cache of the real size."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def buckets(self) -> dict[Size, list[int]]:
        return {(self.size, self.size): list(range(self.count))}

    def pixels(self, indices: Any) -> np.ndarray:
        return np.zeros((len(indices), 1, 1, 3), dtype=np.uint8)

    def digest(self, index: int) -> str:
        return str(index)

    def name(self, index: int) -> str:
        return f"picture {index}"


def cache_rate(shape: tuple[int, ...], size: int, batch: int, folder: Path) -> float:
    """Latents per second in batches of random order, from a cache as large as a real run's."""
    source: Any = Blank(CACHED, size)
    build_latents(source, lambda pixels: torch.randn(len(pixels), *shape), "bench", folder, batch=256)
    cache = LatentCache(folder, source, "bench")
    order = np.random.default_rng(0).permutation(CACHED)
    batches = [order[i : i + batch].tolist() for i in range(0, CACHED - batch, batch)]
    started = time.perf_counter()
    for indices in batches:
        cache.batch(indices)
    return len(batches) * batch / (time.perf_counter() - started)


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with another width, precision or way to run."""
    part = recipe.denoiser
    assert part is not None
    width = changes.get("width", part.model.width)
    model = replace(part.model, width=width, heads=max(1, width // 64))
    fields = {name: changes[name] for name in ("precision", "compile") if name in changes}
    return replace(recipe, denoiser=replace(part, model=model, train=replace(part.train, **fields)))


@dataclass(frozen=True)
class Made:
    """What the trainer makes before the denoiser's first step."""

    run: ModelJob
    source: SceneSource
    autoencoder: Autoencoder
    words: tuple[str, ...]
    cache: LatentCache


def prepare(recipe: Recipe, folder: Path, pictures: int) -> Made:
    """Scenes, an untrained autoencoder, and the latents it makes of them, by the trainer's own stages."""
    assert recipe.autoencoder and recipe.denoiser
    silent = replace(
        recipe,
        data=replace(recipe.data, kind="scenes", count=pictures, cache=str(folder / "scenes")),
        autoencoder=replace(recipe.autoencoder, train=replace(recipe.autoencoder.train, steps=0)),
    )
    run = ModelJob(silent, folder, pick_device(), lambda event: None)
    torch.manual_seed(recipe.seed)
    multiple = recipe.autoencoder.model.factor * recipe.denoiser.model.patch
    source: Any = run.source(multiple)
    autoencoder = run.autoencoder(multiple)
    words = run.words(source, recipe.denoiser.vocabulary)
    return Made(run, source, autoencoder, words, run.latents(source, autoencoder))


def measure(made: Made, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Medians over `steps` counted training steps."""
    recipe = changed(made.run.recipe, changes)
    part = recipe.denoiser
    assert part is not None
    train, device = part.train, made.run.device
    torch.manual_seed(recipe.seed)
    config = PocketConfig(made.autoencoder.config, part.model, made.words, recipe.preset)
    system = replace(build(config), autoencoder=made.autoencoder)
    labels = made.run.labels(made.source, config) if part.loss.labels else None
    examples = Examples(made.source, made.cache, system.tokenizer, part, recipe.seed, device, labels)
    task = DenoiserTask(recipe, made.run.folder, device, system, examples)
    player, parts = task.players[0], train.parts

    by_length: dict[tuple[int, ...], float] = {}
    flops, lengths = [], []
    for step in range(1, 3 * steps + 12):
        total, seen = 0.0, []
        for number in range(parts):
            batch = examples.part(step, number)
            key = tuple(batch.ids.shape)
            if key not in by_length:
                by_length[key] = picture_flops(system.denoiser, batch, system.parameterization, part.loss)
            total += by_length[key] * len(batch.latents)
            seen.append(key)
        flops.append(total)
        lengths.append(seen)

    dtype = fast_dtype(device) if train.precision == "auto" else getattr(torch, train.precision)
    player.module.to(device).train()
    player.optimizers = make_optimizers(player.module, player.recipe)
    average = Average(player.module, train.ema)
    torch.compiler.reset()
    player.lanes = open_lanes(player, device, World())
    clock = Clock(train.batch, task.flops, 0.0)
    feed = Feed(player.batch, range(parts), train.steps, player.lanes.count)
    known: set[tuple[int, ...]] = set()
    counted: list[tuple[float, float, float, float]] = []
    step = 0
    with closing(player.lanes), closing(feed), short_turns():
        while len(counted) < steps and step < len(flops):
            step += 1
            clock.start()
            values = optimizer_step(player, feed, step, World(), device, dtype, clock)
            with clock.counting("optimizer"):
                average.update(player.module, step)
            if not math.isfinite(values["loss"]):
                raise SystemExit(f"the loss became {values['loss']}")
            clock.stop()
            now = clock.now
            if step > 2 and known.issuperset(lengths[step - 1]):
                counted.append((now["step"], now["data"], now["optimizer"], flops[step - 1]))
            known.update(lengths[step - 1])
    whole, data, optimizer, work = (list(column) for column in zip(*counted, strict=True))
    return {
        "width": part.model.width,
        "depth": part.model.depth,
        "parameters": module_size(system.denoiser).parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": train.compile,
        "optimizer": train.optimizer,
        "batch": train.batch,
        "steps": len(counted),
        "samples_per_second": train.batch / statistics.median(whole),
        "flops_per_sample": statistics.mean(work) / train.batch,
        "flops_per_second": statistics.median(w / s for w, s in zip(work, whole, strict=True)),
        "optimizer_share": sum(optimizer) / sum(whole),
        "stall_share": sum(data) / sum(whole),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, default=8, help="counted steps (default 8)")
    parser.add_argument("--pictures", type=int, default=384, help="scenes to render first (default 384)")
    parser.add_argument(
        "--grid", action="store_true", help="widths 256, 384 × bfloat16, float32 × compiled, eager"
    )
    args = parser.parse_args()
    recipe = read_recipe(args.recipe)
    rows: list[tuple[str, str, str]] = []
    results = []
    with scratch() as temporary:
        folder = Path(temporary)
        made = prepare(recipe, folder, args.pictures)
        # a real run has more scenes than the source remembers, so that each is made anew for its caption
        made.source._scene = made.source._sample  # type: ignore[assignment]
        size = recipe.data.size
        assert recipe.denoiser
        batch = recipe.denoiser.train.batch // recipe.denoiser.train.parts
        reading = cache_rate(made.cache.shape((size, size)), size, batch, folder / "blank")
        machine = probe()
        for changes in GRID if args.grid else [{}]:
            before = probe()
            result = measure(made, changes, args.steps)
            after = probe()
            yardstick = {name: max(before[name], after[name]) for name in ("float32", "bfloat16")}
            result["share_of_probe"] = result["flops_per_second"] / (yardstick[result["dtype"]] * 1e9)
            result["probe_before"], result["probe_after"] = before, after
            result["latents_read_per_second"] = reading
            results.append(result)
            way = "compiled" if result["compiled"] else "eager"
            name = f"{result['width']} wide, {result['dtype']}, {way}"
            rate = result["samples_per_second"]
            rows += [
                (name, f"{rate:.1f} /s", f"{result['parameters'] / 1e6:.1f} million parameters"),
                (
                    "  share of the probe",
                    f"{result['share_of_probe']:.1%}",
                    f"target ≥ 55 %; {result['flops_per_second'] / 1e9:.0f} GFLOP/s, "
                    f"{result['flops_per_sample'] / 1e9:.2f} GFLOP a picture",
                ),
                ("  optimisers and averaging", f"{result['optimizer_share']:.1%}", "target ≤ 5 %"),
                ("  waiting for data", f"{result['stall_share']:.2%}", "target ≤ 2 %"),
                ("  latents read over used", f"{reading / rate:.0f} ×", f"target ≥ 50; {reading:.0f} /s"),
            ]
    show(f"{args.recipe.name}: denoiser training, batch {recipe.denoiser.train.batch}", machine, rows)
    keep(args.json, {"recipe": args.recipe.name, "probe": machine, "results": results})


if __name__ == "__main__":
    main()
