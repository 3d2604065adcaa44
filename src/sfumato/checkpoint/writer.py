"""A safetensors file written tensor by tensor, so that memory holds one of them and not the model.

The format (github.com/huggingface/safetensors, README): eight bytes with the header's length, a JSON header that gives
each tensor's type, shape and place, and the tensors' bytes. The header needs types and shapes alone, which `info` has
before anything is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sfumato.checkpoint.header import UNUSABLE
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.rules import info, origin
from sfumato.checkpoint.source import DTYPES
from sfumato.errors import CheckpointError, InputError
from sfumato.storage import HEADER_LIMIT, atomic_file

NAMES = {dtype: name for name, dtype in DTYPES.items()}  # the format's names of types


def write_tensors(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    on_tensor: Callable[[str], None] | None = None,
) -> int:
    """Write `weights` to `path`, which appears whole or not at all; returns the tensors' bytes.

    weights: name to tensor, read one after another. dtype: what floating-point tensors become; None keeps theirs, and
    whole numbers are kept always. `on_tensor` hears of each name once it is written, and may raise to cancel.
    `CheckpointError` names a tensor that holds NaN or infinity, or that does not fit the type (float16 ends at 65504).
    """
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in weights:
        found, shape = info(weights, name)
        plan[name] = (dtype if dtype is not None and found.is_floating_point else found, shape)
        if plan[name][0] not in NAMES:
            raise InputError(f"tensor {name!r} is of type {plan[name][0]}, which the format does not have")
    # the widest types first, so that every tensor begins at a multiple of its type's size
    order = sorted(plan, key=lambda name: (-plan[name][0].itemsize, name))

    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        kind, shape = plan[name]
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise InputError(
            f"the header of {path} would have {len(text)} bytes; the format allows {HEADER_LIMIT}"
        )

    with atomic_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            kind, shape = plan[name]
            tensor = _cast(origin(weights, name), weights[name], kind)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"tensor {name!r} is {tuple(tensor.shape)}, but was announced as {shape}"
                )
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if on_tensor is not None:
                on_tensor(name)
    return end


def _cast(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    """The tensor on the CPU in `kind`, contiguous; `CheckpointError` when its numbers are no numbers, there or here."""
    tensor = tensor.detach()
    cast = tensor.to(device="cpu", dtype=kind).contiguous()
    if cast.is_floating_point() and not finite(cast):
        if finite(tensor):
            raise CheckpointError(
                f"tensor {name!r} holds numbers beyond the range of {NAMES[kind]}; use bfloat16 or float32"
            )
        raise CheckpointError(f"tensor {name!r} {UNUSABLE}")
    return cast
