"""Encoding and decoding that no type's overflow spoils: in float32 where another gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from sfumato.autoencoder.banded import decode_banded, encode_banded
from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.autoencoder.memory import BAND
from sfumato.autoencoder.model import Posterior
from sfumato.errors import NonFiniteError

Out = TypeVar("Out")


def decode_safe(
    model: AutoencoderKL, latent: Tensor, *, band: int = BAND, dtype: torch.dtype | None = None
) -> Tensor:
    """`decode_banded`, in float32 where the type asked for overflows, so that no picture comes out black.

    float16 goes straight to float32 if the config says `force_upcast`. What overflows in float32 too is a
    `NonFiniteError` that names the first layer.
    """
    return rescued(decode_banded, model, latent, band, dtype)


def encode_safe(
    model: AutoencoderKL, pixels: Tensor, *, band: int = BAND, dtype: torch.dtype | None = None
) -> Posterior:
    """`encode_banded`, in float32 where the type asked for overflows; as `decode_safe`."""
    return rescued(encode_banded, model, pixels, band, dtype)


def rescued(
    run: Callable[..., Out], model: AutoencoderKL, x: Tensor, band: int, dtype: torch.dtype | None
) -> Out:
    """A banded pass in the type asked for, or in float32 where that overflows or is known to."""
    dtype = model.dtype if dtype is None else dtype
    if dtype == torch.float16 and model.config.force_upcast:
        dtype = torch.float32
    try:
        return run(model, x, band=band, dtype=dtype)
    except NonFiniteError:
        if dtype.itemsize >= 4:
            raise
    return run(model, x, band=band, dtype=torch.float32)
