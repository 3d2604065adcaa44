"""A denoiser run by OpenVINO, Intel's engine, on a CPU or an Intel GPU. It is an optional extra, `sfumato[openvino]`.

OpenVINO compiles a network for one shape of its inputs. For a Stable Diffusion that takes long, so what it made is kept
in the user's cache, under a name that tells the weights, the shapes, the device and the version, and read from there
the next time without looking at the weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.storage import atomic_file, cache_folder

ENGINE = "openvino"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


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
    float32, bfloat16 or float16, as far as the device can. Compiled networks stay in memory, one for each shape met.
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
        *,
        time_cond: Tensor | None = None,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """As the network's own, without what a ControlNet adds. Leaving layers out is another network to the engine."""
        named = {"x": x, "time": time.expand(len(x)), "context": context, "vector": vector}
        named["time_cond"] = time_cond
        given = {
            name: tensor.detach().float().cpu().contiguous()
            for name, tensor in named.items()
            if tensor is not None
        }
        answer = self._for(given, tuple(sorted(skip_layers)))([tensor.numpy() for tensor in given.values()])[
            0
        ]
        return torch.from_numpy(answer.copy()).to(x)  # the engine writes its next answer to the same memory

    def _for(self, given: dict[str, Tensor], skipped: tuple[int, ...]) -> Any:
        """The network compiled for the shapes of these inputs."""
        import openvino

        facts = {
            "weights": self.weights,
            "config": self.config.to_dict(),
            "inputs": {name: list(tensor.shape) for name, tensor in given.items()},
            "device": self.device,
            "precision": PRECISIONS[self.dtype],
            "version": openvino.__version__,
        }
        if skipped:
            facts["skipped"] = skipped
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if key not in self.compiled:
            file, options = self.cache / f"{key}.blob", settings(self.device, self.dtype)
            made = _read(file, self.device, options)
            if made is None:
                model = converted(self.network(), given, **({"skip_layers": skipped} if skipped else {}))
                made = openvino.Core().compile_model(model, self.device, options)
                with atomic_file(file) as temporary, temporary.open("wb") as stream:
                    stream.write(made.export_model().getbuffer())
            self.compiled[key] = made
        return self.compiled[key]


def settings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """How OpenVINO is to compile: for one answer as early as possible, on as many threads as PyTorch has."""
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()} if device == "CPU" else {}
    return {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "PERFORMANCE_HINT": "LATENCY", **threads}


def _read(file: Path, device: str, options: dict[str, Any]) -> Any:
    """What the file holds, or None: it is not there, or the engine cannot use it, and it will be written anew."""
    if not file.is_file():
        return None
    import openvino

    try:
        with file.open("rb") as stream:
            return openvino.Core().import_model(stream.read(), device, options)
    except RuntimeError:
        return None


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


class _Positional(nn.Module):
    """A network whose inputs are told apart by their order."""

    def __init__(self, network: nn.Module, names: tuple[str, ...], fixed: dict[str, Any]):
        super().__init__()
        self.network, self.names, self.fixed = network, names, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
