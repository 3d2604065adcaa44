"""The KL autoencoder of latent diffusion: a factor-8 convolutional network with one attention layer in its middle.

Source: Rombach et al. 2022 (arXiv 2112.10752), sec. 3.1 and app. G.1; the idea is Kingma & Welling's (arXiv 1312.6114).
Names of parameters are those of diffusers' `AutoencoderKL`, so that its files load without renaming.

`encode` and `decode` here are the plain passes, for training and as the reference. Drawing uses `banded.py`: the same
network in a fraction of the memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import checks
from sfumato.autoencoder.model import LOGVAR_RANGE, PIXEL_CHANNELS, Posterior, check_size, from_frames
from sfumato.errors import InputError
from sfumato.nn.attention import attention
from sfumato.nn.plain import as_tuple, from_plain

EPS = 1e-6  # of every GroupNorm here (ldm/modules/diffusionmodules/model.py, Normalize)


@dataclass(frozen=True)
class KLConfig:
    """Shape of the network and the scale of its latent. The defaults are the 4-channel autoencoder of 2022."""

    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels at strides 1, 2, 4, 8
    resnets: int = 2  # per level of the encoder; a level of the decoder has one more
    latent_channels: int = 4
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # makes the latent's deviation about 1
    shift_factor: float = 0.0  # subtracted before scaling
    latents_mean: tuple[float, ...] = ()  # per channel, instead of shift_factor
    latents_std: tuple[float, ...] = ()  # per channel: the scale is then scaling_factor / std
    use_quant_conv: bool = True  # a 1×1 convolution after the encoder
    use_post_quant_conv: bool = True  # a 1×1 convolution before the decoder
    mid_attention: bool = True  # attention over all cells of the latent, in encoder and decoder
    temporal: bool = (
        False  # the decoder mixes frames too (`temporal.py`), and then always attends in the middle
    )
    force_upcast: bool = True  # activations outgrow float16 (65504), so half precision runs in float32
    preview: tuple[
        tuple[float, ...], ...
    ] = ()  # colour of each channel and a last row of bias; see preview.py

    def __post_init__(self) -> None:
        for name in ("resnets", "latent_channels", "groups"):
            checks.whole(name, getattr(self, name), 1)
        if not isinstance(self.widths, tuple) or not self.widths:
            raise InputError("widths must list the channels of at least one level", argument="widths")
        for width in self.widths:
            checks.whole("widths", width, 1)
            if width % self.groups:
                raise InputError(
                    f"widths must be multiples of the {self.groups} groups, not {width}", argument="widths"
                )
        for name, positive in (("scaling_factor", True), ("shift_factor", False)):
            if not is_number(getattr(self, name), positive):
                kind = "positive" if positive else "finite"
                raise InputError(
                    f"{name} must be a {kind} number, not {getattr(self, name)!r}", argument=name
                )
        for name, positive in (("latents_mean", False), ("latents_std", True)):
            values = getattr(self, name)
            if values != () and not is_row(values, self.latent_channels, positive):
                kind = "positive" if positive else "finite"
                raise InputError(
                    f"{name} must be {self.latent_channels} {kind} numbers, one per channel", argument=name
                )
        for name in ("use_quant_conv", "use_post_quant_conv", "mid_attention", "temporal", "force_upcast"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, not {getattr(self, name)!r}", argument=name)
        rows = self.preview
        if rows != () and not (len(rows) == self.latent_channels + 1 and all(is_row(row, 3) for row in rows)):
            raise InputError(
                f"preview must be {self.latent_channels} rows and a bias of 3 numbers each",
                argument="preview",
            )

    @property
    def factor(self) -> int:
        """Pixels per side of a latent cell."""
        return 2 ** (len(self.widths) - 1)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.latent_channels

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KLConfig:
        """Build from plain values, lists for tuples; an unknown field is an `InputError` that lists the known ones."""
        return from_plain(cls, values, "autoencoder")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_diffusers(cls, values: dict[str, Any]) -> KLConfig:
        """Build from the content of a diffusers `vae/config.json`.

        What the file leaves out takes diffusers' own default. `InputError` names a field whose value asks for another
        network than this one.
        """
        for name, only in OF_THIS_KIND.items():
            given = values.get(name, only)
            if any(value != only for value in (given if isinstance(given, list | tuple) else [given])):
                raise InputError(f"{name} of the autoencoder must be {only}, not {given!r}", argument=name)
        for name in values:
            if (
                name not in DIFFUSERS
                and name not in OF_THIS_KIND
                and name[:1] != "_"
                and name != "sample_size"
            ):
                raise InputError(f"unknown autoencoder field {name!r} in config.json", argument=name)
        temporal = values.get("_class_name") == TEMPORAL
        given = {"temporal": temporal}
        for name, (ours, default) in DIFFUSERS.items():
            value = as_tuple(values.get(name))
            given[ours] = default if value is None else value
        if temporal:
            given["use_post_quant_conv"] = False
        return cls(**given)


TEMPORAL = "AutoencoderKLTemporalDecoder"  # of diffusers; it has no convolution before its decoder
OF_THIS_KIND = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}
DIFFUSERS = {  # field of config.json: ours, and diffusers' default
    "block_out_channels": ("widths", (64,)),
    "layers_per_block": ("resnets", 1),
    "latent_channels": ("latent_channels", 4),
    "norm_num_groups": ("groups", 32),
    "scaling_factor": ("scaling_factor", 0.18215),
    "shift_factor": ("shift_factor", 0.0),
    "latents_mean": ("latents_mean", ()),
    "latents_std": ("latents_std", ()),
    "use_quant_conv": ("use_quant_conv", True),
    "use_post_quant_conv": ("use_post_quant_conv", True),
    "mid_block_add_attention": ("mid_attention", True),
    "force_upcast": ("force_upcast", True),
}


def is_number(value: Any, positive: bool = False) -> bool:
    return checks.is_number(value) and (not positive or value > 0)


def is_row(values: object, length: int, positive: bool = False) -> bool:
    return isinstance(values, tuple) and len(values) == length and all(is_number(v, positive) for v in values)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), where no gradient needs it in the memory of norm(x)."""
    h = norm(x)
    return F.silu(h, inplace=not h.requires_grad)


class Resnet(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))); the shortcut is 1×1 where channels change."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))  # (B, C, H, W) -> (B, C', H, W)
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """x + attention over all cells, one head as wide as the channels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (to(h)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # (B, 1, N, C)
        h = self.to_out[0](attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class MidBlock(nn.Module):
    """Two resnets at the latent's resolution, with attention between them."""

    def __init__(self, channels: int, groups: int, mid_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)] if mid_attention else [])

    def layers(self) -> list[nn.Module]:
        return [self.resnets[0], *self.attentions, self.resnets[1]]


class Downsample(nn.Module):
    """Halve height and width: a 3×3 convolution of stride 2, padded on the right and at the bottom alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H, W) -> (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width: a 3×3 convolution of nearest neighbours, done at the lower resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(B, C, 2 * H, 2 * W, dtype=x.dtype, device=x.device, memory_format=order)
        for i in (0, 1):
            kernels, bias = phase_kernels(self.conv.weight, i, x.dtype), self.conv.bias.repeat(2)
            interleave(F.conv2d(x, kernels, bias, padding=1)[:, :, i : i + H], out[:, :, i::2])
        return out


def phase_kernels(weight: Tensor, row: int, dtype: torch.dtype) -> Tensor:
    """(O, I, 3, 3) → (2·O, I, 2, 2) in `dtype`: the kernels that make the upper (row 0) or lower (row 1) two pixels of
    a doubled cell.

    Among nearest neighbours a 3×3 window sees 2×2 different cells, so taps that fall on one cell are added, in float32,
    and 4/9 of the products remain. The upper pixel takes [w0, w1 + w2] of the row of cells above and its own, the lower
    one [w0 + w1, w2] of its own and the row below; columns likewise.
    """
    O, I = weight.shape[:2]
    kernels = weight.new_empty((2, O, I, 2, 2), dtype=dtype)
    for y, taps in enumerate(cells_of(weight.to(torch.promote_types(weight.dtype, torch.float32)), 2, row)):
        for column in (0, 1):
            for x, tap in enumerate(cells_of(taps, 2, column)):  # (O, I, 3) -> (O, I)
                kernels[column, :, :, y, x] = tap
    return kernels.flatten(0, 1)


def cells_of(taps: Tensor, dim: int, pixel: int) -> tuple[Tensor, Tensor]:
    """Three taps along `dim` on doubled pixels → two on the cells that the first (0) or second (1) pixel sees."""
    first, middle, last = taps.unbind(dim)
    return (first, middle + last) if pixel == 0 else (first + middle, last)


def interleave(phases: Tensor, out: Tensor) -> None:
    """Write (B, 2·C, H, W + 1), the left and right pixels of cells, to every second row (B, C, H, 2W) of a picture."""
    C, W = out.shape[1], out.shape[3] // 2
    for j in (0, 1):
        out[:, :, :, j::2] = phases[:, j * C : (j + 1) * C, :, j : j + W]


class DownBlock(nn.Module):
    """The layers of one level of the encoder."""

    def __init__(self, channels: int, out: int, resnets: int, groups: int, shrink: bool):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(out if i else channels, out, groups) for i in range(resnets)])
        self.downsamplers = nn.ModuleList([Downsample(out)] if shrink else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers]


class UpBlock(nn.Module):
    """The layers of one level of the decoder."""

    def __init__(self, channels: int, out: int, resnets: int, groups: int, grow: bool):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(out if i else channels, out, groups) for i in range(resnets)])
        self.upsamplers = nn.ModuleList([Upsample(out)] if grow else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class Encoder(nn.Module):
    """(B, 3, H, W) pixels in [-1, 1] → (B, 2C, H/f, W/f): mean and logvar, before the quant convolution."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = nn.Conv2d(PIXEL_CHANNELS, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(widths[max(0, i - 1)], width, config.resnets, groups, shrink=i + 1 < len(widths))
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, D, H, W)
        for block in (*self.down_blocks, self.mid_block):
            for layer in block.layers():  # called from here, so that no frame holds on to a level's input
                x = layer(x)  # (B, D', H/f, W/f) in the end
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """(B, C, H/f, W/f), after the post-quant convolution → (B, 3, H, W) pixels, about [-1, 1] and not clamped."""

    def __init__(self, config: KLConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_attention)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(widths[max(0, i - 1)], width, config.resnets + 1, groups, grow=i + 1 < len(widths))
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], PIXEL_CHANNELS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # (B, D, H/f, W/f)
        for block in (self.mid_block, *self.up_blocks):
            for layer in block.layers():  # called from here, so that no frame holds on to a level's input
                x = layer(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """Pixels (B, 3, T, H, W) in [-1, 1] ↔ latents (B, C, T, H/f, W/f). Frames are pictures of a batch.

    A denoiser sees normalised latents, (z − shift) · scale; the numbers are the config's. Passes run in the type of the
    weights, or under autocast, and give float32. Weights put in channels-last memory make activations follow.
    """

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        C = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.use_post_quant_conv else None

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, pixels: Tensor) -> Posterior:
        """Posterior over latents (B, C, T, H/f, W/f), in float32. `InputError` on a wrong shape or size."""
        self.check_pixels(pixels)
        moments = self.encoder(to_frames(pixels).to(self.dtype))  # (B·T, 2C, H/f, W/f)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return posterior_of(from_frames(moments.float(), len(pixels)))

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) float32 of an unnormalised latent (B, C, T, H/f, W/f); not clamped."""
        self.check_latent(latent)
        z = to_frames(latent).to(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return from_frames(self.decoder(z).float(), len(latent))

    def normalize(self, latent: Tensor) -> Tensor:
        """(latent − shift) · scale per channel, what a denoiser works on; (B, C, T, H, W)."""
        shift, scale = self._statistics(latent)
        return (latent - shift) * scale

    def denormalize(self, latent: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        shift, scale = self._statistics(latent)
        return latent / scale + shift

    def encode_normalized(self, pixels: Tensor) -> Tensor:
        """The posterior mean, normalised: what a denoiser trains on."""
        return self.normalize(self.encode(pixels).mode())

    def decode_normalized(self, latent: Tensor) -> Tensor:
        """Pixels of a normalised latent: what a sampler returns."""
        return self.decode(self.denormalize(latent))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H/f, W/f) for pixels of T frames, H × W. `InputError` names the nearest legal size."""
        check_size(self.factor, height, width)
        return self.config.channels, frames, height // self.factor, width // self.factor

    def check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[1] != PIXEL_CHANNELS:
            raise InputError(
                f"pixels must have shape (B, 3, T, H, W), not {tuple(pixels.shape)}", argument="pixels"
            )
        check_size(self.factor, *pixels.shape[-2:])

    def check_latent(self, latent: Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.config.channels or 0 in latent.shape[-2:]:
            raise InputError(
                f"a latent must have shape (B, {self.config.channels}, T, H, W), not {tuple(latent.shape)}",
                argument="latent",
            )

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, each (C, 1, 1, 1) in float32 or wider."""
        config = self.config
        dtype = torch.promote_types(like.dtype, torch.float32)
        mean = config.latents_mean or (config.shift_factor,) * config.channels
        std = config.latents_std or (1.0,) * config.channels
        scale = [config.scaling_factor / value for value in std]
        shape = (-1, 1, 1, 1)
        return (
            torch.tensor(mean, dtype=dtype, device=like.device).view(shape),
            torch.tensor(scale, dtype=dtype, device=like.device).view(shape),
        )


def posterior_of(moments: Tensor) -> Posterior:
    """Mean and logvar from (B, 2C, T, H, W), the logvar clamped as in LDM."""
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))


def to_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) → (B·T, C, H, W), in the memory order of x."""
    return x.movedim(2, 1).flatten(0, 1)
