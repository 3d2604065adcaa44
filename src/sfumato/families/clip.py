"""CLIP's text encoders and tokenizers of a checkpoint, as every family of published checkpoints opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoint.fill import fill_layers
from sfumato.families.published.folder import tokenizer_folder
from sfumato.families.published.keys import clip_map
from sfumato.text.clip import ClipConfig, ClipTextEncoder
from sfumato.text.clip_tokens import ClipTokenizer, bundled, open_folder


def load_encoder(
    config: ClipConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    name: str = "text encoder",
    device: torch.device | None = None,
) -> ClipTextEncoder:
    """An encoder with these weights, on `device` or on their own, for inference; filled layer by layer.

    tensors: under the names of transformers, with `text_model.` (published files) or without it (`CLIPTextModel` saved
    since its version 5.6), and beside them what only the comparison with pictures needs. dtype: of all weights; None
    keeps what they have. `CheckpointError`, in which `name` stands for the file, as of `KeyMap.to_ours` and `fill`.
    """
    with torch.device("meta"):
        encoder = ClipTextEncoder(config)
    fill_layers(encoder, clip_map(config).to_ours(tensors, name), name, dtype, device)
    return encoder.eval().requires_grad_(False)


def tokenizer_of(folder: Path | None, part: str, pad: int | None) -> ClipTokenizer:
    """A diffusers folder's own for this text encoder, or else the bundled one, with `pad` as for `ClipTokenizer`."""
    place = None if folder is None else folder / tokenizer_folder(part)
    if place is None or not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return bundled(pad)
    return open_folder(place)
