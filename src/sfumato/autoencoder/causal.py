"""The frames of a clip, each a latent of a picture, to a fourth as many latents and back: causal in time.

An autoencoder of pictures has done the work in space and stays as it is. What is here lies between its two halves and
mixes frames only, near the bottleneck, where a frame is 256 cells and not 16,384 pixels. 1 + 4k frames become 1 + k
latents: the first is the first frame's own, to the bit, so that a picture is a clip of one frame; each other one stands
for four frames, and is the last of these with what the frames between need added. Decoding draws the straight way from
one latent to the next and adds what that gets wrong. So every latent of a clip looks like one of a picture, which a
denoiser of pictures knows already.

Nothing looks ahead: a latent depends on its frames and the one before them, and frames on their latents and those
before. A film is therefore encoded and decoded in pieces that hand on a `Cache`, and is the film done whole
(Wan 2.1 and WF-VAE, 2411.17459, cache features in the same way).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import checks
from sfumato.autoencoder.model import ChannelNorm, ResidualBlock, from_frames, to_frames
from sfumato.errors import InputError
from sfumato.nn.plain import from_plain
from sfumato.types import MAX_FRAMES

STRIDE = 4  # frames for each latent after the first


@dataclass(frozen=True)
class CausalConfig:
    """Shape of the layers between frames."""

    channels: int = 8  # of a picture's latent
    width: int = 96  # channels within
    encoder_blocks: int = 2  # residual blocks, of 3×3 convolutions
    decoder_blocks: int = 4  # the same; half of them before frames meet what was before, half after

    def __post_init__(self) -> None:
        for name in ("channels", "width", "encoder_blocks", "decoder_blocks"):
            checks.whole(name, getattr(self, name), 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CausalConfig:
        return from_plain(cls, values, "temporal")

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Cache(NamedTuple):
    """What a piece hands to the next. last: (B, C, 1, H, W), the last frame's latent, or the last latent. features:
    (B, 1, D, H, W) of decoding, None of encoding and after the first frame.
    """

    last: Tensor
    features: Tensor | None = None


class Causal(nn.Module):
    """Latents of frames (B, C, 1 + 4k, H, W), normalised ↔ latents of a clip (B, C, 1 + k, H, W)."""

    def __init__(self, config: CausalConfig):
        super().__init__()
        self.config = config
        self.encoder = Joiner(config)
        self.decoder = Parter(config)
        self.to(memory_format=torch.channels_last)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of the frames, and their latents."""
        latent = self.encode(frames)
        return self.decode(latent), latent

    def encode(self, frames: Tensor) -> Tensor:
        """All at once. `InputError` unless there are 1 + 4k frames."""
        check_frames(frames.shape[2])
        return self.encode_more(frames)[0]

    def decode(self, latent: Tensor) -> Tensor:
        """All at once: (B, C, 1 + k, H, W) → (B, C, 1 + 4k, H, W)."""
        return self.decode_more(latent)[0]

    def encode_more(self, frames: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The next latents: of 1 + 4k frames without a `cache`, of 4k with that of the piece before."""
        before = frames[:, :, :1] if cache is None else cache.last
        rest = frames[:, :, 1:] if cache is None else frames
        if rest.shape[2] % STRIDE:
            raise InputError(
                f"a piece of a clip has {STRIDE} frames for each latent, not {rest.shape[2]}",
                argument="frames",
            )
        found = [before] if cache is None else []
        if rest.shape[2]:
            found.append(self.encoder(before, rest))
        return torch.cat(found, 2), Cache((rest if rest.shape[2] else before)[:, :, -1:])

    def decode_more(self, latent: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """The next frames: 1 + 4k of 1 + k latents without a `cache`, 4k of k with that of the piece before."""
        before = latent[:, :, :1] if cache is None else cache.last
        rest = latent[:, :, 1:] if cache is None else latent
        found, features = [before] if cache is None else [], None if cache is None else cache.features
        if rest.shape[2]:
            frames, features = self.decoder(before, rest, features)
            found.append(frames)
        return torch.cat(found, 2), Cache(latent[:, :, -1:], features)


class Joiner(nn.Module):
    """Four frames and the one before them to a latent: a causal convolution over five frames with a stride of four."""

    def __init__(self, config: CausalConfig):
        super().__init__()
        self.stem = nn.Conv2d((1 + STRIDE) * config.channels, config.width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.encoder_blocks)))
        self.head = Head(config.width, config.channels)

    def forward(self, before: Tensor, frames: Tensor) -> Tensor:
        """before: (B, C, 1, H, W); frames: (B, C, 4k, H, W) → (B, C, k, H, W)."""
        B = len(frames)
        groups = frames.unflatten(2, (-1, STRIDE))  # (B, C, k, 4, H, W)
        last = groups[:, :, :, -1]  # (B, C, k, H, W)
        previous = torch.cat([before, last[:, :, :-1]], 2)[:, :, :, None]
        seen = torch.cat([previous, groups], 3).transpose(1, 2).flatten(2, 3)  # (B, k, C·5, H, W)
        x = seen.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (B·k, C·5, H, W)
        return last + from_frames(self.head(self.body(self.stem(x))), B).to(last.dtype)


class Parter(nn.Module):
    """A latent and the one before it to four frames; what the latent before has made of its own is handed on."""

    def __init__(self, config: CausalConfig):
        super().__init__()
        half = max(1, config.decoder_blocks // 2)
        self.channels = config.channels
        self.stem = nn.Conv2d(2 * config.channels, config.width, 3, padding=1)
        self.early = nn.Sequential(*(ResidualBlock(config.width) for _ in range(half)))
        self.recall = nn.Conv2d(config.width, config.width, 1)
        self.late = nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.decoder_blocks - half)))
        self.head = Head(config.width, STRIDE * config.channels)
        nn.init.zeros_(self.recall.weight)
        nn.init.zeros_(self.recall.bias)  # type: ignore[arg-type]

    def forward(self, before: Tensor, latent: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """before: (B, C, 1, H, W); latent: (B, C, k, H, W); features: (B, 1, D, H, W) of the latent before, if it has
        any → frames (B, C, 4k, H, W), and the features of the last latent.
        """
        B = len(latent)
        previous = torch.cat([before, latent[:, :, :-1]], 2)  # (B, C, k, H, W)
        x = self.early(self.stem(to_frames(torch.cat([previous, latent], 1))))  # (B·k, D, H, W)
        own = x.unflatten(0, (B, -1))  # (B, k, D, H, W)
        if features is None:
            features = torch.zeros_like(own[:, :1])
        recalled = torch.cat([features.to(own.dtype), own[:, :-1]], 1).flatten(0, 1)
        x = x + self.recall(recalled.contiguous(memory_format=torch.channels_last))
        x = self.head(self.late(x)).unflatten(0, (B, -1)).unflatten(2, (STRIDE, -1))  # (B, k, 4, C, H, W)
        added = x.permute(0, 3, 1, 2, 4, 5).to(latent.dtype)  # (B, C, k, 4, H, W)
        share = torch.arange(1, STRIDE + 1, device=latent.device, dtype=latent.dtype)[:, None, None] / STRIDE
        straight = previous[:, :, :, None] + share * (latent - previous)[:, :, :, None]
        return (straight + added).flatten(2, 3), own[:, -1:]


class Head(nn.Module):
    """norm, silu, and a convolution that begins at 0: at first the straight way is all there is."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


def latents_of(frames: int) -> int:
    """How many latents so many frames make; `InputError` unless they are 1 + 4k."""
    check_frames(frames)
    return 1 + (frames - 1) // STRIDE


def check_frames(frames: int) -> None:
    """`InputError`, with the nearest that are, unless a clip of so many frames can be encoded."""
    if frames < 1 or (frames - 1) % STRIDE:
        low = 1 + max(0, frames - 1) // STRIDE * STRIDE
        most = 1 + (MAX_FRAMES - 1) // STRIDE * STRIDE
        near = sorted({str(min(max(count, 1 + STRIDE), most)) for count in (low, low + STRIDE)}, key=int)
        nearest = f"the nearest are {' and '.join(near)}" if len(near) > 1 else f"the nearest is {near[0]}"
        raise InputError(
            f"a clip has 1 + {STRIDE}·k frames, not {frames}; {nearest}",
            argument="frames",
        )
