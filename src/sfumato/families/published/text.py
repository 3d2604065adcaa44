"""Text encoders of a checkpoint and CLIP's tokenizers, as every family of published checkpoints opens them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoint.fill import fill_layers
from sfumato.errors import InputError
from sfumato.families.published.folder import tokenizer_folder
from sfumato.nn.narrow import narrowed
from sfumato.text.clip import ClipConfig, ClipTextEncoder
from sfumato.text.clip_tokens import ClipTokenizer, bundled, open_folder
from sfumato.text.t5 import T5Config, T5Encoder


def open_clip(
    config: ClipConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> ClipTextEncoder:
    """One of the CLIPs with these weights, on `device` or on their own, for inference; filled layer by layer.

    tensors: under our names. dtype: of all weights; None keeps what they have. `CheckpointError`, in which `where`
    stands for the file, as of `fill`.
    """
    with torch.device("meta"):
        encoder = ClipTextEncoder(config)
    fill_layers(encoder, tensors, where, dtype, device)
    return encoder.eval().requires_grad_(False)


def open_t5(
    config: T5Config,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    stream: bool = False,
) -> T5Encoder:
    """T5's encoder in float32, bfloat16, or with int8 products, which no layer enters memory without.

    tensors, where: as of `open_clip`. stream: its layers are read whenever it is called.
    """
    if stream and dtype == torch.int8:
        raise InputError(
            "int8 rounds the weights once, and sequential reads them anew: choose one", argument="text_dtype"
        )
    with torch.device("meta"):
        encoder = T5Encoder(config)
    kept, twin = t5_form(dtype)
    fill_layers(encoder, tensors, where, kept, device, keep=0 if stream else None, twin=twin)
    encoder.device = device
    return encoder.eval().requires_grad_(False)


def t5_form(dtype: torch.dtype) -> tuple[torch.dtype, Callable[[nn.Module], nn.Module | None] | None]:
    """The type of T5's weights where it is asked for in `dtype`, and what makes the layers that are in eight bits."""
    return (torch.bfloat16, narrowed) if dtype == torch.int8 else (dtype, None)


def t5_dtype(dtype: torch.dtype) -> torch.dtype:
    """What T5 is kept in where `dtype` is asked for."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise InputError(
            f"text encoders are kept in float32, bfloat16 or int8, not {str(dtype).removeprefix('torch.')}",
            argument="text_dtype",
        )
    return torch.bfloat16 if dtype == torch.float16 else dtype


def tokenizer_of(folder: Path | None, part: str, pad: int | None) -> ClipTokenizer:
    """A diffusers folder's own for this text encoder, or else the bundled one, with `pad` as for `ClipTokenizer`."""
    place = None if folder is None else folder / tokenizer_folder(part)
    if place is None or not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return bundled(pad)
    return open_folder(place)
