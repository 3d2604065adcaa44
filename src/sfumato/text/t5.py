"""T5's text encoder: token ids to features (Raffel et al. 2020, 1910.10683; the gated form of T5 v1.1, Shazeer 2020,
2002.05202). Stable Diffusion 3 reads that of T5 v1.1 XXL, 4.76 billion numbers.

Unlike CLIP: no mask of what comes later, positions only as a bias of attention by distance, no scale of the scores,
norms without a mean, and layers without a bias. Names of parameters are the published ones.

What the blocks add to is kept in float32 whatever type the weights have: the sum grows to where bfloat16 has steps of
hundreds and float16 ends, which is why T5 is not run in float16 at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato import checks
from sfumato.errors import CheckpointError, InputError, SfumatoError

_NAMES = {  # ours to those of a folder's config.json
    "width": "d_model",
    "inner": "d_ff",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_width": "d_kv",
    "vocabulary": "vocab_size",
    "buckets": "relative_attention_num_buckets",
    "distance": "relative_attention_max_distance",
}


@dataclass(frozen=True)
class T5Config:
    """Shape of an encoder. Epsilon of the norms is 1e-6."""

    width: int = 4096  # channels of a token
    inner: int = 10_240  # inside a feed-forward layer
    layers: int = 24  # blocks
    heads: int = 64
    head_width: int = 64  # channels of a head
    vocabulary: int = 32_128  # rows of the table; the tokenizer has 28 fewer ids
    buckets: int = 32  # of distances between tokens, half of them for each direction
    distance: int = 128  # tokens, from which on all distances are alike

    def __post_init__(self) -> None:
        for name in _NAMES:
            checks.whole(name, getattr(self, name), 1)
        if self.buckets < 4 or self.buckets % 2 or self.distance <= self.buckets // 4:
            raise InputError(
                f"{self.buckets} buckets do not serve distances up to {self.distance}; T5 has 32 for 128",
                argument="buckets",
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> T5Config:
        """From a model folder's `config.json`. `CheckpointError` when it is not that of a gated T5 encoder."""
        missing = [theirs for ours, theirs in _NAMES.items() if ours != "distance" and theirs not in values]
        if missing or values.get("model_type", "t5") != "t5":
            reason = f"it lacks {', '.join(missing)}" if missing else f"it is of {values['model_type']!r}"
            raise CheckpointError(f"the text encoder's config is not T5's: {reason}")
        activation = values.get("feed_forward_proj", "relu")
        if activation != "gated-gelu":
            raise CheckpointError(
                f"the T5 encoder's config has feed-forward layers of {activation!r}; gated-gelu is known, T5 v1.1's"
            )
        try:
            return cls(**{ours: values[theirs] for ours, theirs in _NAMES.items() if theirs in values})
        except InputError as error:
            raise CheckpointError(f"the T5 encoder's config is wrong: {error}") from None


T5_XXL = T5Config()


class T5Norm(nn.Module):
    """x / rms(x) · weight, the first factor in float32 and the rest in the weight's type."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(self.weight.dtype)


class T5Attention(nn.Module):
    """The first block's alone has the table of biases, which all blocks share."""

    def __init__(self, config: T5Config, biased: bool):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads, self.buckets, self.distance = config.heads, config.buckets, config.distance
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def bias(self, count: int, device: torch.device) -> Tensor:
        """(1, K, N, N): what is added to the score of token i for token j."""
        places = torch.arange(count, device=device)
        buckets = distance_buckets(places[None] - places[:, None], self.buckets, self.distance)  # (N, N)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (  # each (B, K, N, D/K)
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        h = functional.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)
        return self.o(h.transpose(1, 2).flatten(2))  # (B, N, D)


class T5FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.inner, bias=False)
        self.wi_1 = nn.Linear(config.width, config.inner, bias=False)
        self.wo = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5SelfAttentionLayer(nn.Module):
    def __init__(self, config: T5Config, biased: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, biased)
        self.layer_norm = T5Norm(config.width)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        return h + self.SelfAttention(self.layer_norm(h), bias)


class T5FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5FeedForward(config)
        self.layer_norm = T5Norm(config.width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.DenseReluDense(self.layer_norm(h))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, biased: bool):
        super().__init__()
        self.layer = nn.ModuleList([T5SelfAttentionLayer(config, biased), T5FeedForwardLayer(config)])

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](h, bias))


class T5Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList([T5Block(config, biased=not number) for number in range(config.layers)])
        self.final_layer_norm = T5Norm(config.width)

    def bias(self, count: int, device: torch.device) -> Tensor:
        """(1, K, N, N): what is added to the scores in every block."""
        first: Any = self.block[0]
        return first.layer[0].SelfAttention.bias(count, device)


class T5Encoder(nn.Module):
    """ids (B, N) → features (B, N, D) in the type of the weights."""

    def __init__(self, config: T5Config = T5_XXL):
        super().__init__()
        self.config = config
        self.device = torch.device(
            "cpu"
        )  # where ids are wanted; layers may be read from a file when they are called
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = T5Stack(config)

    def forward(self, ids: Tensor, visible: Tensor | None = None) -> Tensor:
        """ids: (B, N) int64. visible: (B, N) bool, False where no token may look; None looks at all, padding too, as
        Stable Diffusion 3 was trained.

        `SfumatoError` that names the block after which numbers are no longer finite.
        """
        stack = self.encoder
        bias = stack.bias(ids.shape[1], ids.device)  # (1, K, N, N)
        if visible is not None:
            bias = bias.masked_fill(~visible[:, None, None, :], -math.inf)  # (B, K, N, N)
        h = self.shared(ids).float()  # (B, N, D)
        for number, block in enumerate(stack.block):
            h = block(h, bias)
            if not h.is_meta and not math.isfinite(h.sum()):
                raise SfumatoError(
                    f"the T5 text encoder makes NaN or infinity in its block {number}; its file is damaged, or its "
                    "numbers are too large for its type: try float32"
                )
        return stack.final_layer_norm(h)


def distance_buckets(offset: Tensor, buckets: int, distance: int) -> Tensor:
    """Offsets j − i → rows of the table of biases: half of them for j > i; in each half single distances first, then
    logarithmically wider ones up to `distance` (Raffel et al. 2020, sec. 2.1; Mesh TensorFlow's transformer_layers.py).
    """
    half = buckets // 2
    exact = half // 2  # distances with a row of their own
    far = offset.abs()
    share = (far.clamp(min=1).float() / exact).log() / math.log(distance / exact)
    wide = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, wide) + half * (offset > 0)
