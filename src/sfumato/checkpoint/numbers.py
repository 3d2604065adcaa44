"""Whether a file's tensors hold numbers, told from their bits: for who looks at a stranger's file without torch."""

from __future__ import annotations

import os

import numpy as np

from sfumato.checkpoint.header import UNUSABLE, Header, shown
from sfumato.errors import CheckpointError

BLOCK = 2**20  # numbers looked at together
# dtype → (unsigned numbers of that size, bits that are all set in NaN and infinity, and in no number)
BITS = {
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F80_0000), "F64": ("<u8", 0x7FF0 << 48),
    "F8_E5M2": ("u1", 0x7C), "F8_E4M3": ("u1", 0x7F), "F8_E8M0": ("u1", 0xFF),
}  # fmt: skip


def check_numbers(path: str | os.PathLike[str], header: Header) -> None:
    """`CheckpointError` that names the first tensor with NaN or infinite values. Reads the whole file."""
    with open(path, "rb", buffering=0) as stream:
        for name, entry in header.tensors.items():
            if entry.dtype not in BITS:
                continue
            kind, mask = BITS[entry.dtype]
            stream.seek(entry.start)
            for first in range(0, entry.count, BLOCK):
                block = np.fromfile(stream, kind, min(BLOCK, entry.count - first))
                if ((block & mask) == mask).any():
                    raise CheckpointError(f"{path}: {shown(name)} {UNUSABLE}")
