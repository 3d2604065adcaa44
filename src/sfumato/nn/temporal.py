"""What makes a network of pictures one of clips: layers that mix frames, each added to one that does not.

Source: Blattmann et al. 2023a (arXiv 2304.08818), sec. 3.1, and 2023b (arXiv 2311.15127), app. D;
sgm/modules/video_attention.py and sgm/modules/diffusionmodules/video_model.py. Names of parameters are those of
diffusers.

Frames are rows of a batch, (B·T, C, H, W), those of a clip one after the other, and maps are channels-last in memory.
Then a clip is a map as well, T high and H·W wide: `as_clips` is a view, a convolution along time a flat 3×1 one, and no
number is moved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.nn.attention import attention
from sfumato.nn.spatial import TOKEN_EPS, CrossAttention, FeedForward, Projections, read_context


def as_clips(x: Tensor, frames: int) -> Tensor:
    """(B·T, C, H, W) → (B, C, T, H·W), a view of channels-last memory."""
    rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B·T, H, W, C)
    return rows.unflatten(0, (-1, frames)).flatten(2, 3).permute(0, 3, 1, 2)


def as_frames(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `as_clips`: (B, C, T, H·W) → (B·T, C, H, W)."""
    rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, T, H·W, C)
    return rows.flatten(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class TemporalConv(nn.Module):
    """A 3×1×1 convolution of clips (B, C, T, H·W) along T, zeros before the first frame and after the last."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, channels, 3, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.flat, self.bias, padding=(1, 0))

    @property
    def flat(self) -> Tensor:
        """(O, C, 3, 1): the kernel on a map that is T high and H·W wide."""
        return self.weight[..., 0]


class Mixer(nn.Module):
    """x + share · change, with the learned share of what frames say to each other; both tensors of one form.

    The factor stored is before a sigmoid. `of_space`: the sigmoid is the share of what each frame says alone, as in the
    denoiser; else it is the change's, as in the autoencoder.
    """

    def __init__(self, start: float, *, of_space: bool):
        super().__init__()
        self.of_space = of_space
        self.mix_factor = nn.Parameter(torch.tensor([start]))

    @property
    def share(self) -> Tensor:
        """(1,): the change's, in the type of the weight."""
        return torch.sigmoid(-self.mix_factor if self.of_space else self.mix_factor)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        return torch.addcmul(x, change, self.share.to(x.dtype))


class TemporalResnet(nn.Module):
    """conv2(silu(norm2(conv1(silu(norm1(x))) + time))) of clips: what is to be added to each frame.

    The norms take their statistics from all frames of a clip together.
    """

    def __init__(self, channels: int, time_width: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = TemporalConv(channels, channels)
        self.time_emb_proj = nn.Linear(time_width, channels) if time_width else None
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = TemporalConv(channels, channels)

    def forward(self, x: Tensor, frames: int, time: Tensor | None = None) -> Tensor:
        """x: (B·T, C, H, W); time: (B, time_width), after its activation. Returns the like of x."""
        h = self.norm1(as_clips(x, frames))  # (B, C, T, H·W)
        h = self.conv1(functional.silu(h, inplace=not h.requires_grad))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.norm2(h)
        h = self.conv2(functional.silu(h, inplace=not h.requires_grad))
        return as_frames(h, *x.shape[-2:])


class FrameAttention(Projections):
    """Attention of each cell to the same cell of the other frames: x (B·T, N, D), those of a clip one after the other.

    The sequences are as short as a clip, and there is one for each cell and head: what counts is how many.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, width)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        q, k, v = (  # (B·T, N, D) → (B, N, K, T, D/K) each
            project(x).unflatten(0, (-1, frames)).unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1, 4)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        q, k, v = (tokens.flatten(0, 1) for tokens in (q, k, v))
        mixed = attention(q, k, v).unflatten(0, (-1, x.shape[1]))  # (B, N, K, T, D/K)
        return self.to_out[0](mixed.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(2))


class TemporalBlock(nn.Module):
    """x + feed-forward, + attention over frames, + attention to the context, + feed-forward, each after its norm."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(width, TOKEN_EPS)
        self.ff_in = FeedForward(width)
        self.norm1 = nn.LayerNorm(width, TOKEN_EPS)
        self.attn1 = FrameAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, TOKEN_EPS)
        self.attn2 = CrossAttention(width, heads, context)
        self.norm3 = nn.LayerNorm(width, TOKEN_EPS)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor, frames: int) -> Tensor:
        """x: (B·T, N, D); context: (B, M, context width). Returns the like of x."""
        x = self.ff_in(self.norm_in(x)).add_(x)
        x = self.attn1(self.norm1(x), frames).add_(x)
        x = read_context(x, self.norm2, self.attn2, context)
        return self.ff(self.norm3(x)).add_(x)
