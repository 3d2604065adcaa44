"""The spatial transformer of latent diffusion: cells of a feature map as tokens that see each other and a text.

Source: Rombach et al. 2022 (arXiv 2112.10752), sec. 3.3 and app. E.2.1; ldm/modules/attention.py. Names of parameters
are those of diffusers' `Transformer2DModel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from sfumato.nn.attention import attention

MAP_EPS = 1e-6  # of the GroupNorm over the feature map (ldm/modules/attention.py, Normalize)
TOKEN_EPS = 1e-5  # of the LayerNorms over tokens
HELD = 3 * 2**22  # numbers of the feed-forward's widest activation made at a time: 24 MiB of bfloat16


class Projections(nn.Module):
    """Layers of an attention of `width` channels: queries of tokens, keys and values of a context, and the way out."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class CrossAttention(Projections):
    """Attention of tokens (B, N, D) to a context (B, M, context width), or to themselves without one."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, N, D); context: (B, M, context width). Returns (B, N, D)."""
        source = x if context is None else context
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (self.to_q(x), self.to_k(source), self.to_v(source))
        )  # each (B, K, N, D/K)
        return self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """(…, D) → (…, hidden): value ⊙ gelu(gate), both from one matrix (Shazeer 2020, eq. 6)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class TanhGELU(nn.Module):
    """(…, D) → (…, hidden): gelu(proj(x)), by the approximation with a hyperbolic tangent (Hendrycks & Gimpel 2016,
    sec. 2).
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """w_out(entrance(x)) on each token of (B, N, D). entrance: to four times the width; GEGLU unless given.

    Without gradients the tokens pass in parts, so that the hidden activation, up to eight times the width, stays in the
    cache instead of going to memory and back.
    """

    def __init__(self, width: int, entrance: GEGLU | TanhGELU | None = None):
        super().__init__()
        first = GEGLU(width, 4 * width) if entrance is None else entrance
        self.widest = first.proj.out_features  # of what is made of a token
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[:-1].numel()
        parts = -(-tokens * self.widest // HELD)
        if torch.is_grad_enabled() or x.device.type != "cpu" or parts == 1:
            return self.net[2](self.net[0](x))
        rows = -(-tokens // parts)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # of which `flatten` is a view
        for part, answer in zip(x.flatten(0, 1).split(rows), out.flatten(0, 1).split(rows), strict=True):
            answer.copy_(self.net[2](self.net[0](part)))
        return out


class TransformerBlock(nn.Module):
    """x + self-attention, + attention to the context, + feed-forward, each after its LayerNorm."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, TOKEN_EPS)
        self.attn1 = CrossAttention(width, heads, width)
        self.norm2 = nn.LayerNorm(width, TOKEN_EPS)
        self.attn2 = CrossAttention(width, heads, context)
        self.norm3 = nn.LayerNorm(width, TOKEN_EPS)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B·T, N, D), T rows, one after the other, for each of context (B, M, context width).

        Or x: (B/2, N, D), what both halves of context are about; the answer is then of B rows.
        """
        x = self.attn1(self.norm1(x)).add_(x)
        if len(x) < len(context):
            x = x.repeat(len(context) // len(x), 1, 1)
        x = read_context(x, self.norm2, self.attn2, context)
        return self.ff(self.norm3(x)).add_(x)


def read_context(x: Tensor, norm: nn.Module, attend: nn.Module, context: Tensor) -> Tensor:
    """x + attend(norm(x), context) for tokens x: (B·T, N, D), of which T rows go with one of context (B, M, C).

    The weights over a context of one token are 1, whoever asks: what is added is then the same for all.
    """
    rows = x.view(len(context), -1, x.shape[-1])  # (B, T·N, D)
    if context.shape[1] == 1:
        return (rows + attend.to_out[0](attend.to_v(context))).view(x.shape)
    return attend(norm(rows), context).add_(rows).view(x.shape)


class SpatialTransformer(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))) with the cells of x: (B, C, H, W) as tokens, row by row.

    The projections are linear layers if `linear`, else 1×1 convolutions, which mean the same.
    """

    def __init__(self, width: int, heads: int, depth: int, context: int, groups: int, *, linear: bool):
        super().__init__()
        self.convolves = not linear
        self.norm = nn.GroupNorm(groups, width, MAP_EPS)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, heads, context) for _ in range(depth)]
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """context: (B, M, context width), or (2B, M, context width) for an answer of 2B rows."""
        H, W = x.shape[-2:]
        h = self.norm(x)
        h = to_tokens(self.proj_in(h)) if self.convolves else self.proj_in(to_tokens(h))  # (B, H·W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(to_map(h, H, W)) if self.convolves else to_map(self.proj_out(h), H, W)
        return h.add_(x if len(x) == len(h) else x.repeat(len(h) // len(x), 1, 1, 1))  # (B, C, H, W)


def same_halves(*rows: Tensor) -> bool:
    """Whether of all of these (2B, …) the second half of the rows is the first again, as guidance has it.

    Until a text tells them apart, half the work gives all. Asked on a CPU without gradients; elsewhere the answer is
    no, as a GPU would have to be waited for.
    """
    if has_torch_function(rows):  # a mode without numbers answers for itself
        return handle_torch_function(same_halves, rows, *rows)
    if torch.is_grad_enabled() or any(each.device.type != "cpu" or len(each) % 2 for each in rows):
        return False
    return all(torch.equal(*each.chunk(2)) for each in rows)


class AsOne(TorchFunctionMode):
    """While it is on, `same_halves` says yes: for who traces or counts without numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return True if func is same_halves else func(*args, **(kwargs or {}))


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), row by row; of a map in channels-last memory it is a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_tokens`: a map in channels-last memory, always a view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
