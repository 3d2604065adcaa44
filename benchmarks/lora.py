"""What attaching a LoRA costs: seconds to fold it into SDXL's U-Net or a part of it, and to draw a step.

Blocks of the published widths, with random numbers; as many of the coarsest level's ten as --blocks says. 10 is the
whole network, whose files take 6 GB under --place. One process; steps with and without are interleaved.
Targets: attached within 1 s of having read the file, and steps no more than 2 % slower.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from sfumato.adapters.fold import Adapters
from sfumato.adapters.lora import read_lora
from sfumato.checkpoint.source import open_weights
from sfumato.families.published.adapters import names_of
from sfumato.families.published.openers import denoiser, renewed
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.nn.unet import UNet
from sfumato.runtime import fast_dtype
from sfumato.storage import save_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1, help="of the ten at the coarsest level")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="cells per side of the latent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help="where the files are made for the while")
    options = parser.parse_args()
    torch.manual_seed(0)
    full = SYSTEMS["sdxl"]
    depths = (0, 1, options.blocks)
    system = replace(full, unet=replace(full.unet, depths=depths, mid_depth=options.blocks))
    dtype = fast_dtype(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=options.place) as folder, torch.inference_mode():
        base = base_file(Path(folder), system.unet)
        lora = lora_file(Path(folder), base, options.rank)
        measure(system, base, lora, dtype, options)


def base_file(folder: Path, config) -> Path:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UNet(config).state_dict().items()}
    tensors = {
        name: torch.empty(shape, dtype=torch.float16).normal_(std=0.02) for name, shape in shapes.items()
    }
    save_tensors(folder / "base.safetensors", tensors)
    return folder / "base.safetensors"


def lora_file(folder: Path, base: Path, rank: int) -> Path:
    """On every layer of the transformers, as most trainers make them."""
    weights = open_weights(base)
    tensors = {}
    for name in weights:
        shape = weights.info(name)[1]
        if "transformer_blocks" in name and name.endswith(".weight") and len(shape) == 2:
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{key}.lora_up.weight"] = (torch.randn(shape[0], rank) * 0.01).half()
            tensors[f"{key}.lora_down.weight"] = (torch.randn(rank, shape[1]) * 0.01).half()
            tensors[f"{key}.alpha"] = torch.tensor(float(rank)).half()
    save_tensors(folder / "lora.safetensors", tensors)
    return folder / "lora.safetensors"


def measure(system, base: Path, lora: Path, dtype: torch.dtype, options) -> None:
    how = "base", torch.device("cpu"), dtype

    def renew(touched) -> None:
        renewed(network, system.unet, adapters.parts["unet"], touched["unet"], *how)

    names = names_of(FAMILY, "sdxl", system)
    adapters = Adapters(lambda: names, {"unet": open_weights(base)}, renew)
    started = time.perf_counter()
    network = denoiser(system.unet, adapters.parts["unet"], *how)
    opening = time.perf_counter() - started
    x, context = torch.randn(2, 4, options.size, options.size), torch.randn(2, 77, 2048)

    def step() -> float:
        before = time.perf_counter()
        network(x, torch.tensor(500.0), context, torch.randn(2, 2816))
        return time.perf_counter() - before

    step()
    attach, change, detach, reads, plain, folded = [], [], [], [], [], []
    for _ in range(options.rounds):
        plain.append(step())
        reads.append(timed(lambda: read_lora(lora, names, adapters.shapes)))
        attach.append(timed(lambda: adapters.attach(lora, 0.8, name="lora")))
        folded.append(step())
        folded.append(step())
        change.append(timed(lambda: adapters.attach(lora, 0.4, name="lora")))
        detach.append(timed(adapters.detach))
        plain.append(step())
    report = adapters.attach(lora, 0.8, name="lora")
    changed = sum(count for _, count in sizes(adapters))
    print(
        f"{report.describe()}; {changed / 1e6:.0f} M numbers change, in {str(dtype).removeprefix('torch.')}"
    )
    print(f"opening without it                {opening:6.2f} s")
    reading = statistics.median(reads)
    beyond = [whole - read for whole, read in zip(attach, reads, strict=True)]
    print(f"reading the LoRA's file           {reading:6.2f} s")
    for what, times in (("attaching beyond that", beyond), ("another weight", change), ("detaching", detach)):
        median = statistics.median(times)
        print(f"{what:33} {median:6.2f} s, {median / changed * 1e9:.2f} s a billion")
    with_it, without = statistics.median(folded), statistics.median(plain)
    print(f"a step without {without:.3f} s, with {with_it:.3f} s: {with_it / without - 1:+.1%}")


def sizes(adapters: Adapters) -> list[tuple[str, int]]:
    base = adapters.base["unet"]
    return [(name, torch.Size(base.info(name)[1]).numel()) for name in adapters.opened["lora"].deltas["unet"]]


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
