"""Where and in which precision work runs. Explicit: nothing is probed at import, nothing is global."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

import torch

from sfumato.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or CUDA if there is one, else the CPU. Raises `InputError` when the named one is absent."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is unknown; use cpu or cuda", argument="device")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda or cuda:0", argument="device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device cuda was asked for, but this PyTorch sees no GPU; use cpu", argument="device"
        )
    return device


def check_dtype(name: str, dtype: torch.dtype | None) -> None:
    """`InputError` for what is no type of PyTorch, such as its name."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"{name} must be a torch.dtype such as torch.float32, not {dtype!r}", argument=name)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products and convolutions in `dtype`, sums and norms in float32; for float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    # its cache of casts belongs to all threads, and gains nothing where a call uses a weight once
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, and a CPU faster than float32; else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if bfloat16_is_fast() else torch.float32


@functools.cache
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32.

    With a matrix unit it does. AVX512's instruction for it does not tell: on a Zen 4 it makes products three times as
    fast, on Intel's cores whose matrix unit is switched off, as in many virtual machines, half as fast. So it is
    measured, once, in some milliseconds.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    with workers("products", 1, threads=1) as pool:  # no mode of the caller's holds there
        seconds = pool.submit(_seconds_of_products).result()
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _seconds_of_products() -> dict[torch.dtype, float]:
    """The least time that a product takes in each type, of several by turns."""
    factors = {dtype: torch.ones(256, 256, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)}
    least = dict.fromkeys(factors, float("inf"))
    for _ in range(10):
        for dtype, factor in factors.items():
            started = time.perf_counter()
            torch.mm(factor, factor)
            least[dtype] = min(least[dtype], time.perf_counter() - started)
    return least


class Clock:
    """Seconds of the stages of work on a device, which is waited for at the end of each."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict[str, float]()
        self._since = time.perf_counter()

    def lap(self, stage: str, counts: bool = True) -> None:
        """The time since the last lap was this stage's; where it does not count, the next one's."""
        if not counts:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def deterministic() -> None:
    """From now on only kernels that give the same numbers every time, in the whole process: for a program to ask.

    On a CPU they are so for one number of threads; on a GPU those without are an error that PyTorch names.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not, since CUDA 10.2
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def kernels(device: torch.device) -> dict[str, Any]:
    """What decides, beside versions and types, how sums are rounded: the processor's instructions and the threads, or
    the GPU and its libraries; and whether `deterministic` was asked for.
    """
    found: dict[str, Any] = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if device.type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        return found | gpu | {"cudnn": torch.backends.cudnn.version()}
    return found | {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def workers(name: str, count: int, threads: int) -> ThreadPoolExecutor:
    """A pool of `count` workers, each with so many of torch's threads. Others keep what they have."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, name, _take, (threads,))
    started = threading.Barrier(count)
    wait([pool.submit(started.wait) for _ in range(count)])
    torch.set_num_threads(before)  # who asks first from now on gets what was set last
    return pool


def _take(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # settles this thread's number


def give_back() -> None:
    """Return to the system what the C library, and PyTorch of a GPU, keep of freed memory, where they can be asked."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@functools.cache
def batch_invariant(dtype: torch.dtype) -> bool:
    """Whether rows of a CPU's matrix products and convolutions in `dtype` come out the same to the bit in a small batch
    and in a large one. Measured once, by small products: it depends on the processor's units and the library's choice
    of kernels (matrix units often split a sum by the shape of the whole).
    """
    numbers = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers).to(dtype)

    with torch.inference_mode():
        for inner, outer in ((256, 768), (704, 256)):
            rows, weight = normal(16 * 72, inner), normal(outer, inner)
            whole = rows @ weight.T
            if any(not torch.equal(rows[:few] @ weight.T, whole[:few]) for few in (65, 144, 576)):
                return False
        keys = normal(16, 4, 72, 64)
        scores = keys @ keys.transpose(-1, -2)
        pictures, kernel = normal(8, 64, 16, 16), normal(64, 64, 3, 3)
        maps = torch.nn.functional.conv2d(pictures, kernel, padding=1)
        return all(
            torch.equal(keys[:few] @ keys[:few].transpose(-1, -2), scores[:few])
            and torch.equal(torch.nn.functional.conv2d(pictures[:few], kernel, padding=1), maps[:few])
            for few in (1, 2, 4)
        )


def drawing_dtype(device: torch.device) -> torch.dtype:
    """What the hardware is fast in, but on a CPU only where a picture does not depend on its batch. Elsewhere float32,
    in which picture k of a batch is the picture made alone but for a few values that fall to the other side of .5.
    """
    fast = fast_dtype(device)
    return fast if device.type != "cpu" or batch_invariant(fast) else torch.float32
