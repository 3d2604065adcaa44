"""The KL autoencoder in little memory: exact, layer after layer over bands of rows, in one block of memory.

Cutting a picture into tiles changes it: every GroupNorm takes its statistics from the whole picture, and the middle
attends to all of it. So nothing is cut here but the work of one layer. Between two layers the activation stands whole
in memory, and its statistics are known, gathered while it was written. A layer reads a window of rows (with a row above
and below, which a 3×3 convolution sees), normalises, convolves, and writes the rows of its result in place:

    one level's memory, K channels wide      | x: residual stream | h: between a resnet's convolutions |
    a resnet                                 h ← conv1(silu(norm(x)));  x ← x + conv2(silu(norm(h)))
    a resnet that changes channels           (h, shortcut(x)) take x's place row by row
    to the next level                        x is packed at the tail of the memory and streams into its head

No product is computed twice, so it takes no longer than the plain pass. The block is as large as the finest level,
K·H·W numbers with K = 256 for the published networks: 1 GiB for 1024² in float32, half that in bfloat16. The rest is a
few bands. A batch goes through picture by picture and takes no more.

Storing less means computing more: with only x kept, each resnet would run conv1 twice, which is a third more work for a
quarter less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from sfumato.autoencoder.kl import (
    Attention,
    AutoencoderKL,
    DownBlock,
    Downsample,
    MidBlock,
    Resnet,
    UpBlock,
    Upsample,
    interleave,
    phase_kernels,
    posterior_of,
)
from sfumato.autoencoder.memory import (
    BAND,
    decoder_numbers,
    encoder_numbers,
    level_width,
    rows_of,
)
from sfumato.autoencoder.model import PIXEL_CHANNELS, Posterior
from sfumato.autoencoder.statistics import Moments, normalise, not_finite, settled
from sfumato.errors import InputError, NonFiniteError
from sfumato.nn.attention import attention
from sfumato.nn.packed import CELLS, PackedConv2d, is_laid_out
from sfumato.runtime import give_back


def decode_banded(
    model: AutoencoderKL, latent: Tensor, *, band: int = BAND, dtype: torch.dtype | None = None
) -> Tensor:
    """`model.decode(latent)` within rounding: pixels (B, 3, T, H, W) float32 of an unnormalised (B, C, T, H/f, W/f).

    band: bytes of a window of rows; smaller ones save megabytes, and cost time below about 2 MiB. dtype: what to
    compute in, by default the weights' type; autocast is ignored. There are no gradients.
    Raises `InputError` on a wrong shape or a latent that is not finite, `NonFiniteError` when a layer overflows.
    """
    model.check_latent(latent)
    check_finite(latent, "latent")
    B, _, T, H, W = latent.shape
    pixels = torch.empty(B, PIXEL_CHANNELS, T, H * model.factor, W * model.factor, device=latent.device)
    run = Pass(model, latent.device, dtype, band, decoder_numbers(model.config, H, W))
    with torch.no_grad(), torch.autocast(latent.device.type, enabled=False):
        for b in range(B):
            for t in range(T):
                run.decode(latent[b : b + 1, :, t], pixels[b : b + 1, :, t])
    return pixels


def encode_banded(
    model: AutoencoderKL, pixels: Tensor, *, band: int = BAND, dtype: torch.dtype | None = None
) -> Posterior:
    """`model.encode(pixels)` within rounding: the posterior of pixels (B, 3, T, H, W). Arguments as `decode_banded`."""
    if has_torch_function((pixels,)):  # a mode that counts operations sees this one whole
        return handle_torch_function(encode_banded, (pixels,), model, pixels, band=band, dtype=dtype)
    model.check_pixels(pixels)
    check_finite(pixels, "pixels")
    B, _, T, H, W = pixels.shape
    _, _, h, w = model.latent_shape(T, H, W)
    moments = torch.empty(B, 2 * model.config.channels, T, h, w, device=pixels.device)
    run = Pass(model, pixels.device, dtype, band, encoder_numbers(model.config, H, W))
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        for b in range(B):
            for t in range(T):
                run.encode(pixels[b : b + 1, :, t], moments[b : b + 1, :, t])
    return posterior_of(moments)


def check_finite(x: Tensor, name: str) -> None:
    """`InputError` if a pass is given NaN or infinity. name: what the error calls x."""
    if (
        not torch.isfinite(x.sum()) and not torch.isfinite(x).all()
    ):  # a sum is less to hold than an answer for each
        raise InputError(f"{name} must be finite, but holds NaN or infinity", argument=name)


# --- one picture -------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """The activation between two layers: channels [at, at + channels) of a level's memory, and their statistics."""

    level: Tensor  # (1, K, H, W), channels last, at the head of the block
    at: int
    channels: int
    moments: Moments

    @property
    def x(self) -> Tensor:
        return self.level[:, self.at : self.at + self.channels]


class Pass:
    """Takes pictures of one size through encoder or decoder, one at a time, in the same memory."""

    def __init__(
        self, model: AutoencoderKL, device: torch.device, dtype: torch.dtype | None, band: int, numbers: int
    ):
        self.model, self.device, self.band = model, device, band
        self.dtype, self.wide, self.names = settled(model, band, dtype)
        self.block = torch.empty(numbers, dtype=self.dtype, device=device)
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)  # one window, then its statistics

    def decode(self, latent: Tensor, out: Tensor) -> None:
        """latent: (1, C, H/f, W/f); out: (1, 3, H, W), written."""
        decoder, first, z = self.model.decoder, self.model.post_quant_conv, latent.to(self.dtype)
        if first is not None:
            z = self.pointwise(first, z)
        stage = self.enter(decoder.conv_in, z, level_width(*ends(decoder.up_blocks[0])), first)
        self.mid(stage, decoder.mid_block)
        for i, block in enumerate(decoder.up_blocks):
            for resnet in block.resnets:
                self.resnet(stage, resnet)
            for upsampler in block.upsamplers:
                stage = self.double(stage, upsampler, level_width(*ends(decoder.up_blocks[i + 1])))
        self.leave(stage, decoder.conv_norm_out, decoder.conv_out, out)

    def encode(self, pixels: Tensor, out: Tensor) -> None:
        """pixels: (1, 3, H, W); out: (1, 2C, H/f, W/f), written."""
        encoder = self.model.encoder
        stage = self.enter(encoder.conv_in, pixels, level_width(*ends(encoder.down_blocks[0])))
        for i, block in enumerate(encoder.down_blocks):
            for resnet in block.resnets:
                self.resnet(stage, resnet)
            for downsampler in block.downsamplers:
                stage = self.halve(stage, downsampler, level_width(*ends(encoder.down_blocks[i + 1])))
        self.mid(stage, encoder.mid_block)
        self.leave(stage, encoder.conv_norm_out, encoder.conv_out, out)
        if self.model.quant_conv is not None:
            out.copy_(self.pointwise(self.model.quant_conv, out.to(self.dtype)))
            if (~torch.isfinite(out)).any():
                raise self.failure(self.model.quant_conv)

    # --- layers ---

    def enter(self, conv: nn.Conv2d, source: Tensor, width: int, before: nn.Conv2d | None = None) -> Stage:
        """The first convolution: (1, C, H, W) → the residual stream of a level `width` channels wide.

        before: the layer that made the source, if any.
        """
        H, W = source.shape[2:]
        stage = self.stage(width, conv.out_channels, H, W)
        convolve = self.convolution(conv, W)
        for y0, _, window in self.windows(source, conv.out_channels):
            self.put(stage.x, y0, convolve(window), stage.moments)
        self.check(stage.moments, before, conv)
        return stage

    def leave(self, stage: Stage, norm: nn.GroupNorm, conv: nn.Conv2d, out: Tensor) -> None:
        """The last norm and convolution: the residual stream → out (1, C, H, W)."""
        convolve = self.convolution(conv, out.shape[3])
        wrong = torch.zeros((), dtype=torch.bool, device=self.device)
        for y0, y1, window in self.windows(stage.x, conv.out_channels):
            self.activate(window, norm, stage.moments, y0 == 0, y1 == out.shape[2])
            rows = convolve(window)
            out[:, :, y0:y1] = rows
            wrong |= (~torch.isfinite(rows)).any()
        if wrong:
            raise self.failure(norm, conv)

    def mid(self, stage: Stage, block: MidBlock) -> None:
        self.resnet(stage, block.resnets[0])
        for layer in block.attentions:
            self.attend(stage, layer)
            give_back()  # what attention held is of other sizes than what follows
        self.resnet(stage, block.resnets[1])

    def resnet(self, stage: Stage, layer: Resnet) -> None:
        """In place. A resnet that changes channels writes h and its shortcut over the rows of x that have been read."""
        C, (H, W) = layer.conv1.out_channels, stage.level.shape[2:]
        source = stage.x
        if layer.conv_shortcut is None:
            h = stage.level[:, :C] if stage.at >= C else stage.level[:, C : 2 * C]
        else:
            h = stage.level[:, :C]
            stage.at, stage.channels = C, C
        x = stage.x
        moments = Moments(C, self.device)
        convolve = self.convolution(layer.conv1, W)
        for y0, y1, window in self.windows(source, C):
            if layer.conv_shortcut is not None:
                self.put(x, y0, self.pointwise(layer.conv_shortcut, window[:, :, 1:-1]))
            self.activate(window, layer.norm1, stage.moments, y0 == 0, y1 == H)
            self.put(h, y0, convolve(window), moments)
        self.check(moments, layer.norm1, layer.conv1)
        stage.moments = Moments(C, self.device)
        convolve = self.convolution(layer.conv2, W)
        for y0, y1, window in self.windows(h, C):
            self.activate(window, layer.norm2, moments, y0 == 0, y1 == H)
            change = convolve(window)
            self.put(x, y0, change.add_(x[:, :, y0:y1]), stage.moments)
            del change  # or the next one would stand beside it
        self.check(stage.moments, layer.norm2, layer.conv_shortcut, layer.conv2)

    def attend(self, stage: Stage, layer: Attention) -> None:
        """In place, at the latent's resolution: queries, keys, values and results stand behind the level's memory."""
        C, (H, W) = stage.channels, stage.level.shape[2:]
        N, start = H * W, stage.level.numel()
        tokens, q, k, v = self.block[start : start + 4 * N * C].view(4, N, C)
        picture = tokens.view(1, H, W, C).permute(0, 3, 1, 2)
        picture.copy_(stage.x)
        self.normalise(picture, layer.group_norm, stage.moments)
        for linear, out in ((layer.to_q, q), (layer.to_k, k), (layer.to_v, v)):
            weight, bias = self.cast(linear)
            torch.addmm(bias, tokens, weight.T, out=out)
        tokens.copy_(attention(q[None, None], k[None, None], v[None, None])[0, 0])
        weight, bias = self.cast(layer.to_out[0])
        torch.addmm(bias, tokens, weight.T, out=q)
        stage.moments = Moments(C, self.device)
        change = q.view(1, H, W, C).permute(0, 3, 1, 2)
        rows = rows_of(self.band, W, C, C, self.wide.itemsize)
        for y0 in range(0, H, rows):
            band = change[:, :, y0 : y0 + rows]
            self.put(stage.x, y0, band.add_(stage.x[:, :, y0 : y0 + rows]), stage.moments)
        self.check(
            stage.moments, layer.group_norm, layer.to_q, layer.to_k, layer.to_v, layer.to_out[0], layer
        )

    def double(self, stage: Stage, layer: Upsample, width: int) -> Stage:
        """Nearest neighbours and a 3×3 convolution, into a level `width` channels wide."""
        C, (H, W) = stage.channels, stage.level.shape[2:]
        source = self.packed(stage)
        stage = self.stage(width, C, 2 * H, 2 * W)
        bias = layer.conv.bias.to(self.dtype).repeat(2)
        phases = [
            self.kernel(phase_kernels(layer.conv.weight, i, self.dtype), bias, W, padding=(0, 1))
            for i in (0, 1)
        ]
        give_back()  # the pieces that kernels were summed up from, and bands of another level, fit nothing here
        for y0, y1, window in self.windows(source, 4 * C):
            rows = stage.x[:, :, 2 * y0 : 2 * y1]
            for i in (0, 1):  # (1, C, y1 - y0 + 2, W) -> (1, 2C, y1 - y0, W + 1)
                part = window[:, :, i : i + y1 - y0 + 1]
                interleave(phases[i](part), rows[:, :, i::2])
            self.measure(rows, stage.moments)
        self.check(stage.moments, layer.conv)
        return stage

    def halve(self, stage: Stage, layer: Downsample, width: int) -> Stage:
        """The strided convolution, into a level `width` channels wide."""
        C, (H, W) = stage.channels, stage.level.shape[2:]
        source = self.packed(stage)
        stage = self.stage(width, C, H // 2, W // 2)
        convolve = self.kernel(*self.cast(layer.conv), W, stride=(2, 2))
        for y0, _, window in self.windows(source, C, above=0, step=2):
            padded = F.pad(window, (0, 1))
            self.put(stage.x, y0 // 2, convolve(padded), stage.moments)
            del padded
        self.check(stage.moments, layer.conv)
        return stage

    # --- memory ---

    def stage(self, width: int, channels: int, height: int, length: int) -> Stage:
        """An empty level at the head of the block, its residual stream in the first channels."""
        level = picture_of(self.block, width, height, length)
        return Stage(level, 0, channels, Moments(channels, self.device))

    def packed(self, stage: Stage) -> Tensor:
        """The residual stream alone, (1, C, H, W), moved to the tail of the block, so that the head is free for the
        next level, which reads it in order of rows.

        Rows move from the last to the first. Row y goes to number A - (H - y)·W·C and on, of the block's A; rows still
        to move end at y·W·K, which is no more, since A ≥ H·W·K and K ≥ C.
        The next level's N numbers do not overtake the reading either: when a share r of both is done, they end at r·N,
        and the rest to read begins at A - (1 - r)·H·W·C, which is no less at r = 0 and at r = 1, and so in between.
        """
        H, W = stage.level.shape[2:]
        numbers = stage.channels * H * W
        tail = picture_of(self.block[len(self.block) - numbers :], stage.channels, H, W)
        rows = rows_of(self.band, W, stage.channels, stage.channels, self.dtype.itemsize)
        for y1 in range(H, 0, -rows):
            y0 = max(0, y1 - rows)
            held = self.room(stage.channels, y1 - y0, W, self.dtype).copy_(stage.x[:, :, y0:y1])
            tail[:, :, y0:y1] = held
        return tail

    def room(self, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """The scratch memory as (1, C, H, W), channels last; what it held before is lost."""
        size = channels * height * width * dtype.itemsize
        self.reserve(size)
        return picture_of(self.scratch[:size].view(dtype), channels, height, width)

    def reserve(self, size: int) -> None:
        """Make the scratch at least `size` bytes, while no window is in use: it would keep the old memory alive."""
        if len(self.scratch) < size:
            del self.scratch  # before the new one, or both would count
            self.scratch = torch.empty(size, dtype=torch.uint8, device=self.device)

    def windows(
        self, x: Tensor, out: int, above: int = 1, below: int = 1, step: int = 1
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Bands of x (1, C, H, W) in order, for a layer that writes `out` channels: (y0, y1, window).

        The window holds rows [y0 - above, y1 + below), zeros beyond the picture; the caller may overwrite it, and rows
        before y1 of x as well: each row of x is read once, and what two windows share is kept aside.
        """
        _, C, H, W = x.shape
        rows = max(1, rows_of(self.band, W, C, out, self.dtype.itemsize) // step) * step
        most = min(rows, H)
        self.reserve(
            W * max((most + above + below) * C * self.dtype.itemsize, most * out * self.wide.itemsize)
        )
        shared = None
        for y0 in range(0, H, rows):
            y1 = min(y0 + rows, H)
            window = self.room(C, y1 - y0 + above + below, W, self.dtype)
            first, filled = (0, above) if shared is None else (y0 + below, above + below)
            window[:, :, :filled] = 0 if shared is None else shared
            last = min(y1 + below, H)
            window[:, :, filled : filled + last - first] = x[:, :, first:last]
            window[:, :, filled + last - first :] = 0
            shared = window[:, :, window.shape[2] - above - below :].clone()
            yield y0, y1, window

    def put(self, x: Tensor, y0: int, rows: Tensor, moments: Moments | None = None) -> None:
        """Write rows (1, C, h, W) to x from row y0 on, and measure them. The scratch is lost."""
        x[:, :, y0 : y0 + rows.shape[2]] = rows
        if moments is not None:
            self.measure(rows, moments)

    def measure(self, rows: Tensor, moments: Moments) -> None:
        _, C, h, W = rows.shape
        moments.add(self.room(C, h, W, self.wide).copy_(rows))

    # --- arithmetic ---

    def cast(self, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
        return layer.weight.to(self.dtype), layer.bias.to(self.dtype)

    def convolution(self, conv: nn.Conv2d, width: int) -> Callable[[Tensor], Tensor]:
        """A 3×3 convolution of windows that have a row more above and below, and are padded here at the sides."""
        return self.kernel(*self.cast(conv), width, padding=(0, 1))

    def kernel(
        self,
        weight: Tensor,
        bias: Tensor,
        width: int,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> Callable[[Tensor], Tensor]:
        """A convolution of many windows of that width, its weights laid out once where that helps."""
        if is_laid_out(weight):
            return PackedConv2d(weight, bias, stride, padding, cells=(CELLS, width))
        return partial(F.conv2d, weight=weight, bias=bias, stride=stride, padding=padding)

    def pointwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, *self.cast(conv))

    def normalise(self, x: Tensor, norm: nn.GroupNorm, moments: Moments) -> None:
        normalise(x, norm, moments, self.wide)

    def activate(self, window: Tensor, norm: nn.GroupNorm, moments: Moments, top: bool, bottom: bool) -> None:
        """silu(norm(window)) in place. Rows beyond the picture's top and bottom are a convolution's padding: zero."""
        self.normalise(window, norm, moments)
        F.silu(window, inplace=True)
        if top:
            window[:, :, :1] = 0
        if bottom:
            window[:, :, -1:] = 0

    # --- overflow ---

    def check(self, moments: Moments, *layers: nn.Module | None) -> None:
        """Statistics are finite if every number measured is, and its square. layers: what made them, in order."""
        if not moments.finite():
            raise self.failure(*layers)

    def failure(self, *layers: nn.Module | None) -> NonFiniteError:
        """Names the first layer with a weight that is not finite in the type computed in, or else the last layer."""
        present = [layer for layer in layers if layer is not None]
        for layer in present:
            if not all(torch.isfinite(p.to(self.dtype)).all() for p in layer.parameters()):
                return not_finite(self.names[layer], self.dtype)
        return not_finite(self.names[present[-1]], self.dtype)


def picture_of(memory: Tensor, channels: int, height: int, width: int) -> Tensor:
    """The first numbers of a flat memory as (1, C, H, W), channels last."""
    numbers = channels * height * width
    return memory[:numbers].view(1, height, width, channels).permute(0, 3, 1, 2)


def ends(block: DownBlock | UpBlock) -> tuple[int, int]:
    """Channels that a level is given, and its own."""
    return block.resnets[0].conv1.in_channels, block.resnets[-1].conv1.out_channels
