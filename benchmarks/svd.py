"""A guided step of Stable Video Diffusion, 14 frames of 448×256, by ours and by diffusers, interleaved; and what each
takes.

Targets: 1.25 times as fast as the faster of diffusers' float32 and bfloat16, and 70 % of its memory at the peak.
Weights are random. "offloaded" is `--offload sequential`: each layer is read from its file, of 3 GB, when it is called.
"partly offloaded" keeps some of them in memory, as `--memory` does.
Memory is that of a process of its own which builds the network and makes one call: in all, and beside what it held
before the call.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from common import arguments, in_own_process, interleaved, keep, probe, show
from torch import Tensor, nn

from sfumato.checkpoint.fill import fill_layers
from sfumato.checkpoint.source import open_weights
from sfumato.flops import count_flops
from sfumato.memory import peak_resident, resident
from sfumato.nn.spacetime import SpaceTimeConfig, SpaceTimeUNet
from sfumato.storage import save_tensors

CONFIG = SpaceTimeConfig()
KINDS = (
    "diffusers float32",
    "diffusers bfloat16",
    "diffusers bfloat16, channels last",
    "ours bfloat16",
    "ours bfloat16, partly offloaded",
    "ours bfloat16, offloaded",
)


class Drawn(Mapping[str, Tensor]):
    """Random weights, each made when it is asked for, always the same."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.shapes = {name: t.shape for name, t in SpaceTimeUNet(CONFIG).state_dict().items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and name.endswith("weight")), dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(len(name) + shape[0])
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(shape[1:].numel() ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def theirs(dtype: torch.dtype, last: bool = False) -> nn.Module:
    """diffusers' network, made in the type asked for."""
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        network = UNetSpatioTemporalConditionModel(num_frames=14).eval()
    weights = Drawn()
    for name in weights:
        tensor = weights[name].to(dtype)
        if last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        owner, _, own = name.rpartition(".")
        setattr(network.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))
    return network


def ours(dtype: torch.dtype, file: Path | None = None, keep: int = 0) -> nn.Module:
    """Our network, filled layer by layer and packed, as it is when it draws; or reading `file` as it goes, but for
    `keep` bytes of layers.
    """
    with torch.device("meta"):
        network = SpaceTimeUNet(CONFIG).eval()
    weights = Drawn() if file is None else open_weights(file)
    fill_layers(network, weights, "random weights", dtype, pack=True, keep=keep if file else None)
    return network.requires_grad_(False)


def call_of(kind: str, args: Any) -> Callable[[], Tensor]:
    """One step of both halves of guidance."""
    torch.manual_seed(0)
    dtype = torch.float32 if "float32" in kind else torch.bfloat16
    rows, cells = 2, (args.height // 8, args.width // 8)
    x = torch.randn(rows, 8, args.frames, *cells).to(dtype)
    context, time = torch.randn(rows, 1, CONFIG.context).to(dtype), torch.tensor(0.3)
    told = torch.tensor([[6.0, 127.0, 0.02]] * rows)
    if kind.startswith("ours"):
        keep = int(args.keep * 2**30) if "partly" in kind else 0
        network = ours(dtype, args.file if "offloaded" in kind else None, keep)
        return torch.inference_mode()(lambda: network(x, time, context, told))
    network = theirs(dtype, "last" in kind)
    frames_first = x.movedim(2, 1).contiguous()
    ask = lambda: network(frames_first, time, context, told).sample.movedim(1, 2)  # noqa: E731
    return torch.inference_mode()(ask)


def taken(kind: str, args: Any) -> dict[str, int]:
    """Bytes of a process of its own: at its peak, and of that beside what the network alone held."""
    words = [
        "--alone",
        kind,
        "--frames",
        str(args.frames),
        "--height",
        str(args.height),
        "--width",
        str(args.width),
        "--keep",
        str(args.keep),
        *(("--file", str(args.file)) if args.file else ()),
    ]
    return in_own_process(*words)


def alone(kind: str, args: Any) -> None:
    """What the process of its own does."""
    call = call_of(kind, args)
    before = resident()
    call()
    print(json.dumps({"peak": peak_resident(), "beside": peak_resident() - before}))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timings of each, interleaved (default 3)")
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--height", type=int, default=256, help="pixels")
    parser.add_argument("--width", type=int, default=448, help="pixels")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=[KINDS[1], *KINDS[3:]],
        help="contenders; those of 16 bits take 3 GB each, and of 32 6 GB",
    )  # fmt: skip
    parser.add_argument(
        "--memory", action="store_true", help="their memory too, each in a process of its own"
    )
    parser.add_argument("--keep", type=float, default=1.8, help="GiB that partly offloaded layers keep")
    parser.add_argument("--place", type=Path, help="where the file of 3 GB is made for the while")
    parser.add_argument("--alone", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        alone(args.alone, args)
        return
    with tempfile.TemporaryDirectory(dir=args.place) as folder:
        if any("offloaded" in kind for kind in args.kinds):
            args.file = Path(folder) / "random.safetensors"
            save_tensors(args.file, Drawn())
        compare(args)


def compare(args: Any) -> None:
    """All contenders, side by side."""
    with torch.device("meta"):
        network = SpaceTimeUNet(CONFIG)
    cells = args.height // 8, args.width // 8
    shapes = (2, 8, args.frames, *cells), (), (2, 1, CONFIG.context), (2, 3)
    with torch.inference_mode():
        flops = count_flops(network, *(torch.empty(shape, device="meta") for shape in shapes))
    memory = {kind: taken(kind, args) for kind in args.kinds} if args.memory else {}
    answers: dict[str, Tensor] = {}

    def remembered(kind: str) -> Callable[[], None]:
        call = call_of(kind, args)
        return lambda: answers.update({kind: call().float()})

    calls = {kind: remembered(kind) for kind in args.kinds}
    before = probe()
    times = interleaved(calls, args.rounds)
    first = next(iter(answers.values()))
    errors = {kind: float((answer - first).norm() / first.norm()) for kind, answer in answers.items()}
    rows = [
        (
            kind,
            f"{seconds:.2f} s",
            f"{flops / seconds / 1e9:4.0f} GFLOP/s, {errors[kind]:.1e} from the first"
            + (f", peak {memory[kind]['peak'] / 2**30:.2f} GiB" if memory else "")
            + (f", {memory[kind]['beside'] / 2**30:.2f} beside its weights" if memory else ""),
        )
        for kind, seconds in times.items()
    ]
    title = f"{args.frames} frames of {args.width}×{args.height}, guided: {flops / 1e12:.2f} TFLOP"
    show(title, before, rows)
    facts = {"frames": args.frames, "height": args.height, "width": args.width, "flops": flops}
    keep(args.json, {**facts, "probe": before, "seconds": times, "error": errors, "memory": memory})


if __name__ == "__main__":
    main()
