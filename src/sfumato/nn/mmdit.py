"""The multimodal diffusion transformer: two streams of tokens, picture and text, that meet in every attention.

Sources: Esser et al. 2024 (arXiv 2403.03206), sec. 4 and fig. 2, for the joint blocks and their modulation; Henry et
al. 2020 (arXiv 2010.04245) for norms of queries and keys; Stability-AI/sd3.5, mmditx.py, for the second attention of
the picture alone (MMDiT-X). Names of parameters are those of diffusers' `SD3Transformer2DModel`, so that its files load
without renaming; the original files hold the same numbers under other names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato import checks
from sfumato.errors import InputError
from sfumato.nn.attention import attention
from sfumato.nn.embed import Embedding, sinusoid
from sfumato.nn.plain import from_plain
from sfumato.nn.spatial import FeedForward, TanhGELU

EPS = 1e-6  # of every norm here
TIME_WIDTH = 256  # sinusoids of the time
KEPT = (  # parts of names whose layers stay as they are in eight bits: what enters and leaves, and modulations
    "pos_embed",
    "time_text_embed",
    "context_embedder",
    "norm1",
    "norm1_context",
    "norm_out",
    "proj_out",
)


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of the transformer. The defaults are those of 2024's medium model."""

    channels: int = 16  # of the latent, read and answered
    patch: int = 2  # latent cells per token and side
    layers: int = 24  # joint blocks
    heads: int = 24  # of attention
    head_width: int = 64  # channels of a head
    context: int = 4096  # width of the text's tokens
    pooled: int = 2048  # width of the pooled text
    positions: int = (
        192  # tokens per side of the stored table of positions, of which a picture takes the middle
    )
    qk_norm: bool = False  # queries and keys are divided by their root mean square, with a gain
    dual: tuple[int, ...] = ()  # numbers of the blocks where the picture attends once more, to itself alone

    def __post_init__(self) -> None:
        for name in ("channels", "patch", "layers", "heads", "head_width", "context", "pooled", "positions"):
            checks.whole(name, getattr(self, name), 1)
        if not isinstance(self.qk_norm, bool):
            raise InputError(f"qk_norm must be true or false, not {self.qk_norm!r}", argument="qk_norm")
        known = isinstance(self.dual, tuple) and all(
            type(n) is int and 0 <= n < self.layers for n in self.dual
        )
        if not known or len(set(self.dual)) < len(self.dual):
            raise InputError(
                f"dual must list blocks from 0 to {self.layers - 1}, each once, not {self.dual!r}",
                argument="dual",
            )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_width

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MMDiTConfig:
        """Build from plain values, lists for tuples; an unknown field is an `InputError` that lists the known ones."""
        return from_plain(cls, values, "MMDiT")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PatchEmbed(nn.Module):
    """(B, C, H, W) → (B, H/p · W/p, D), row by row, with each token's place added from a stored table.

    The table is a square, of which a picture takes the rectangle in the middle: it is never interpolated (Esser et al.
    2024, sec. 5.3.2). An odd remainder goes below and to the right.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.side = config.positions
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.register_buffer("pos_embed", torch.zeros(1, self.side**2, config.width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)  # (B, D, H/p, W/p)
        rows, columns = h.shape[-2:]
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))  # (1, positions, positions, D)
        places = table[:, top : top + rows, left : left + columns].flatten(1, 2)
        tokens = h.flatten(2).transpose(1, 2).contiguous()  # all that is added later has their form in memory
        return tokens + places.to(h.dtype)


class TimeTextEmbedding(nn.Module):
    """(B,) times and (B, pooled) texts → (B, D): what every block is told."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.timestep_embedder = Embedding(TIME_WIDTH, config.width)
        self.text_embedder = Embedding(config.pooled, config.width)

    def forward(self, time: Tensor, pooled: Tensor) -> Tensor:
        waves = sinusoid(time, TIME_WIDTH).to(pooled.dtype)
        return self.timestep_embedder(waves) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """(B, D), after its activation, → `count` vectors (B, 1, D): adaLN's (Peebles & Xie 2023, sec. 3.2)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, told: Tensor) -> tuple[Tensor, ...]:
        return self.linear(told).unsqueeze(1).chunk(self.count, dim=-1)


def norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of (B, N, D), without gain and bias of its own."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPS)


def modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed · (1 + scale) + shift, of tokens (B, N, D) by shift and scale (B, 1, D)."""
    return torch.addcmul(shift, normed, 1 + scale)


class JointAttention(nn.Module):
    """Attention of picture and text to both together, each with projections of its own; or, without text, of the
    picture to itself.

    joint: there is text. answers: the text's tokens get an answer; in the last block they are only looked at.
    """

    def __init__(self, config: MMDiTConfig, *, joint: bool, answers: bool = True):
        super().__init__()
        D = config.width
        self.heads, self.answers = config.heads, joint and answers
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.norm_q, self.norm_k = _head_norm(config), _head_norm(config)
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
            self.norm_added_q, self.norm_added_k = _head_norm(config), _head_norm(config)
        if self.answers:
            self.to_add_out = nn.Linear(D, D)

    def forward(
        self, x: Tensor, text: Tensor | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x: (B, N, D); text: (B, M, D); counts: (B, N + M), how many equal tokens each one stands for.

        Returns the answers to both, that to the text None where there is none.
        """
        N = x.shape[1]
        q = self._heads(self.to_q(x), self.norm_q)  # each (B, K, N, D/K)
        k = self._heads(self.to_k(x), self.norm_k)
        v = self._heads(self.to_v(x))
        if text is not None:  # each (B, K, N + M, D/K), laid out in memory as `attention` wants heads
            if self.answers:
                q = torch.cat([q, self._heads(self.add_q_proj(text), self.norm_added_q)], dim=2)
            k = torch.cat([k, self._heads(self.add_k_proj(text), self.norm_added_k)], dim=2)
            v = torch.cat([v, self._heads(self.add_v_proj(text))], dim=2)
        h = attention(q, k, v, counts).transpose(1, 2).flatten(2)
        if not self.answers:
            return self.to_out[0](h), None
        return self.to_out[0](h[:, :N]), self.to_add_out(h[:, N:])

    def _heads(self, tokens: Tensor, normed: nn.Module | None = None) -> Tensor:
        heads = tokens.unflatten(-1, (self.heads, -1))
        return (heads if normed is None else normed(heads)).transpose(1, 2)


def _head_norm(config: MMDiTConfig) -> nn.Module:
    return nn.RMSNorm(config.head_width, EPS) if config.qk_norm else nn.Identity()


class JointBlock(nn.Module):
    """Joint attention and a feed-forward layer for each stream, each behind a modulated norm and a gate.

    last: the text's stream ends here, and is modulated for the attention alone. dual: the picture attends to itself
    besides, from the same norm with a modulation of its own.
    """

    def __init__(self, config: MMDiTConfig, *, last: bool, dual: bool):
        super().__init__()
        D = config.width
        self.norm1 = Modulation(D, 9 if dual else 6)
        self.norm1_context = Modulation(D, 2 if last else 6)
        self.attn = JointAttention(config, joint=True, answers=not last)
        self.attn2 = JointAttention(config, joint=False) if dual else None
        self.ff = FeedForward(D, TanhGELU(D, 4 * D))
        self.ff_context = None if last else FeedForward(D, TanhGELU(D, 4 * D))

    def forward(
        self, x: Tensor, text: Tensor, told: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: (B, N, D); text: (B, M, D); told: (B, D), after its activation; counts: as for the attention."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(told)  # each (B, 1, D)
        if self.ff_context is None:  # here alone the scale comes first, as in `norm_out`
            scale_text, shift_text = self.norm1_context(told)
        else:
            shift_text, scale_text, gate_text, *rest = self.norm1_context(told)
        normed = norm(x)
        answer, of_text = self.attn(
            modulated(normed, shift, scale), modulated(norm(text), shift_text, scale_text), counts
        )
        x = torch.addcmul(x, gate, answer)
        if self.attn2 is not None:
            shift, scale, gate = second
            x = torch.addcmul(x, gate, self.attn2(modulated(normed, shift, scale))[0])
        x = torch.addcmul(x, gate_ff, self.ff(modulated(norm(x), shift_ff, scale_ff)))
        if self.ff_context is None:
            return x, text
        text = torch.addcmul(text, gate_text, of_text)
        shift, scale, gate = rest
        return x, torch.addcmul(text, gate, self.ff_context(modulated(norm(text), shift, scale)))


class MMDiT(nn.Module):
    """Network of a denoiser: (noisy latent, time, text) → a field shaped like the latent (flow).

    Build it under `torch.device("meta")` when the weights are about to be read: nothing is allocated or drawn. Its
    weights may be of any floating type; activations have the type of the weights, norms and softmax work in float32.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        D = config.width
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = nn.Linear(config.context, D)
        self.transformer_blocks = nn.ModuleList(
            [
                JointBlock(config, last=n == config.layers - 1, dual=n in config.dual)
                for n in range(config.layers)
            ]
        )
        self.norm_out = Modulation(D, 2)
        self.proj_out = nn.Linear(D, config.patch**2 * config.channels)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.pos_embed.pos_embed.dtype

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        skip_layers: Collection[int] = (),
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """(B, C, H, W) → (B, C, H, W) in the type of x; H and W are multiples of the patch.

        time: (B,) or a scalar, 0 … 1000, a thousand times the noise level. context: (B, M, `config.context`). vector:
        (B, `config.pooled`), the pooled text. mask: (B, M), how many equal tokens of the text each one stands for, or
        bool. skip_layers: numbers of blocks that are not run, counted from 0. control: tensors (B, N, D) of which each
        is added after as many blocks as the others, the last block aside; of `MMDiTControl`. Raises `InputError` where
        a shape is not the config's, or the picture is larger than the table of positions.
        """
        pooled = check_inputs(self.config, x, context, vector, mask)
        dtype = self.dtype
        told = functional.silu(self.time_text_embed(time.expand(len(x)), pooled.to(dtype)))  # (B, D)
        text = self.context_embedder(context.to(dtype))  # (B, M, D)
        h = self.pos_embed(x.to(dtype))  # (B, N, D)
        counts = counts_of_all(h, mask)
        layers = len(self.transformer_blocks)
        for number, block in enumerate(self.transformer_blocks):
            if number not in skip_layers:
                h, text = block(h, text, told, counts)
            if control and number < layers - 1:
                h = h + control[number * len(control) // layers].to(h.dtype)
        scale, shift = self.norm_out(told)
        out = self.proj_out(modulated(norm(h), shift, scale))  # (B, N, p²·C)
        return self._to_cells(out, x.shape[-2], x.shape[-1]).to(x.dtype)

    def _to_cells(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, N, p²·C) → (B, C, H, W). A token holds its cells row by row, and the channels of each together."""
        p, C = self.config.patch, self.config.channels
        cells = tokens.reshape(len(tokens), height // p, width // p, p, p, C)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), C, height, width)


def counts_of_all(tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """How many tokens each one stands for, of a picture's (B, N, D), one each, and behind them a text's (B, M)."""
    return None if mask is None else torch.cat([mask.new_ones(tokens.shape[:2]), mask], dim=1)


def check_inputs(
    config: MMDiTConfig, x: Tensor, context: Tensor, vector: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The vector, once all shapes are those of the config."""
    if x.ndim != 4 or x.shape[1] != config.channels:
        raise InputError(
            f"x must have shape (B, {config.channels}, H, W), not {tuple(x.shape)}", argument="x"
        )
    B = len(x)
    check_cells(config, *x.shape[-2:])
    if context.ndim != 3 or context.shape[::2] != (B, config.context):
        raise InputError(
            f"context must have shape ({B}, M, {config.context}), not {tuple(context.shape)}",
            argument="context",
        )
    if vector is None or vector.shape != (B, config.pooled):
        shape = None if vector is None else tuple(vector.shape)
        raise InputError(f"vector must have shape ({B}, {config.pooled}), not {shape}", argument="vector")
    if mask is not None and mask.shape != context.shape[:2]:
        raise InputError(
            f"mask must have shape {tuple(context.shape[:2])}, not {tuple(mask.shape)}", argument="mask"
        )
    return vector


def check_cells(config: MMDiTConfig, height: int, width: int) -> None:
    """`InputError` unless a latent of these cells can be cut into tokens that all have a place."""
    p, side = config.patch, config.positions
    if height % p or width % p or not 0 < height <= p * side or not 0 < width <= p * side:
        raise InputError(
            f"a latent of {width}×{height} cells does not fit this transformer: sides are multiples of {p} up to "
            f"{p * side}",
            argument="size",
        )
