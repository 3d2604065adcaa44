"""Pocket's clips: layers between frames for its autoencoder, and a denoiser of its own kind that was shown clips too.

The denoiser of clips has the network of pictures, and reads its text encoder, which stays as it is, with a few words
more. A known beginning, be it a picture or what a film is to go on from, is shown to it as frames without noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.causal import STRIDE, Cache, Causal, CausalConfig, latents_of
from sfumato.errors import InputError
from sfumato.nn.dit import DiT
from sfumato.nn.plain import from_plain
from sfumato.text import TextConfig, TextEncoder
from sfumato.types import Conditioning

PIECE = 4  # latents of a clip encoded or decoded at a time: sixteen frames


@dataclass(frozen=True)
class VideoConfig:
    """What decides the shape of the parts for clips, and what a clip is when the user says nothing."""

    temporal: CausalConfig = field(default_factory=CausalConfig)
    words: tuple[str, ...] = ()  # which the tokenizer knows besides the model's own, for clips
    frames: int = 17  # of a clip of which nothing is said
    fps: float = 8.0
    window: int = 5  # latents that are drawn together, as many as training showed
    context: int = 2  # of these that are the last ones known, where a film goes on
    shared: float = 0.0  # share of the noise's variance that all frames have in common
    first_alone: bool = (
        False  # a clip of which nothing is known begins with its first frame, drawn as a picture
    )

    def __post_init__(self) -> None:
        for name in ("frames", "window", "context"):
            checks.whole(f"video.{name}", getattr(self, name), 1)
        if latents_of(self.frames) < 2 or not self.context < self.window:
            raise InputError(
                "video.frames must be 5 or more and video.context less than video.window", argument="video"
            )
        if not isinstance(self.shared, int | float) or not 0 <= self.shared <= 1:
            raise InputError(f"video.shared must be from 0 to 1, not {self.shared!r}", argument="shared")
        if not isinstance(self.first_alone, bool):
            raise InputError(
                f"video.first_alone must be true or false, not {self.first_alone!r}", argument="first_alone"
            )
        if not isinstance(self.fps, int | float) or not 1 <= self.fps <= 1000:
            raise InputError(f"video.fps must be from 1 to 1000, not {self.fps!r}", argument="fps")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoConfig:
        """The inverse of `asdict` after a passage through JSON."""
        values = dict(values)
        temporal = CausalConfig.from_dict(values.pop("temporal", {}))
        return from_plain(cls, {"temporal": asdict(temporal), **values} | {"temporal": temporal}, "video")


class Animator(nn.Module):
    """The denoiser of clips, and what it reads besides the features of the model's text encoder.

    words: rows of that encoder's table for the words of clips. named: of each token (V + words, D), what √D times is
    added to its features (B, N, D): the encoder learnt its words from pictures, and where it says no place, "left" is
    all but "right" to it. The factor, as of tables elsewhere, lets rows that begin at zero be learnt as fast as layers.
    """

    def __init__(self, dit: DiT, words: int, text: TextConfig):
        super().__init__()
        self.dit = dit
        self.words = nn.Parameter(torch.zeros(words, text.width))
        self.named = nn.Parameter(torch.zeros(text.vocabulary + words, text.width))

    def read(self, text: TextEncoder, ids: Tensor, mask: Tensor) -> Conditioning:
        """Features of prompts."""
        features = text(ids, mask, self.words)
        return Conditioning(features + math.sqrt(features.shape[-1]) * self.named[ids], mask)

    def answer(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """What the network predicts of (B, C, T, H, W) at one level, scalar or (B,); `cond.channels` (B, C, K, H, W)
        are the first K frames, known, or none.

        These are shown without noise, and answered with the flow that leads to them: every sampler arrives there.
        """
        known = cond.channels
        if known is None or not known.shape[2]:
            return self.dit(x, time, cond)
        B, _, T, *_ = x.shape
        K = min(known.shape[2], T)
        known = known[:, :, :K].to(x)
        times = time.expand(B)[:, None].repeat(1, T)  # (B, T)
        times[:, :K] = 0
        answer = self.dit(torch.cat([known, x[:, :, K:]], 2), times, cond)
        sure = (x[:, :, :K] - known) / time.expand(B).view(-1, 1, 1, 1, 1).to(x)
        return torch.cat([sure, answer[:, :, K:].to(x)], 2)


@dataclass(frozen=True)
class VideoParts:
    """The networks that a model for clips has besides."""

    temporal: Causal
    animator: Animator


def encode(autoencoder: Autoencoder, temporal: Causal, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 1 + 4k, H, W) → normalised latents (B, C, 1 + k, h, w), a piece at a time."""
    latents_of(pixels.shape[2])
    found, cache = [], None
    for start, stop in pieces(pixels.shape[2], STRIDE * PIECE):
        frames = autoencoder.encode_normalized(pixels[:, :, start:stop])
        latent, cache = temporal.encode_more(frames, cache)
        found.append(latent)
    return torch.cat(found, 2)


def decode(autoencoder: Autoencoder, temporal: Causal, latent: Tensor) -> Tensor:
    """Normalised latents (B, C, 1 + k, h, w) → pixels (B, 3, 1 + 4k, H, W), a piece at a time."""
    B, _, k, h, w = latent.shape
    f = autoencoder.factor
    pixels = latent.new_empty((B, 3, 1 + STRIDE * (k - 1), h * f, w * f), dtype=torch.float32)
    at = 0
    for piece in decoded(autoencoder, temporal, latent):
        pixels[:, :, at : at + piece.shape[2]] = piece
        at += piece.shape[2]
    return pixels


def decoded(autoencoder: Autoencoder, temporal: Causal, latent: Tensor) -> Iterator[Tensor]:
    """The same piece by piece, for films that are longer than memory."""
    cache: Cache | None = None
    for start, stop in pieces(latent.shape[2], PIECE):
        frames, cache = temporal.decode_more(latent[:, :, start:stop], cache)
        yield autoencoder.decode_normalized(frames)


def pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the pieces of a clip: the first has one more, its beginning."""
    start = 0
    while start < count:
        stop = min(count, start + size + (start == 0))
        yield start, stop
        start = stop
