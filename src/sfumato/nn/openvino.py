"""A denoiser run by OpenVINO, Intel's engine, on a CPU or an Intel GPU. It is an optional extra, `sfumato[openvino]`.

OpenVINO compiles a network for one shape of its inputs. For a Stable Diffusion that takes long, so what it made is kept
in the user's cache, under a name that tells the weights, the shapes, the device and the version, and read from there
the next time without looking at the weights. In eight bits, which NNCF prepares for the ranges of numbers that it meets
on noise and on what is half drawn, it takes minutes the first time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import InputError
from sfumato.nn.packed import layers, shared_kernel
from sfumato.nn.spatial import GEGLU, AsOne, same_halves
from sfumato.nn.unet import Upsample
from sfumato.storage import atomic_file, cache_folder

T = TypeVar("T")
ENGINE = "openvino"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "int8"}
DONE = (0.0, 0.3, 0.6, 0.95)  # shares of the way from noise at which the ranges of eight bits are taken
GRAIN = 8  # cells; the scale of what a picture without noise is taken for


def require_nncf() -> None:
    """`InputError` where what makes networks of eight bits is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise InputError(
            "int8 of the engine openvino needs NNCF; pip install 'sfumato[openvino]' brings it",
            argument="dtype",
        )


def plugin(engine: str) -> str:
    """The device of OpenVINO that "openvino" or "openvino:DEVICE" names: "CPU", "GPU", "GPU.1".

    Raises `InputError` where the engine is another, is not installed, or has no such device here.
    """
    name, _, device = engine.partition(":")
    if name != ENGINE:
        raise InputError(f"engine must be torch, openvino or openvino:GPU, not {engine!r}", argument="engine")
    if importlib.util.find_spec("openvino") is None:
        raise InputError(
            "engine openvino is not installed; pip install 'sfumato[openvino]' brings it", argument="engine"
        )
    import openvino

    device = device.upper() or "CPU"
    present = openvino.Core().available_devices
    if device not in present and device not in {each.partition(".")[0] for each in present}:
        raise InputError(
            f"engine openvino sees no device {device} here; it sees {', '.join(present)}", argument="engine"
        )
    return device


class OpenVINONetwork:
    """Called as the network it stands for, and answers as it does within the rounding of `dtype`.

    config: of the network, with `to_dict`. network: makes it in float32 on the CPU; called when a shape is met that is
    not in the cache. weights: a name of the weights that no others have, such as their hash. dtype: what to compute in,
    float32, bfloat16 or float16, as far as the device can; or int8 for products and convolutions, and 16 bits for
    attention and the rest. Compiled networks stay in memory, one for each shape met.
    """

    def __init__(
        self,
        config: Any,
        network: Callable[[], nn.Module],
        weights: str,
        dtype: torch.dtype,
        device: str = "CPU",
        cache: Path | None = None,
    ):
        self.config, self.network, self.weights = config, network, weights
        self.dtype, self.device = dtype, device
        self.cache = cache_folder("openvino") if cache is None else cache
        self.compiled: dict[str, Any] = {}

    def __call__(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        time_cond: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """As the network's own, without what a ControlNet adds. Leaving layers out is another network to the engine."""
        named = {"x": x, "time": time.expand(len(x)), "context": context}
        named |= {"vector": vector, "mask": mask, "time_cond": time_cond}
        given = {
            name: tensor.detach().float().cpu().contiguous()
            for name, tensor in named.items()
            if tensor is not None
        }
        with torch.inference_mode():
            alike = same_halves(*(tensor for name, tensor in given.items() if name != "context"))
        compiled = self._for(given, tuple(sorted(skip_layers)), alike)
        answer = compiled([tensor.numpy() for tensor in given.values()])[0]
        return torch.from_numpy(answer.copy()).to(x)  # the engine writes its next answer to the same memory

    def _for(self, given: dict[str, Tensor], skipped: tuple[int, ...], alike: bool) -> Any:
        """The network compiled for the shapes of these inputs. alike: for halves that the context alone tells apart."""
        import openvino

        facts = {
            "weights": self.weights,
            "config": self.config.to_dict(),
            "inputs": {name: list(tensor.shape) for name, tensor in given.items()},
            "device": self.device,
            "precision": PRECISIONS[self.dtype],
            "version": openvino.__version__,
        }
        facts |= {"skipped": skipped} if skipped else {}
        facts |= {"alike": True} if alike else {}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if key not in self.compiled:
            file, options = self.cache / f"{key}.blob", settings(self.device, self.dtype)
            made = _read(file, self.device, options)
            if made is None:
                fixed = {"skip_layers": skipped} if skipped else {}
                make = eight_bits if self.dtype == torch.int8 else converted
                with AsOne() if alike else nullcontext():
                    model = make(self.network(), given, **fixed)
                made = _apart(lambda: openvino.Core().compile_model(model, self.device, options))
                with atomic_file(file) as temporary, temporary.open("wb") as stream:
                    stream.write(made.export_model().getbuffer())
            self.compiled[key] = made
        return self.compiled[key]


def settings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """How OpenVINO is to compile: for one answer as early as possible, on as many threads as PyTorch has."""
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()} if device == "CPU" else {}
    rest = torch.bfloat16 if device == "CPU" else torch.float16  # beside eight bits
    precision = PRECISIONS[rest if dtype == torch.int8 else dtype]
    return {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", **threads}


def _read(file: Path, device: str, options: dict[str, Any]) -> Any:
    """What the file holds, or None: it is not there, or the engine cannot use it, and it will be written anew."""
    if not file.is_file():
        return None
    import openvino

    try:
        return _apart(lambda: openvino.Core().import_model(file.read_bytes(), device, options))
    except RuntimeError:
        return None


def _apart(make: Callable[[], T]) -> T:
    """What `make` makes, in a thread of its own that ends with it.

    OpenVINO gives the thread that opens the CPU another stack for signals. Its memory goes with the last network, and
    should another thread let that one go, the first is left without a stack: the next signal, such as Ctrl+C, would end
    the process by a segmentation fault.
    """
    with ThreadPoolExecutor(1, "openvino") as thread:
        return thread.submit(make).result()


def converted(network: nn.Module, given: dict[str, Tensor], **fixed: Any) -> Any:
    """OpenVINO's model of a float32 network on the CPU, for inputs named and shaped as `given`, of fixed shapes.

    fixed: what else the network is always called with.
    """
    import openvino

    inputs = tuple(given.values())
    whole = _Positional(network.requires_grad_(False), tuple(given), fixed)
    # the networks take ways of their own where gradients are not wanted, which write in parts: here the plain way
    with warnings.catch_warnings(action="ignore"), torch.inference_mode(False), torch.enable_grad():
        inputs = tuple(tensor.clone() for tensor in inputs)
        traced = torch.jit.trace(whole, inputs, check_trace=False)
        model = openvino.convert_model(traced, example_input=inputs)
    for port, value in zip(model.inputs, inputs, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(value.shape)))
    model.validate_nodes_and_infer_types()
    return model


def eight_bits(network: nn.Module, given: dict[str, Tensor], **fixed: Any) -> Any:
    """`converted`, with products and convolutions in eight bits, weights and what they act on alike, by NNCF.

    The network is changed to forms that take less time so. The ranges are those that it meets between `given`, its
    inputs at the beginning, and no noise. Attention is left alone: its weights are small numbers of many sizes. What
    NNCF shows of its progress goes to standard error.
    """
    import nncf

    nncf.set_log_level("ERROR")
    for _, parent, name in list(layers(network)):
        layer = getattr(parent, name)
        for kind, twin in ((Upsample, _Upsample), (GEGLU, _GEGLU)):
            if isinstance(layer, kind):
                setattr(parent, name, twin(layer))
    model = converted(network, given, **fixed)
    seen = [[tensor.numpy() for tensor in inputs.values()] for inputs in _on_the_way(given)]
    with redirect_stdout(sys.stderr):
        return nncf.quantize(
            model,
            nncf.Dataset(seen),
            subset_size=len(seen),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            ignored_scope=nncf.IgnoredScope(types=["ScaledDotProductAttention"], validate=False),
        )


def _on_the_way(given: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What the network is asked later: less noise, and in its place something smooth of the same size."""
    x, generator = given["x"], torch.Generator().manual_seed(0)
    coarse = [-(-side // GRAIN) for side in x.shape[-2:]]
    drawn = torch.randn(1, x[0].numel() // x[0, 0].numel(), *coarse, generator=generator)
    smooth = functional.interpolate(drawn, size=x.shape[-2:], mode="bilinear")
    smooth = (smooth / smooth.std() * x.std()).view(1, -1, *[1] * (x.ndim - 4), *x.shape[-2:])
    return [
        {**given, "x": (1 - done) ** 0.5 * x + done**0.5 * smooth, "time": (1 - done) * given["time"]}
        for done in DONE
    ]


class _Upsample(nn.Module):
    """`Upsample` as one transposed convolution: see `nn.packed.PackedUpsample`."""

    def __init__(self, layer: Upsample):
        super().__init__()
        self.plain = layer
        self.weight = nn.Parameter(shared_kernel(layer.conv.weight.detach()).contiguous())

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        if tuple(size) != (2 * x.shape[-2], 2 * x.shape[-1]):
            return self.plain(x, size)
        return functional.conv_transpose2d(x, self.weight, self.plain.conv.bias, stride=2, padding=1)


class _GEGLU(nn.Module):
    """`GEGLU` with a matrix each for value and gate: what comes of one would be copied to be split."""

    def __init__(self, layer: GEGLU):
        super().__init__()
        self.halves = nn.ModuleList()
        for weight, bias in zip(layer.proj.weight.chunk(2), layer.proj.bias.chunk(2), strict=True):
            half = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            half.weight, half.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            self.halves.append(half)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.halves
        return value(x) * functional.gelu(gate(x))


class _Positional(nn.Module):
    """A network whose inputs are told apart by their order."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], fixed: dict[str, Any]):
        super().__init__()
        self.network, self.names, self.fixed = network, names, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
