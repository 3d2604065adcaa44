"""The machine's own speed limit, measured in the run that is compared with it."""

from __future__ import annotations

import time

import torch

SIZES = (512, 1024, 2048)  # sides of the square factors; small machines peak below the largest, GPUs at it
GPU_SIZES = (4096, 8192)


def matmul_peak(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """The best rate of a square matrix product in `dtype` on `device`, in FLOP/s.

    `seconds` is the time spent altogether; the result is the best of many products over several sizes, because a probe
    is a limit and everything that disturbs it only lowers it.
    """
    device = torch.device(device)
    sizes = GPU_SIZES if device.type == "cuda" else SIZES
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty(size, size, device=device, dtype=dtype)
        _timed(a, b, out)
        until = time.perf_counter() + seconds / len(sizes)
        while True:
            best = max(best, 2 * size**3 / _timed(a, b, out))
            if time.perf_counter() >= until:
                break
    return best


def _timed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - started
