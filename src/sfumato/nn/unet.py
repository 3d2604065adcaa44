"""The conditional U-Net of latent diffusion: residual blocks told the time, spatial transformers that read the text.

Sources: Rombach et al. 2022 (arXiv 2112.10752), sec. 3.3; Podell et al. 2023 (arXiv 2307.01952), sec. 2.1 and 2.2, for
the pooled vector and the uneven depths; Luo et al. 2023 (arXiv 2310.04378), sec. 4.3, for the guidance embedding. Names
of parameters are those of diffusers' `UNet2DConditionModel`, so that its files load without renaming; the original
files (ldm/modules/diffusionmodules/openaimodel.py) hold the same tensors under other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato import checks
from sfumato.errors import InputError
from sfumato.nn.embed import Embedding, sinusoid
from sfumato.nn.plain import from_plain
from sfumato.nn.spatial import SpatialTransformer, same_halves

EPS = 1e-5  # of the GroupNorms here; that before a spatial transformer has its own
SHALLOW = (
    2  # skips that a call with deep features makes anew: conv_in's and the first block's, as in DeepCache
)
KEPT = (  # parts of names whose layers stay as they are in eight bits: what enters and leaves, times, texts
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
    "time_emb_proj",
    "attn2.to_k",
    "attn2.to_v",
)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net. Tuples have a value for each level, from the finest; each next level halves the sides."""

    in_channels: int = 4  # of the noisy latent; 9 with a mask and the masked picture's latent
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block; 0 is no attention
    mid_depth: int = 1  # the same for the middle, which always attends
    heads: tuple[int, ...] = (8, 8, 8, 8)  # of attention; the middle has as many as the last level
    context: int = 768  # width of the text's tokens
    linear: bool = False  # the projections around a transformer are linear layers, else 1×1 convolutions
    vector: int = 0  # width of pooled text and embedded sizes (micro-conditioning); 0 is none
    resnets: int = 2  # residual blocks per level on the way down; one more on the way up
    out_channels: int = 4
    time_cond: int = (
        0  # width of an embedded guidance scale added to the time (guidance distillation); 0 is none
    )
    groups: int = 32  # of every GroupNorm

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "context", "resnets", "groups", "mid_depth"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("vector", "time_cond"):
            checks.whole(name, getattr(self, name), 0)
        if not isinstance(self.linear, bool):
            raise InputError(f"linear must be true or false, not {self.linear!r}", argument="linear")
        check_levels(self)

    @property
    def time_width(self) -> int:
        """Channels of the embedded time."""
        return 4 * self.channels[0]

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """(channels, level) of what the way down hands to the way up, in order: conv_in, then level by level."""
        found = [(self.channels[0], 0)]
        for level, width in enumerate(self.channels):
            found += [(width, level)] * self.resnets
            if level + 1 < len(self.channels):
                found.append((width, level + 1))
        return tuple(found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """Build from plain values, lists for tuples; an unknown field is an `InputError` that lists the known ones."""
        return from_plain(cls, values, "U-Net")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_levels(config: Any) -> None:
    """`InputError` unless `channels`, `depths`, `heads` and `groups` of a U-Net's configuration go together."""
    if not config.channels:
        raise InputError("channels must name those of at least one level", argument="channels")
    for name, least in (("channels", 1), ("depths", 0), ("heads", 1)):
        values = getattr(config, name)
        if len(values) != len(config.channels):
            raise InputError(
                f"{name} must have a value for each of the {len(config.channels)} levels, not {len(values)}",
                argument=name,
            )
        for value in values:
            checks.whole(name, value, least)
    attends = [*config.depths[:-1], config.mid_depth]
    for width, heads, depth in zip(config.channels, config.heads, attends, strict=True):
        if width % config.groups:
            raise InputError(
                f"channels must be multiples of the {config.groups} groups, not {width}", argument="channels"
            )
        if depth and width % heads:
            raise InputError(
                f"heads must divide the channels of their level, not {heads} of {width}", argument="heads"
            )


class Resnet(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time))); the shortcut is 1×1 where channels change."""

    def __init__(self, channels: int, out: int, time_width: int, groups: int, eps: float = EPS):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out)
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B·T, C, H, W), T rows for each of time (B, time_width), activated. Returns (B·T, out, H, W)."""
        h = self.conv1(functional.silu(self.norm1(x), inplace=True))  # (B, out, H, W)
        told = self.time_emb_proj(time)[:, :, None, None]
        h += told if len(h) == len(told) else told.repeat_interleave(len(h) // len(told), 0)
        h = self.conv2(functional.silu(self.norm2(h), inplace=True))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class Downsample(nn.Module):
    """(B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉) by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, H, W) → (B, C, *size): nearest neighbour and a convolution. `size` is 2H or 2H − 1, as the skip is."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(functional.interpolate(x, size=size, mode="nearest"))


class Level(nn.Module):
    """One level of either way: residual blocks, each followed by a transformer, and the way to the next level."""

    def __init__(
        self, config: UNetConfig, level: int, inputs: Sequence[int], *, down: bool = False, up: bool = False
    ):
        super().__init__()
        width = config.channels[level]
        self.resnets = nn.ModuleList([Resnet(n, width, config.time_width, config.groups) for n in inputs])
        depth = config.depths[level]
        attentions = [_transformer(config, level, depth) for _ in inputs] if depth else []
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def block(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """The residual block of that index and the transformer after it, if this level has any."""
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if self.attentions else x


class Middle(nn.Module):
    """Residual block, transformer, residual block, at the coarsest level."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.channels[-1]
        self.attentions = nn.ModuleList([_transformer(config, -1, config.mid_depth)])
        self.resnets = nn.ModuleList(
            [Resnet(width, width, config.time_width, config.groups) for _ in range(2)]
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        return self.resnets[1](self.attentions[0](x, context), time)


class WayDown(nn.Module):
    """The half of a U-Net that a ControlNet has a copy of: entrance, embedded time, levels of the way down, middle."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.channels))
        self.conv_in = nn.Conv2d(config.in_channels, config.channels[0], 3, padding=1)
        self.time_embedding = Embedding(config.channels[0], config.time_width, config.time_cond)
        if config.vector:
            self.add_embedding = Embedding(config.vector, config.time_width)
        self.down_blocks = nn.ModuleList()
        for level in levels:
            inputs = [config.channels[max(level - 1, 0)], *[config.channels[level]] * (config.resnets - 1)]
            self.down_blocks.append(Level(config, level, inputs, down=level != levels[-1]))
        self.mid_block = Middle(config)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.down_blocks[0].resnets[0].norm1.weight.dtype

    def way_down(self, h: Tensor, embedded: Tensor, context: Tensor) -> Iterator[Tensor]:
        """The skips in the order of `config.skips`, each computed when it is asked for; h: what `conv_in` gave.

        Both halves of guidance are one as far as the first attention to the text.
        """
        yield h  # (B, channels[0], H, W)
        told = embedded
        if self.down_blocks[0].attentions and same_halves(h, embedded):
            h, told = h[: len(h) // 2], embedded[: len(h) // 2]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h, told = level.block(i, h, told, context), embedded  # (B, channels[l], H/2ˡ, W/2ˡ)
                yield h
            for downsample in level.downsamplers:
                h = downsample(h)
                yield h

    def embed_time(self, time: Tensor, vector: Tensor | None, time_cond: Tensor | None) -> Tensor:
        """(B, time_width): time and vector together, with the activation that every residual block begins with."""
        dtype = self.dtype
        waves = sinusoid(time, self.config.channels[0]).to(dtype)  # made in float32
        embedded = self.time_embedding(waves, None if time_cond is None else time_cond.to(dtype))
        if vector is not None:
            embedded = embedded + self.add_embedding(vector.to(dtype))
        return functional.silu(embedded)

    def check(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None,
        time_cond: Tensor | None,
    ) -> None:
        """`InputError` where a shape is not the config's."""
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise InputError(
                f"x must have shape (B, {config.in_channels}, H, W), not {tuple(x.shape)}", argument="x"
            )
        B = len(x)
        if time.shape not in ((), (1,), (B,)):
            raise InputError(
                f"time must be one number or have shape ({B},), not {tuple(time.shape)}", argument="time"
            )
        if context.ndim != 3 or len(context) != B or context.shape[2] != config.context:
            raise InputError(
                f"context must have shape ({B}, N, {config.context}), not {tuple(context.shape)}",
                argument="context",
            )
        for name, value, width in (
            ("vector", vector, config.vector),
            ("time_cond", time_cond, config.time_cond),
        ):
            if value is not None and not width:
                raise InputError(f"this network takes no {name}; leave it out", argument=name)
            if value is not None and value.shape != (B, width):
                raise InputError(
                    f"{name} must have shape ({B}, {width}), not {tuple(value.shape)}", argument=name
                )
        if config.vector and vector is None:
            raise InputError(
                f"this network needs a vector of shape ({B}, {config.vector}): pooled text and sizes",
                argument="vector",
            )


class UNet(WayDown):
    """Network of a denoiser: (noisy latent, time, text) → a field shaped like the latent (noise or v).

    Build it under `torch.device("meta")` when the weights are about to be read: nothing is allocated or drawn. Its
    weights may be of any floating type; activations have the type of the weights, norms and softmax work in float32.
    Activations are channels-last in memory, and weights are used fastest if they are too (`.to(memory_format=…)`), or
    on a CPU packed (`nn/packed.py`).
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        levels = range(len(config.channels))
        first, last = levels[0], levels[-1]
        skips = [width for width, _ in config.skips]
        self.up_blocks = nn.ModuleList()
        for level in reversed(levels):
            inputs = [config.channels[min(level + 1, last)], *[config.channels[level]] * config.resnets]
            joined = [width + skips.pop() for width in inputs]
            self.up_blocks.append(Level(config, level, joined, up=level != first))

        self.conv_norm_out = nn.GroupNorm(config.groups, config.channels[0], EPS)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        *,
        time_cond: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, H, W) in the type of x; H and W may be any.

        time: (B,) or a scalar, the training step 0 … 999, fractions allowed. context: (B, N, `config.context`).
        vector: (B, `config.vector`), if the config has one. time_cond: (B, `config.time_cond`) or None.
        down_residuals, mid_residual: what a ControlNet adds to the skips, in the order of `config.skips`, and to the
        middle. Raises `InputError` where a shape is not the config's.
        """
        return self.forward_with_deep(
            x,
            time,
            context,
            vector,
            time_cond=time_cond,
            down_residuals=down_residuals,
            mid_residual=mid_residual,
        )[0]

    def forward_with_deep(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor,
        vector: Tensor | None = None,
        *,
        time_cond: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        deep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the features (B, C, H/2ˡ, W/2ˡ) that enter the last `SHALLOW` blocks of the way up.

        deep: such features of another call, to take instead of this call's. Then what lies below is not computed, and
        of the skips only the first `SHALLOW` are: DeepCache (Ma et al. 2023, 2312.00858, sec. 3.2).
        """
        self.check(x, time, context, vector, time_cond)
        if down_residuals is not None and len(down_residuals) != len(self.config.skips):
            raise InputError(
                f"down_residuals must be {len(self.config.skips)} tensors, one per skip, not {len(down_residuals)}",
                argument="down_residuals",
            )
        dtype = self.dtype
        embedded = self.embed_time(time.expand(len(x)), vector, time_cond)
        context = context.to(dtype)
        h = x.to(dtype).contiguous(memory_format=torch.channels_last)
        needed = len(self.config.skips) if deep is None else SHALLOW
        skips = list(islice(self.way_down(self.conv_in(h), embedded, context), needed))
        h = skips[-1]
        if deep is None:
            h = self.mid_block(h, embedded, context)
            if mid_residual is not None:
                h = h + mid_residual.to(dtype)
        if down_residuals is not None:
            skips = [
                skip + added.to(dtype) for skip, added in zip(skips, down_residuals, strict=deep is None)
            ]

        blocks = [(level, i) for level in self.up_blocks for i in range(len(level.resnets))]
        if deep is None:
            for level, i in blocks[:-SHALLOW]:
                h = self._up(level, i, h, skips, embedded, context)
            deep = h
        h = deep
        for level, i in blocks[-SHALLOW:]:
            h = self._up(level, i, h, skips, embedded, context)
        h = functional.silu(self.conv_norm_out(h), inplace=True)
        return self.conv_out(h).to(x.dtype), deep

    def _up(
        self, level: Level, index: int, h: Tensor, skips: list[Tensor], embedded: Tensor, context: Tensor
    ) -> Tensor:
        """One block of the way up, which takes the last skip, and after the last of a level the way to the next."""
        h = torch.cat([h, skips.pop()], dim=1)  # (B, C + C of the skip, H/2ˡ, W/2ˡ)
        h = level.block(index, h, embedded, context)
        if index + 1 == len(level.resnets):
            for upsample in level.upsamplers:
                h = upsample(h, skips[-1].shape[-2:])
        return h


def _transformer(config: UNetConfig, level: int, depth: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.channels[level],
        config.heads[level],
        depth,
        config.context,
        config.groups,
        linear=config.linear,
    )
