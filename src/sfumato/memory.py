"""What memory a process has, takes and gives back; and what work will take, told by doing it on tensors of no memory.

`tracing` runs any code on PyTorch's fake tensors, which have shape, type and device and no numbers, and adds up what is
allocated and freed. Routes that depend on device and type are taken as they would be, so the count is that of the real
run. What a library takes inside one operation, and what the C allocator keeps in holes, is not seen.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.errors import InputError
from sfumato.flops import formulas

OFFLOADS = ("none", "model", "sequential")  # diffusers' words, from the most memory to the least
BLOCK = 4 << 20  # bytes; smaller blocks are many, and leave small holes
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_offload(name: str) -> None:
    """`InputError` unless it is one of `OFFLOADS`."""
    if name not in OFFLOADS:
        raise InputError(f"offload must be one of {', '.join(OFFLOADS)}, not {name!r}", argument="offload")


@dataclass(frozen=True)
class Stage:
    """One stage of drawing. weights: bytes of weights that are in memory in it. activations: bytes that it holds
    beside them at its worst moment, among them what is read of a file meanwhile. flops: of denoising, those of a step.
    """

    name: str
    weights: int
    activations: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """What a drawing will need, in bytes. It is in the memory of `device`: of a GPU, or of the process.

    offload: one of `OFFLOADS`. base: what the process holds besides, libraries and what they will keep; 0 of a GPU.
    available: what the machine has left for the process, `base` included. limit: what the user allows it, if less.
    kept: of "sequential", bytes of the denoiser's layers that stay in memory all the same.
    """

    device: str
    dtype: str
    offload: str
    base: int
    stages: tuple[Stage, ...]
    available: int
    limit: int | None = None
    kept: int = 0

    @property
    def peak(self) -> int:
        return self.base + max(stage.bytes for stage in self.stages)

    @property
    def allowed(self) -> int:
        return self.available if self.limit is None else min(self.limit, self.available)

    @property
    def limited(self) -> bool:
        """Whether it is the user who allows no more, rather than the machine."""
        return self.limit is not None and self.limit <= self.available

    @property
    def fits(self) -> bool:
        return self.peak <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "offload": self.offload,
            "kept": self.kept,
            "fits": self.fits,
            "peak": self.peak,
            "base": self.base,
            "available": self.available,
            "limit": self.limit,
            "stages": {
                stage.name: {
                    "weights": stage.weights,
                    "activations": stage.activations,
                    "peak": self.base + stage.bytes,
                }
                for stage in self.stages
            },
        }


# --- work on tensors without memory --------------------------------------------------------------------------------


# of a call's arguments: its bytes, its FLOPs, and its answer
Whole = Callable[..., tuple[int, int, Callable[[], Any] | None]]


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations inside it made and that still live: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see((args, kwargs), made=False)  # what was there before
        answer = self.run(func, args, kwargs or {})
        self._see(answer, made=True)
        return answer

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the operation."""
        return func(*args, **kwargs)

    def worst(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """(what `call` answers, the bytes it held at its worst moment beside those that were there before)."""
        before, highest = self.now, self.peak
        self.peak = before
        answer = call()
        took = self.peak - before
        self.peak = max(highest, self.peak)
        return answer, took

    def take(self, count: int) -> None:
        """Hear of bytes that are held for a moment."""
        self.peak = max(self.peak, self.now + count)

    def _see(self, values: Any, made: bool) -> None:
        for tensor in tree_leaves(values):
            if (
                not isinstance(tensor, Tensor)
                or tensor.layout != torch.strided
                or tensor.device.type == "meta"
            ):
                continue
            storage = tensor.untyped_storage()
            if storage in self._seen:
                continue
            self._seen[storage] = True
            if made:
                self.now += storage.nbytes()
                self.take(0)
                weakref.finalize(storage, self._lose, storage.nbytes())

    def _lose(self, size: int) -> None:
        self.now -= size


class Tracer(LiveBytes):
    """The same for fake tensors, and FLOPs of what is done. Numbers that code asks for are all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self._formulas = 0, formulas()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = self._run(func, args, kwargs)
        if (count := self._formulas.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=answer)
        return answer

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aten = torch.ops.aten
        if func in (aten._local_scalar_dense.default, aten.item.default):
            return 0.0
        if func is aten.is_nonzero.default:  # what an `if` asks
            return False
        if func is aten.detach_.default:  # of `torch.tensor` within `torch.device("meta")`: nothing changes
            return args[0]
        laid_out = ("reorder", "prepack")  # anew, by oneDNN: what comes out is as large
        if func.namespace in ("mkldnn", "onednn") and any(word in func.__name__ for word in laid_out):
            turned = "qlinear" in func.__name__  # its product takes (inputs, outputs)
            return torch.empty_like(args[0].t() if turned else args[0])
        return func(*args, **kwargs)


class _Whole(TorchFunctionMode):
    """Takes functions as one operation whose bytes are known, instead of going through their loops."""

    def __init__(self, tracer: Tracer, known: Mapping[Callable[..., Any], Whole]):
        super().__init__()
        self.tracer, self.known = tracer, known

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.known:
            return func(*args, **(kwargs or {}))
        count, flops, answer = self.known[func](*args, **(kwargs or {}))
        self.tracer.take(count)
        self.tracer.flops += flops
        return answer() if answer else None


@contextmanager
def tracing(known: Mapping[Callable[..., Any], Whole]) -> Iterator[Tracer]:
    """Within it every new tensor is fake, and the tracer counts. Without gradients.

    known: functions that are overridable (`torch.overrides`), to what tells of a call the most bytes that it allocates,
    its answer among them, its FLOPs, and how an answer of that form is made, or None if it gives none.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracer = Tracer()
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True), tracer, _Whole(tracer, known):
        yield tracer


# --- the process and the machine ---------------------------------------------------------------------------------


def available(device: torch.device) -> int:
    """Bytes that are free, or can be freed, for this process: of the GPU, or of the machine together with what the
    process holds already, within the limit of its control group.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _field("/proc/meminfo", "MemAvailable")
    machine = _physical() if free is None else free + resident()
    groups = [limit for file in GROUP_LIMITS if (limit := _number(file)) is not None]
    return min([machine, *groups])


def resident() -> int:
    """Bytes of this process in memory now; where the system does not tell, the most it ever had."""
    now = _field("/proc/self/status", "VmRSS")
    return peak_resident() if now is None else now


def peak_resident() -> int:
    """The most bytes of this process that were in memory at once; 0 on systems that do not tell."""
    told = _field("/proc/self/status", "VmHWM")
    if told is not None:
        return told
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def leave_no_holes() -> None:
    """From now on have the C library take every block of `BLOCK` bytes or more from the system, and return it when it
    is freed, instead of keeping it for blocks that may not fit. It costs page faults, some percent of the time.

    This is for the whole process, so it is for a program to ask and not for a library; glibc alone can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, BLOCK)


def _field(file: str, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63 - 1  # not told: nothing is refused
