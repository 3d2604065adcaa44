"""One pass of Stable Diffusion 1.5's U-Net, guided (batch 2), by ours, by diffusers and by OpenVINO, interleaved.

All engines share one network of random weights. Each line also says how far its answer is from diffusers' in float32.
Targets: bfloat16 at least as fast as OpenVINO's and 1.35 times as fast as diffusers' eager, 78 % of the probe; int8 1.6
times as fast as OpenVINO's bfloat16.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, interleaved, keep, probe, show
from torch import Tensor, nn

from sfumato.nn.openvino import converted, settings
from sfumato.nn.packed import pack
from sfumato.nn.quantized import quantize
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.receipts.flops import count_flops, module_size

CONTEXT, TOKENS = 768, 77
LAST = torch.channels_last
LARGE = {  # these hold the weights in float32 once more, and NNCF takes minutes
    "OpenVINO float32",
    "OpenVINO int8, NNCF",
    "ours float32, packed",
}


def shape_of(channels: list[int]) -> UNetConfig:
    """SD 1.x with these channels: attention at every level but the coarsest, eight heads."""
    levels = len(channels)
    return UNetConfig(
        channels=tuple(channels),
        depths=(*[1] * (levels - 1), 0),
        heads=(8,) * levels,
        context=CONTEXT,
    )


def diffusers_network(config: UNetConfig) -> nn.Module | None:
    """diffusers' network of that shape with random weights, or None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers import UNet2DConditionModel

    plain = len(config.channels) - 1
    return UNet2DConditionModel(
        block_out_channels=config.channels,
        down_block_types=(*["CrossAttnDownBlock2D"] * plain, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * plain),
        attention_head_dim=8,
        cross_attention_dim=config.context,
    ).eval()


def openvino_call(network: UNet, inputs: tuple[Tensor, ...], kind: str) -> Callable[[], Any]:
    """The float32 network compiled by OpenVINO for this machine: "float32", "bfloat16", or "int8", which is what NNCF
    makes of it with these inputs to look at, the rest in bfloat16.
    """
    import openvino

    names = ("x", "time", "context")
    model = converted(network, dict(zip(names, inputs, strict=True)))
    arrays = [value.numpy() for value in inputs]
    if kind == "int8":
        import nncf

        nncf.set_log_level("ERROR")
        seen = nncf.Dataset([arrays])
        model = nncf.quantize(model, seen, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    compiled = openvino.Core().compile_model(model, "CPU", settings("CPU", dtype))
    return lambda: torch.from_numpy(compiled(arrays)[0])


def contenders(config: UNetConfig, args: Any) -> tuple[dict[str, Callable[[], Tensor]], UNet]:
    """Name → one pass, and our float32 network."""
    torch.manual_seed(0)
    theirs = diffusers_network(config)
    weights = theirs or UNet(config).eval()

    def ours_with(weights: nn.Module) -> UNet:
        """Our network on the tensors of another, which cost memory once."""
        with torch.device("meta"):
            network = UNet(config).eval()
        network.load_state_dict(weights.state_dict(), assign=True)
        return network

    ours = ours_with(weights)
    cells = args.size // 8
    x, context = torch.randn(args.batch, 4, cells, cells), torch.randn(args.batch, TOKENS, CONTEXT)
    time = torch.full((args.batch,), 500.0)
    inputs = (x, time, context)

    def passes(network: nn.Module, dtype: torch.dtype, last: bool, sample: bool) -> Callable[[], Tensor]:
        given = x.to(dtype, memory_format=LAST) if last else x.to(dtype)
        text = context.to(dtype)

        @torch.inference_mode()
        def once() -> Tensor:
            answer = network(given, time, text)
            return answer.sample if sample else answer

        return once

    rough, exact = torch.bfloat16, torch.float32

    def openvino_of(kind: str) -> Callable[[], Tensor]:
        return openvino_call(ours, inputs, kind)

    def packed(dtype: torch.dtype) -> nn.Module:
        made = copy.deepcopy(ours).to(dtype)
        pack(made)
        return made

    def quantized(dtype: torch.dtype) -> nn.Module:
        made = copy.deepcopy(ours).to(dtype)
        quantize(made)
        return made

    @functools.cache
    def last(dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(weights).to(dtype).to(memory_format=LAST)

    def half() -> nn.Module:
        return copy.deepcopy(weights).to(rough)

    known: dict[str, Callable[[], Callable[[], Tensor]]] = {}
    if theirs:
        known["diffusers float32"] = lambda: passes(theirs, exact, False, True)
        known["diffusers float32, channels last"] = lambda: passes(last(exact), exact, True, True)
        known["diffusers bfloat16"] = lambda: passes(half(), rough, False, True)
        known["diffusers bfloat16, channels last"] = lambda: passes(last(rough), rough, True, True)
        if args.compile:
            known["diffusers bfloat16, compiled"] = lambda: passes(
                torch.compile(last(rough)), rough, True, True
            )
    if importlib.util.find_spec("openvino"):
        known["OpenVINO float32"] = lambda: openvino_of("float32")
        known["OpenVINO bfloat16"] = lambda: openvino_of("bfloat16")
        if importlib.util.find_spec("nncf"):
            known["OpenVINO int8, NNCF"] = lambda: openvino_of("int8")
    known["ours float32"] = lambda: passes(ours_with(last(exact)), exact, True, False)
    known["ours float32, packed"] = lambda: passes(packed(exact), exact, True, False)
    known["ours bfloat16"] = lambda: passes(ours_with(last(rough)), rough, True, False)
    known["ours bfloat16, packed"] = lambda: passes(packed(rough), rough, True, False)
    known["ours int8"] = lambda: passes(quantized(rough), rough, True, False)
    if args.only:
        wanted = [part.strip() for part in args.only.split(",")]
        known = {name: make for name, make in known.items() if any(part in name for part in wanted)}
    elif not args.all:
        known = {name: make for name, make in known.items() if name not in LARGE}
    return {name: make() for name, make in known.items()}, ours


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, interleaved (default 5)")
    parser.add_argument(
        "--size", type=int, default=512, help="pixels per side; 8 to a latent cell (default 512)"
    )
    parser.add_argument("--batch", type=int, default=2, help="rows; 2 is one guided picture (default 2)")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=[320, 640, 1280, 1280], help="channels per level"
    )
    parser.add_argument("--only", metavar="PARTS", help="contenders whose name holds one of these, by comma")
    parser.add_argument("--all", action="store_true", help=f"also {' and '.join(sorted(LARGE))}")
    parser.add_argument("--compile", action="store_true", help="also diffusers under torch.compile (minutes)")
    args = parser.parse_args()

    config = shape_of(args.channels)
    calls, network = contenders(config, args)
    cells = args.size // 8
    with torch.device("meta"):
        shapes = torch.empty(args.batch, 4, cells, cells), torch.empty(args.batch)
        text, counted = torch.empty(args.batch, TOKENS, CONTEXT), UNet(config)
    with torch.inference_mode():
        flops = count_flops(counted, *shapes, text)
    answers = {name: call().clone() for name, call in calls.items()}
    first = next(iter(answers.values()))  # diffusers in float32 unless --only left it out
    errors = {
        name: float((answer.float() - first.float()).norm() / first.float().norm())
        for name, answer in answers.items()
    }
    before = probe()
    times = interleaved(calls, args.rounds)
    after = probe()
    size = module_size(network)

    def share(name: str, seconds: float) -> float:
        kind = "float32" if "float32" in name else "bfloat16"
        return flops / seconds / 1e9 / max(before[kind], after[kind])

    show(
        f"U-Net of {size.parameters / 1e6:.1f} million parameters, {args.size}×{args.size}, batch {args.batch}: "
        f"{flops / 1e9:.0f} GFLOP",
        before,
        [
            (
                name,
                f"{seconds:.3f} s",
                f"{flops / seconds / 1e9:4.0f} GFLOP/s, {share(name, seconds):4.0%} of the probe, "
                f"error {errors[name]:.1e}",
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
            "channels": args.channels,
            "size": args.size,
            "batch": args.batch,
            "parameters": size.parameters,
            "flops": flops,
            "probe_before": before,
            "probe_after": after,
            "seconds": times,
            "error": errors,
            "share_of_probe": {name: share(name, seconds) for name, seconds in times.items()},
        },
    )


if __name__ == "__main__":
    main()
