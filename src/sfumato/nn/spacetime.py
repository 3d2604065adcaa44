"""The space-time U-Net of video diffusion: the U-Net of pictures, whose every block is followed by one over frames.

Sources: Blattmann et al. 2023b (arXiv 2311.15127), sec. 4 and app. D, Stable Video Diffusion;
sgm/modules/diffusionmodules/video_model.py. Names of parameters are those of diffusers'
`UNetSpatioTemporalConditionModel`, so that its files load without renaming. Where the two disagree, on one epsilon, see
`SpaceTimeConfig.level_eps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato import checks
from sfumato.errors import InputError
from sfumato.nn.embed import Embedding, sinusoid
from sfumato.nn.plain import from_plain
from sfumato.nn.spatial import MAP_EPS, TransformerBlock, to_map, to_tokens
from sfumato.nn.temporal import Mixer, TemporalBlock, TemporalResnet
from sfumato.nn.unet import EPS, Downsample, Resnet, Upsample, check_levels

KEPT = (  # parts of names whose layers stay in the network's type when others go to eight bits
    "conv_in",
    "conv_out",
    "time_embedding",
    "add_embedding",
    "time_emb_proj",
    "time_pos_embed",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out",
)


@dataclass(frozen=True)
class SpaceTimeConfig:
    """Shape of a space-time U-Net; the defaults are those of Stable Video Diffusion.

    Tuples have a value for each level, from the finest; each next level halves the sides.
    """

    in_channels: int = 8  # of the noisy latent, and beside it of the picture's that the clip begins with
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block; 0 is no attention
    mid_depth: int = 1  # the same for the middle, which always attends
    heads: tuple[int, ...] = (5, 10, 20, 20)  # of attention; the middle has as many as the last level
    context: int = 1024  # width of the context's tokens
    told: int = 3  # numbers that each clip is told of: frames per second, motion, noise in the picture
    waves: int = 256  # sinusoids of each
    resnets: int = 2  # residual blocks per level on the way down; one more on the way up
    out_channels: int = 4
    groups: int = 32  # of every GroupNorm
    # epsilon of residual blocks on the way up, and on the way down where the level attends: diffusers'. It is 1e-5 in
    # the middle and at the last level down, and in sgm, which trained these networks, everywhere
    level_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            *("in_channels", "out_channels", "context", "told"),
            *("waves", "resnets", "groups", "mid_depth"),
        ):
            checks.whole(name, getattr(self, name), 1)
        check_levels(self)

    @property
    def time_width(self) -> int:
        """Channels of the embedded time."""
        return 4 * self.channels[0]

    @property
    def skips(self) -> tuple[int, ...]:
        """Channels of what the way down hands to the way up, in order: conv_in, then level by level."""
        found = [self.channels[0]]
        for level, width in enumerate(self.channels):
            found += [width] * (self.resnets + (level + 1 < len(self.channels)))
        return tuple(found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SpaceTimeConfig:
        """Build from plain values, lists for tuples; an unknown field is an `InputError` that lists the known ones."""
        return from_plain(cls, values, "space-time U-Net")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SpaceTimeResnet(nn.Module):
    """A residual block of frames, then one of clips, by its share."""

    def __init__(self, config: SpaceTimeConfig, channels: int, out: int, eps: float = EPS):
        super().__init__()
        width, groups = config.time_width, config.groups
        self.spatial_res_block = Resnet(channels, out, width, groups, eps)
        self.temporal_res_block = TemporalResnet(out, width, groups, eps)
        self.time_mixer = Mixer(0.5, of_space=True)

    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        """x: (B·T, C, H, W); time: (B, time_width). Returns (B·T, out, H, W)."""
        x = self.spatial_res_block(x, time)
        return self.time_mixer(x, self.temporal_res_block(x, frames, time))


class SpaceTimeTransformer(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))): cells of a frame attend to each other, then each cell across frames."""

    def __init__(self, config: SpaceTimeConfig, level: int, depth: int):
        super().__init__()
        width, heads = config.channels[level], config.heads[level]
        self.norm = nn.GroupNorm(config.groups, width, MAP_EPS)
        self.proj_in = nn.Linear(width, width)
        blocks = [TransformerBlock(width, heads, config.context) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        over_time = [TemporalBlock(width, heads, config.context) for _ in range(depth)]
        self.temporal_transformer_blocks = nn.ModuleList(over_time)
        self.time_pos_embed = Embedding(width, width, inner=4 * width)
        self.time_mixer = Mixer(0.5, of_space=True)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, frames: int) -> Tensor:
        """x: (B·T, C, H, W); context: (B, M, context width). Returns the like of x."""
        H, W = x.shape[-2:]
        h = self.proj_in(to_tokens(self.norm(x)))  # (B·T, H·W, C)
        places = sinusoid(torch.arange(frames, device=x.device), h.shape[-1]).to(h.dtype)
        places = self.time_pos_embed(places).repeat(len(h) // frames, 1)[:, None]  # (B·T, 1, C)
        for block, over_time in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            h = block(h, context)
            change = over_time(h + places, context, frames).sub_(h)
            h = self.time_mixer(h, change)
        return to_map(self.proj_out(h), H, W).add_(x)


class Level(nn.Module):
    """One level of either way: residual blocks, each followed by a transformer, and the way to the next level."""

    def __init__(
        self,
        config: SpaceTimeConfig,
        level: int,
        inputs: Sequence[int],
        eps: float,
        *,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        width, depth = config.channels[level], config.depths[level]
        self.resnets = nn.ModuleList([SpaceTimeResnet(config, n, width, eps) for n in inputs])
        attentions = [SpaceTimeTransformer(config, level, depth) for _ in inputs] if depth else []
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def block(self, index: int, x: Tensor, time: Tensor, context: Tensor, frames: int) -> Tensor:
        """The residual block of that index and the transformer after it, if this level has any."""
        x = self.resnets[index](x, time, frames)
        return self.attentions[index](x, context, frames) if self.attentions else x


class Middle(nn.Module):
    """Residual block, transformer, residual block, at the coarsest level."""

    def __init__(self, config: SpaceTimeConfig):
        super().__init__()
        width = config.channels[-1]
        self.attentions = nn.ModuleList([SpaceTimeTransformer(config, -1, config.mid_depth)])
        self.resnets = nn.ModuleList([SpaceTimeResnet(config, width, width) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, frames: int) -> Tensor:
        x = self.resnets[0](x, time, frames)
        return self.resnets[1](self.attentions[0](x, context, frames), time, frames)


class SpaceTimeUNet(nn.Module):
    """Network of a denoiser of clips: (noisy latent, time, context, numbers) → a field shaped like the latent.

    Its weights may be of any floating type; activations have the type of the weights, and are channels-last in memory.
    On a CPU weights are used fastest packed (`nn/packed.py`).
    """

    def __init__(self, config: SpaceTimeConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.channels))
        last = levels[-1]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels[0], 3, padding=1)
        self.time_embedding = Embedding(config.channels[0], config.time_width)
        self.add_embedding = Embedding(config.told * config.waves, config.time_width)

        self.down_blocks = nn.ModuleList()
        for level in levels:
            inputs = [config.channels[max(level - 1, 0)], *[config.channels[level]] * (config.resnets - 1)]
            eps = config.level_eps if config.depths[level] else EPS
            self.down_blocks.append(Level(config, level, inputs, eps, down=level != last))
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList()
        skips = list(config.skips)
        for level in reversed(levels):
            inputs = [config.channels[min(level + 1, last)], *[config.channels[level]] * config.resnets]
            joined = [width + skips.pop() for width in inputs]
            self.up_blocks.append(Level(config, level, joined, config.level_eps, up=level != levels[0]))

        self.conv_norm_out = nn.GroupNorm(config.groups, config.channels[0], EPS)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.conv_norm_out.weight.dtype

    def forward(self, x: Tensor, time: Tensor, context: Tensor, told: Tensor) -> Tensor:
        """(B, in_channels, T, H, W) → (B, out_channels, T, H, W) in the type of x; T, H and W may be any.

        time: (B,) or a scalar. context: (B, M, `config.context`), of a whole clip. told: (B, `config.told`) numbers.
        Raises `InputError` where a shape is not the config's.

        Without gradients clips pass one after the other: one is work enough for any machine, and two take twice the
        memory.
        """
        self.check(x, time, context, told)
        time = time.expand(len(x))
        if torch.is_grad_enabled() or len(x) == 1:
            return self.clips(x, time, context, told)
        rows = zip(x.split(1), time.split(1), context.split(1), told.split(1), strict=True)
        return torch.cat([self.clips(*row) for row in rows])

    def clips(self, x: Tensor, time: Tensor, context: Tensor, told: Tensor) -> Tensor:
        """`forward` of a batch at once. time: (B,)."""
        dtype, frames = self.dtype, x.shape[2]
        embedded = self.embed(time, told)
        context = context.to(dtype)
        h = x.to(dtype).movedim(2, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        h = self.conv_in(h)  # (B·T, channels[0], H, W)
        skips = [h]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = level.block(i, h, embedded, context, frames)  # (B·T, channels[l], H/2ˡ, W/2ˡ)
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)
        h = self.mid_block(h, embedded, context, frames)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = torch.cat([h, skips.pop()], dim=1)  # (B·T, C + C of the skip, H/2ˡ, W/2ˡ)
                h = level.block(i, h, embedded, context, frames)
            for upsample in level.upsamplers:
                h = upsample(h, skips[-1].shape[-2:])
        h = self.conv_out(functional.silu(self.conv_norm_out(h), inplace=True))
        return h.unflatten(0, (-1, frames)).movedim(1, 2).to(x.dtype)

    def embed(self, time: Tensor, told: Tensor) -> Tensor:
        """(B, time_width): time and numbers together, with the activation that every residual block begins with."""
        waves = sinusoid(time, self.config.channels[0]).to(self.dtype)  # made in float32
        numbers = sinusoid(told, self.config.waves).flatten(1).to(self.dtype)
        return functional.silu(self.time_embedding(waves) + self.add_embedding(numbers))

    def check(self, x: Tensor, time: Tensor, context: Tensor, told: Tensor) -> None:
        """`InputError` where a shape is not the config's."""
        config, B = self.config, len(x)
        if x.ndim != 5 or x.shape[1] != config.in_channels or 0 in x.shape:
            raise InputError(
                f"x must have shape (B, {config.in_channels}, T, H, W), not {tuple(x.shape)}", argument="x"
            )
        if time.shape not in ((), (1,), (B,)):
            raise InputError(
                f"time must be one number or have shape ({B},), not {tuple(time.shape)}", argument="time"
            )
        if context.ndim != 3 or len(context) != B or context.shape[2] != config.context:
            raise InputError(
                f"context must have shape ({B}, M, {config.context}), not {tuple(context.shape)}",
                argument="context",
            )
        if told.shape != (B, config.told):
            raise InputError(
                f"told must have shape ({B}, {config.told}), not {tuple(told.shape)}", argument="told"
            )
