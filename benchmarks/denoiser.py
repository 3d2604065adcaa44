"""What `unet.py` and `mmdit.py` share: one pass of a network by ours, by diffusers and by OpenVINO, interleaved.

All engines share one network of random weights. Each line also says how far its answer is from diffusers' in float32.
With --memory it says what a process of its own holds that has nothing but this network and makes one pass: at the most,
and of that beside what it held before.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import in_own_process, interleaved, keep, probe, show
from torch import Tensor, nn

from sfumato.flops import count_flops, module_size
from sfumato.memory import peak_resident, resident
from sfumato.nn.openvino import converted, eight_bits, settings
from sfumato.nn.packed import pack
from sfumato.nn.quantized import quantize
from sfumato.nn.spatial import AsOne, same_halves
from sfumato.runtime import fast_dtype, give_back

LAST = torch.channels_last
LARGE = {  # these hold the weights in float32 once more, and NNCF takes minutes
    "OpenVINO float32",
    "ours int8 by OpenVINO",
    "ours float32, packed",
}
AS_IT_IS = ("time", "mask")  # inputs that keep their type
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    title: for people. ours: makes our network; theirs: diffusers', whose weights ours takes, or None where diffusers is
    not installed. inputs: in float32, by the names that our network gives them; own: those that ours is given, which
    may say the same with less. ask: one pass of diffusers' network. maps: the network works on maps, for which
    channels-last memory counts. kept: of its layers in eight bits.
    """

    title: str
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module] | None
    inputs: Inputs
    own: Inputs
    ask: Callable[[nn.Module, Inputs], Tensor]
    maps: bool
    kept: tuple[str, ...]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def add_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, interleaved (default 5)")
    parser.add_argument(
        "--size", type=int, default=size, help=f"pixels per side; 8 to a latent cell (default {size})"
    )
    parser.add_argument("--batch", type=int, default=2, help="rows; 2 is one guided picture (default 2)")
    parser.add_argument(
        "--only", metavar="PARTS", help="contenders of these names, or whose name holds one, by comma"
    )
    parser.add_argument("--all", action="store_true", help=f"also {' and '.join(sorted(LARGE))}")
    parser.add_argument("--memory", action="store_true", help="also what each holds, in a process of its own")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help="also diffusers under torch.compile (minutes)")


def openvino_call(network: nn.Module, inputs: Inputs, kind: str) -> Callable[[], Any]:
    """The float32 network compiled by OpenVINO for this machine: "float32", "bfloat16", or "int8", which is what
    `--engine openvino --dtype int8` makes of it.
    """
    import openvino

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[kind]
    if kind == "int8":
        with AsOne() if alike(inputs) else nullcontext():
            model = eight_bits(copy.deepcopy(network), inputs)
    else:
        model = converted(network, inputs)
    compiled = openvino.Core().compile_model(model, "CPU", settings("CPU", dtype))
    arrays = [value.numpy() for value in inputs.values()]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def on_meta(inputs: Inputs) -> Inputs:
    return {name: value.to("meta") for name, value in inputs.items()}


@torch.inference_mode()
def alike(inputs: Inputs) -> bool:
    """Whether both halves of the rows are told apart by the text alone."""
    return same_halves(*(value for name, value in inputs.items() if name != "context"))


def contenders(subject: Subject, args: Any) -> tuple[dict[str, Callable[[], Tensor]], nn.Module]:
    """Name → one pass, and our float32 network."""
    torch.manual_seed(0)
    theirs = subject.theirs() if subject.theirs else None
    weights = theirs or subject.ours().eval()

    def ours_with(weights: nn.Module) -> nn.Module:
        """Our network on the tensors of another, which cost memory once."""
        with torch.device("meta"):
            network = subject.ours().eval()
        network.load_state_dict(weights.state_dict(), assign=True)
        return network

    ours = ours_with(weights)

    def cast(inputs: Inputs, dtype: torch.dtype, last: bool) -> Inputs:
        inputs = {name: value if name in AS_IT_IS else value.to(dtype) for name, value in inputs.items()}
        return inputs | ({"x": inputs["x"].contiguous(memory_format=LAST)} if last else {})

    def passes(network: nn.Module, dtype: torch.dtype, last: bool = False) -> Callable[[], Tensor]:
        inputs = cast(subject.own, dtype, last)
        return torch.inference_mode()(lambda: network(**inputs))

    def asked(network: nn.Module, dtype: torch.dtype, last: bool = False) -> Callable[[], Tensor]:
        inputs = cast(subject.inputs, dtype, last)
        return torch.inference_mode()(lambda: subject.ask(network, inputs))

    rough, exact = torch.bfloat16, torch.float32

    def changed(change: Callable[[nn.Module], Any], dtype: torch.dtype) -> nn.Module:
        made = copy.deepcopy(ours).to(dtype)
        change(made)
        return made

    @functools.cache
    def last(dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(weights).to(dtype).to(memory_format=LAST)

    def half() -> nn.Module:
        return copy.deepcopy(weights).to(rough)

    def best(dtype: torch.dtype) -> nn.Module:
        return last(dtype) if subject.maps else copy.deepcopy(weights).to(dtype)

    known: dict[str, Callable[[], Callable[[], Tensor]]] = {}
    if theirs:
        known["diffusers float32"] = lambda: asked(theirs, exact)
        known["diffusers bfloat16"] = lambda: asked(half(), rough)
        if subject.maps:
            known["diffusers float32, channels last"] = lambda: asked(last(exact), exact, True)
            known["diffusers bfloat16, channels last"] = lambda: asked(last(rough), rough, True)
        if args.compile:
            known["diffusers bfloat16, compiled"] = lambda: asked(
                torch.compile(best(rough)), rough, subject.maps
            )
    if installed("openvino"):
        known["OpenVINO float32"] = lambda: openvino_call(ours, subject.inputs, "float32")
        known["OpenVINO bfloat16"] = lambda: openvino_call(ours, subject.inputs, "bfloat16")
        if installed("nncf"):
            known["ours int8 by OpenVINO"] = lambda: openvino_call(ours, subject.own, "int8")
    known["ours float32"] = lambda: passes(ours_with(best(exact)), exact, subject.maps)
    known["ours float32, packed"] = lambda: passes(changed(pack, exact), exact, subject.maps)
    known["ours bfloat16"] = lambda: passes(ours_with(best(rough)), rough, subject.maps)
    known["ours bfloat16, packed"] = lambda: passes(changed(pack, rough), rough, subject.maps)
    beside = fast_dtype(torch.device("cpu"))  # of what is not in eight bits
    known["ours int8"] = lambda: passes(
        changed(lambda made: quantize(made, subject.kept), beside), beside, subject.maps
    )
    if args.alone:
        known = {args.alone: known[args.alone]}
    elif args.only:
        wanted = [part.strip() for part in args.only.split(",")]
        known = {
            name: make
            for name, make in known.items()
            if any(part == name or (part not in known and part in name) for part in wanted)
        }
    elif not args.all:
        known = {name: make for name, make in known.items() if name not in LARGE}
    return {name: make() for name, make in known.items()}, ours


def held(subject: Subject, args: Any) -> dict[str, int]:
    """Bytes of this process with one contender and nothing else: before a pass, and at most during it."""
    calls, network = contenders(subject, args)
    del network
    gc.collect()
    give_back()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the most it ever held counts from here
    calls[args.alone]()
    return {"before": before, "peak": peak_resident()}


def measure(subject: Subject, args: Any, facts: dict[str, Any]) -> None:
    """Print the table, and keep the numbers with the `facts` if --json asks for them."""
    if args.alone:
        print(json.dumps(held(subject, args)))
        return
    calls, network = contenders(subject, args)
    with torch.device("meta"):
        counted = subject.ours()
    with torch.inference_mode():
        flops = count_flops(counted, **on_meta(subject.inputs))
        with AsOne() if alike(subject.own) else nullcontext():
            own = count_flops(counted, **on_meta(subject.own))
    answers = {name: call().clone() for name, call in calls.items()}
    first = next(iter(answers.values()))  # diffusers in float32 unless --only left it out
    errors = {
        name: float((answer.float() - first.float()).norm() / first.float().norm())
        for name, answer in answers.items()
    }
    before = probe()
    times = interleaved(calls, args.rounds)
    after = probe()
    names = list(calls)
    calls.clear()  # the memory is the others' now
    memory = {name: in_own_process(*sys.argv[1:], "--alone", name) for name in names} if args.memory else {}
    size = module_size(network)

    def rate(name: str, seconds: float) -> float:
        """GFLOP/s of what that one computes."""
        return (own if name.startswith("ours") else flops) / seconds / 1e9

    def told(memory: dict[str, int] | None) -> str:
        if memory is None:
            return ""
        peak, before = memory["peak"] / 2**30, memory["before"] / 2**30
        return f", {peak:.2f} GiB, {peak - before:.2f} of it beside its weights"

    def share(name: str, seconds: float) -> float:
        kind = "float32" if "float32" in name else "bfloat16"
        return rate(name, seconds) / max(before[kind], after[kind])

    show(
        f"{subject.title} of {size.parameters / 1e6:.1f} million parameters, {args.size}×{args.size}, "
        f"batch {args.batch}: {flops / 1e9:.0f} GFLOP",
        before,
        [
            (
                name,
                f"{seconds:.3f} s",
                f"{rate(name, seconds):4.0f} GFLOP/s, {share(name, seconds):4.0%} of the probe, "
                f"error {errors[name]:.1e}" + told(memory.get(name)),
            )
            for name, seconds in times.items()
        ]
        + [
            ("probe afterwards", f"{after['bfloat16']:.0f} GFLOP/s", f"before {before['bfloat16']:.0f}"),
        ],
    )
    keep(
        args.json,
        {
            **facts,
            "size": args.size,
            "batch": args.batch,
            "parameters": size.parameters,
            "flops": flops,
            "probe_before": before,
            "probe_after": after,
            "seconds": times,
            "error": errors,
            "memory": memory,
            "share_of_probe": {name: share(name, seconds) for name, seconds in times.items()},
        },
    )
