"""The pre-norm block of the text encoder and the DiT: RMSNorm, QK-norm, rotary attention, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.nn.attention import attention
from sfumato.nn.embed import rotate


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last axis, without a gain (Zhang & Sennrich 2019, eq. 4)."""
    return functional.rms_norm(x, (x.shape[-1],), eps=eps)


class SelfAttention(nn.Module):
    """Self-attention over (B, N, D) with RMS-normalised queries and keys (Dehghani et al. 2023, sec. 2.1)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_gain = nn.Parameter(torch.ones(width // heads))
        self.k_gain = nn.Parameter(torch.ones(width // heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        B, N, D = x.shape
        q, k, v = (
            part.view(B, N, self.heads, -1) for part in self.qkv(x).split(D, -1)
        )  # each (B, N, K, D/K)
        q = rotate(rms_norm(q.float()) * self.q_gain, cos, sin).to(v.dtype)
        k = rotate(rms_norm(k.float()) * self.k_gain, cos, sin).to(v.dtype)
        q, k, v = (heads.transpose(1, 2).contiguous() for heads in (q, k, v))  # each (B, K, N, D/K)
        return self.out(attention(q, k, v, mask).transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    """w_out(silu(gate) ⊙ value) with one fused input matrix (Shazeer 2020, eq. 6)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_in = nn.Linear(width, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(functional.silu(gate) * value)


def hidden_width(width: int, ratio: float = 8 / 3) -> int:
    """SwiGLU's hidden width: `ratio` × width rounded up to 32, so that matrix tiles stay full."""
    return -(-int(width * ratio) // 32) * 32


class Block(nn.Module):
    """x + gate·attention(norm(x)), then x + gate·mlp(norm(x)).

    `modulation`, when given, is (B, 6, D): shift, scale, gate for the attention and for the MLP (adaLN, Peebles & Xie
    2023, sec. 3.2), or (B, 6, N, D), for each token its own; without it the norms carry learned gains and the gates are
    one.
    """

    def __init__(self, width: int, heads: int, *, modulated: bool):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.mlp = SwiGLU(width, hidden_width(width))
        if not modulated:
            self.attn_gain = nn.Parameter(torch.ones(width))
            self.mlp_gain = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, modulation: Tensor | None = None
    ) -> Tensor:
        if modulation is None:
            x = x + self.attn(rms_norm(x) * self.attn_gain, cos, sin, mask)
            return x + self.mlp(rms_norm(x) * self.mlp_gain)
        if modulation.ndim == 3:
            modulation = modulation.unsqueeze(2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # (B, 1, D) or (B, N, D)
        x = x + gate_a * self.attn(rms_norm(x) * (1 + scale_a) + shift_a, cos, sin, mask)
        return x + gate_m * self.mlp(rms_norm(x) * (1 + scale_m) + shift_m)
