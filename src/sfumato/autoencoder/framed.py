"""The autoencoder of clips in little memory: exact, by frames where frames are alone, and by bands of rows elsewhere.

Decoding a clip in pieces changes it. The decoder's temporal blocks look one frame back and one ahead, fourteen of them
twice over, so that what a frame shows depends on all others of a short clip; and their GroupNorms take their statistics
from all frames together. (diffusers' `decode_chunk_size` cuts the clip all the same, and its numbers change.)

But no layer does everything at once. Of a space-time block

    the spatial half, attention, upsampling, entrance and exit   are of one frame, whose neighbours need not be there
    the temporal half                                            is of one pixel in all frames; no other need be there

so the first go frame by frame, and the second band by band of rows with all frames. What joins the bands are the two
norms' statistics, means and variances of all ever added (`statistics.Moments`): a first walk over the bands has
the second norm's, and a second walk makes the first convolution once more instead of keeping its answer.

Held are the activation of every frame between two layers, once, and what one frame or one band needs. For the published
network that is 128 numbers for each pixel of the clip, where the plain pass takes 640 or more, at an eighth more work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from sfumato.autoencoder.banded import check_finite
from sfumato.autoencoder.kl import Upsample, norm_silu
from sfumato.autoencoder.memory import BAND, rows_of
from sfumato.autoencoder.model import PIXEL_CHANNELS
from sfumato.autoencoder.safe import rescued
from sfumato.autoencoder.statistics import Moments, normalise, not_finite, settled
from sfumato.autoencoder.temporal import SpaceTimeResnet, TemporalAutoencoderKL
from sfumato.nn.temporal import Mixer, TemporalResnet, as_clips, as_frames


def decode_framed(
    model: TemporalAutoencoderKL, latent: Tensor, *, band: int = BAND, dtype: torch.dtype | None = None
) -> Tensor:
    """`model.decode(latent)` within rounding: pixels (B, 3, T, H, W) float32 of an unnormalised (B, C, T, H/f, W/f).

    band: bytes of a band of rows of all frames. dtype: what to compute in, by default the weights' type; autocast is
    ignored. There are no gradients. Raises `InputError` on a wrong shape or a latent that is not finite,
    `NonFiniteError` when a layer overflows.
    """
    if has_torch_function((latent,)):  # a mode that counts operations sees this one whole
        return handle_torch_function(decode_framed, (latent,), model, latent, band=band, dtype=dtype)
    model.check_latent(latent)
    check_finite(latent, "latent")
    B, _, T, H, W = latent.shape
    pixels = torch.empty(B, PIXEL_CHANNELS, T, H * model.factor, W * model.factor, device=latent.device)
    run = Pass(model, band, dtype)
    with torch.no_grad(), torch.autocast(latent.device.type, enabled=False):
        for b in range(B):
            run.decode(latent[b], pixels[b])
    return pixels


def decode_safe(
    model: TemporalAutoencoderKL, latent: Tensor, *, band: int = BAND, dtype: torch.dtype | None = None
) -> Tensor:
    """`decode_framed`, in float32 where the type asked for overflows; as `safe.decode_safe`."""
    return rescued(decode_framed, model, latent, band, dtype)


def repeated_flops(model: TemporalAutoencoderKL, frames: int, height: int, width: int) -> int:
    """FLOPs that `decode_framed` does beyond those of `model.decode`, for one clip whose latent has these sides: the
    first convolution between frames of each block, a second time.
    """
    total = 0
    for layer in model.decoder.layers():
        if isinstance(layer, SpaceTimeResnet):
            total += 2 * frames * height * width * layer.temporal_res_block.conv1.weight.numel()
        elif isinstance(layer, Upsample):
            height, width = 2 * height, 2 * width
    return total


class Pass:
    """Takes clips through the decoder, one at a time."""

    def __init__(self, model: TemporalAutoencoderKL, band: int, dtype: torch.dtype | None):
        self.model, self.band = model, band
        self.dtype, self.wide, self.names = settled(model, band, dtype)

    def decode(self, latent: Tensor, out: Tensor) -> None:
        """latent: (C, T, H/f, W/f); out: (3, T, H, W), written."""
        decoder, first = self.model.decoder, self.model.post_quant_conv
        x = [frame[None].to(self.dtype) for frame in latent.unbind(1)]  # T of (1, C, H/f, W/f)
        alone: list[nn.Module] = [*([] if first is None else [first]), decoder.conv_in]
        for layer in decoder.layers():
            if isinstance(layer, SpaceTimeResnet):
                self.each(x, *alone, layer.spatial_res_block)
                self.mix(x, layer)
                alone = []
            else:
                alone.append(layer)
        norm, conv = self.cast(decoder.conv_norm_out), self.cast(decoder.conv_out)
        frames = len(x)
        for t in range(frames):
            out[:, t] = conv(norm_silu(norm, x.pop(0)))[0]
        shown = self.cast(decoder.time_conv_out)(as_clips(out.movedim(1, 0).to(self.dtype), frames))
        out.copy_(as_frames(shown, *out.shape[-2:]).movedim(0, 1))
        self.check(out.sum(), decoder.conv_out)

    def each(self, x: list[Tensor], *layers: nn.Module) -> None:
        """Layers of one frame, one after the other on every frame, in place of what they read: what is wider between
        them is that of one frame alone.
        """
        ready = [self.cast(layer) for layer in layers]
        for t in range(len(x)):
            for layer in ready:
                x[t] = layer(x[t].contiguous(memory_format=torch.channels_last))

    def mix(self, x: list[Tensor], layer: SpaceTimeResnet) -> None:
        """The temporal half of a block, in place."""
        block, mixer = self.cast(layer.temporal_res_block), self.cast(layer.time_mixer)
        assert isinstance(block, TemporalResnet) and isinstance(mixer, Mixer)
        channels, device = x[0].shape[1], x[0].device
        first, second = Moments(channels, device), Moments(channels, device)
        for _, clip in self.bands(x):
            first.add(clip.to(self.wide, copy=True))
        self.check(first.mean + first.square, layer.spatial_res_block)
        for _, clip in self.bands(x):
            second.add(self.convolved(clip, block.norm1, first, block.conv1).to(self.wide, copy=True))
        self.check(second.mean + second.square, layer.temporal_res_block.conv1)
        for rows, clip in self.bands(x):
            h = self.convolved(clip.clone(), block.norm1, first, block.conv1)
            change = self.convolved(h, block.norm2, second, block.conv2)
            mixed = as_frames(mixer(clip, change), rows.stop - rows.start, x[0].shape[3])
            for t in range(len(x)):
                x[t][:, :, rows] = mixed[t]

    def bands(self, x: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a picture, and these rows of all frames: (1, C, T, rows·W), channels-last memory of their own."""
        _, C, H, W = x[0].shape
        rows = rows_of(self.band, W * len(x), C, C, self.dtype.itemsize)
        for y in range(0, H, rows):
            part = slice(y, min(y + rows, H))
            yield part, as_clips(torch.cat([frame[:, :, part] for frame in x]), len(x))

    def convolved(self, clip: Tensor, norm: nn.GroupNorm, moments: Moments, conv: nn.Module) -> Tensor:
        """conv(silu(norm(clip))), by statistics of the whole; the clip is overwritten."""
        normalise(clip, norm, moments, self.wide)
        return conv(F.silu(clip, inplace=True))

    def cast(self, layer: nn.Module) -> nn.Module:
        """The layer in the type computed in; itself, where its weights are."""
        weight = next(layer.parameters(), None)
        return layer if weight is None or weight.dtype == self.dtype else copy.deepcopy(layer).to(self.dtype)

    def check(self, numbers: Tensor, layer: nn.Module) -> None:
        """That what a layer gave is finite, told from numbers that are if it is."""
        if bool((~torch.isfinite(numbers)).any()):
            raise not_finite(self.names[layer], self.dtype)
