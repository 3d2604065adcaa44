"""What one picture costs: numbers, FLOPs, seconds and memory, for a model and for the same trunk in pixel space."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sfumato.flops import count_flops, module_size, with_flops
from sfumato.memory import LiveBytes, peak_resident
from sfumato.types import Request

if TYPE_CHECKING:
    from sfumato.generate import Model


def cost_report(model: Model, request: Request, repeats: int = 3) -> dict[str, Any]:
    """Plain JSON: the request that was measured, and under `latent` and `pixel` what `measure` says of each model.

    request: of one picture, drawn from noise in one pass.

    The pixel twin has the same trunk and as many tokens, an autoencoder that does nothing, and untrained weights, which
    cost exactly as much as trained ones.
    """
    request = model.complete(request)
    twin = pixel_model(model)
    return {
        "model": model.name,
        "prompt": request.prompt,
        "size": list(request.size or ()),
        "steps": request.steps,
        "guidance": request.guidance,
        "sampler": request.sampler,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "latent": measure(model, request, repeats),
        "pixel": measure(twin, request, repeats),
    }


def pixel_model(model: Model) -> Model:
    """The pixel twin of `model`, on its device and in its precision, with fresh weights. Draws nothing globally."""
    with torch.random.fork_rng(devices=[]):
        system = model.system.pixel_twin()
    for module in (system.autoencoder, system.denoiser):
        module.to(model.device).eval().requires_grad_(False)
    return type(model)(system, model.device, name=f"{model.name} in pixels", dtype=model.dtype)


@torch.inference_mode()
def measure(model: Model, request: Request, repeats: int = 3) -> dict[str, Any]:
    """Costs of one picture of a complete `request`.

    numbers: what the sampler works on, C·T·H·W; tokens: what attention sees of them. flops: of the text (prompt and
    negative), one guided step, the decoding, and the picture in whole. seconds: median of `repeats` after one picture
    to warm up. weight_bytes, tensor_bytes: the weights, and the most that all other tensors held at once.
    peak_bytes: the process's largest resident memory while drawing, or the GPU's.
    """
    assert request.size and request.guidance is not None
    width, height = request.size
    shape = model.system.autoencoder.latent_shape(1, height, width)
    x = torch.zeros(1, *shape, device=model.device)
    level = torch.tensor(0.5, dtype=torch.float64)
    cond, text = with_flops(model.condition, request)
    denoise = model.denoiser(cond, request.guidance)
    size = module_size(model.system.autoencoder, model.system.denoiser)
    flops = {
        "text": text,
        "step": count_flops(denoise, x, level),
        "decode": count_flops(model.decode_pixels, x),
        "picture": count_flops(model.generate, request),
    }
    times = [_timed(model.generate, request, model.device) for _ in range(repeats)]
    with LiveBytes() as live:
        model.generate(request)
    return {
        "numbers": math.prod(shape),
        "tokens": math.prod(shape[1:]) // model.system.config.denoiser.patch**2,
        "parameters": size.parameters,
        "flops": flops,
        "seconds": round(statistics.median(times), 4),
        "weight_bytes": size.bytes,
        "tensor_bytes": live.peak,
        "peak_bytes": _peak_bytes(model.generate, request, model.device),
    }


def _timed(call: Callable[[Request], Any], request: Request, device: torch.device) -> float:
    started = time.perf_counter()
    call(request)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peak_bytes(call: Callable[[Request], Any], request: Request, device: torch.device) -> int:
    """Peak memory of the GPU, or of the process during the call; where no system tells, since its start, or 0."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call(request)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # Linux: start the high-water mark again
    call(request)
    return peak_resident()
