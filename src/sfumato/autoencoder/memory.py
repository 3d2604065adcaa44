"""How much memory a pass of the KL autoencoder takes, told from its shape alone.

Counted is what PyTorch allocates for activations and results, beyond weights, inputs and what the libraries keep for
themselves (convolutions of plain, not channels-last, memory are reordered inside and take more).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from sfumato.autoencoder.kl import KLConfig
from sfumato.autoencoder.model import PIXEL_CHANNELS, check_size
from sfumato.errors import InputError
from sfumato.nn.attention import SCORES

BAND = 4 << 20  # bytes: a band that stays in a core's cache while it is normalised, convolved and measured
LEAST_BAND = 1 << 20  # below this a pass slows down more than it saves


def decoder_numbers(config: KLConfig, height: int, width: int) -> int:
    """Numbers in the block of memory that decodes height × width latent cells."""
    wider = (*config.widths[1:], config.widths[-1])  # channels that a level gets from the coarser one
    return block_numbers(config, wider, height * config.factor, width * config.factor)


def encoder_numbers(config: KLConfig, height: int, width: int) -> int:
    """Numbers in the block of memory that encodes height × width pixels."""
    return block_numbers(config, (config.widths[0], *config.widths[:-1]), height, width)


def block_numbers(config: KLConfig, given: tuple[int, ...], height: int, width: int) -> int:
    """The widest level, or the coarsest with the queries, keys, values and results of attention beside it."""
    levels = [
        level_width(channels, out) * (height >> i) * (width >> i)
        for i, (channels, out) in enumerate(zip(given, config.widths, strict=True))
    ]
    if config.mid_attention:
        levels[-1] += 4 * config.widths[-1] * (height // config.factor) * (width // config.factor)
    return max(levels)


def level_width(channels: int, out: int) -> int:
    """Channels that a level needs: those it is given, or twice its own for x and h."""
    return max(channels, 2 * out)


def rows_of(band: int, width: int, channels: int, out: int, itemsize: int) -> int:
    """Rows of a band: neither what a layer reads nor what it writes is larger than `band` bytes, or it is one row."""
    return max(1, band // (width * max(channels, out) * itemsize))


class Layer(NamedTuple):
    kind: Literal["in", "resnet", "attention", "half", "double", "out"]
    channels: int  # read
    out: int  # written
    height: int  # of what is read
    width: int


def peak_bytes(
    config: KLConfig,
    task: Literal["decode", "encode"],
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    band: int | None = BAND,
    pictures: int = 1,
) -> int:
    """Bytes allocated at the worst moment of decoding or encoding pictures of height × width pixels.

    band: as in `decode_banded`; None for the plain pass, which holds all pictures at once. The result counts, weights
    and inputs do not. Raises `InputError` on a size that does not divide into cells, and on another task.
    """
    check_size(config.factor, height, width)
    if task not in ("decode", "encode"):
        raise InputError(f"task must be 'decode' or 'encode', not {task!r}", argument="task")
    layers = list(layers_of(config, task, height, width))
    cells = (height // config.factor) * (width // config.factor)
    numbers = {"decode": PIXEL_CHANNELS * height * width, "encode": 2 * config.channels * cells}[task]
    result = pictures * numbers * 4
    if band is None:
        return pictures * max(plain_bytes(layer, dtype.itemsize) for layer in layers) + result
    if task == "decode":
        block = decoder_numbers(config, height // config.factor, width // config.factor)
    else:
        block = encoder_numbers(config, height, width)
    windows, others = zip(*(band_bytes(layer, band, dtype.itemsize) for layer in layers), strict=True)
    return block * dtype.itemsize + max(windows) + max(others) + result


def clip_bytes(
    config: KLConfig,
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    band: int | None = BAND,
) -> int:
    """Bytes allocated at the worst moment of decoding a clip of so many frames of height × width pixels.

    band: as in `decode_framed`; None for the plain pass. The result counts, weights and inputs do not.
    """
    check_size(config.factor, height, width)
    size, result = dtype.itemsize, PIXEL_CHANNELS * frames * height * width * 4
    worst = before = alone = (
        0  # bytes: at most; of a frame as the last temporal half left it; of layers since, at most
    )
    for layer in layers_of(config, "decode", height, width):
        kind, _, out, rows, columns = layer
        alone = max(alone, plain_bytes(layer, size))
        if band is None:  # a temporal half has what the spatial one gave, and two activations of its own
            mixing = 4 * out * rows * columns * size if kind == "resnet" else 0
            worst = max(worst, frames * max(alone, mixing))
            alone = 0
        elif kind in ("resnet", "out"):
            made = out * rows * columns * size
            few = min(rows, rows_of(band, columns * frames, out, out, size)) * columns * frames * out
            mixing = few * (5 * size + max(4, size))
            worst = max(worst, frames * max(before, made) + alone, frames * made + mixing)
            before, alone = made, 0
    return worst + 3 * result


def band_for(
    config: KLConfig,
    task: Literal["decode", "encode"],
    height: int,
    width: int,
    dtype: torch.dtype,
    limit: int,
) -> int:
    """The largest band up to the default with which a pass stays within `limit` bytes; `InputError` if none does."""
    band = BAND
    while band >= LEAST_BAND:
        if peak_bytes(config, task, height, width, dtype, band=band) <= limit:
            return band
        band //= 2
    least = peak_bytes(config, task, height, width, dtype, band=LEAST_BAND)
    raise InputError(
        f"to {task} {width}x{height} takes {least / 2**20:.0f} MiB, more than the limit of {limit / 2**20:.0f} MiB; "
        "take a smaller picture, a narrower type or a higher limit",
        argument="limit",
    )


def layers_of(
    config: KLConfig, task: Literal["decode", "encode"], height: int, width: int
) -> Iterator[Layer]:
    """The layers in the order data meets them."""
    last, widths = len(config.widths) - 1, config.widths
    middle = [Layer("resnet", widths[-1], widths[-1], height >> last, width >> last)]
    if config.mid_attention:
        middle.append(Layer("attention", widths[-1], widths[-1], height >> last, width >> last))
    if task == "encode":
        yield Layer("in", PIXEL_CHANNELS, widths[0], height, width)
        for i, out in enumerate(widths):
            size = height >> i, width >> i
            yield Layer("resnet", widths[max(0, i - 1)], out, *size)
            if config.resnets > 1:
                yield Layer("resnet", out, out, *size)
            if i < last:
                yield Layer("half", out, out, *size)
        yield from middle
        yield Layer("out", widths[-1], 2 * config.channels, height >> last, width >> last)
        return
    yield Layer("in", config.channels, widths[-1], height >> last, width >> last)
    yield from middle
    for i in range(last, -1, -1):
        size = height >> i, width >> i
        yield Layer("resnet", widths[min(last, i + 1)], widths[i], *size)
        yield Layer("resnet", widths[i], widths[i], *size)
        if i:
            yield Layer("double", widths[i], widths[i], *size)
    yield Layer("out", widths[0], PIXEL_CHANNELS, height, width)


def plain_bytes(layer: Layer, itemsize: int) -> int:
    """Bytes alive at the worst moment of a layer's plain pass."""
    kind, channels, width = layer.kind, layer.channels, layer.out
    positions, edge = layer.height * layer.width, (layer.height + 1) * (layer.width + 1)
    x, out = channels * positions, width * positions
    if kind == "attention":  # x, tokens, queries, keys, values, and what attention makes of them
        return 5 * x * itemsize + attention_bytes(layer, itemsize)
    numbers = {
        "in": x + out,
        "resnet": max(2 * x + out, x + 3 * out),  # x, norm1, h; or x, h, norm2 or the shortcut, the result
        "half": x + channels * edge + out // 4,  # x, x padded, the result
        "double": x + 4 * out + 2 * width * edge,  # x, the result, two of its four phases
        "out": 2 * x + out,
    }
    return numbers[kind] * itemsize


def attention_bytes(layer: Layer, itemsize: int) -> int:
    """Bytes allowed for attention beside queries, keys and values: its result, or in a narrow type room for what the
    blocks of a CPU take at the published width, or all four in float32; `nn.attention.attention_bytes` counts that, and
    it is less.
    """
    tokens = layer.height * layer.width
    numbers = tokens * layer.channels
    if itemsize >= 4:
        return numbers * itemsize
    return max(14 * numbers + 2 * min(SCORES, tokens**2), 16 * numbers)


def band_bytes(layer: Layer, band: int, itemsize: int) -> tuple[int, int]:
    """Bytes of a layer's scratch, and of what a banded pass holds beside it and the block."""
    kind, channels, out, height, width = layer
    wide = max(4, itemsize)
    if kind == "attention":
        rows = min(height, rows_of(band, width, channels, out, wide))
        return rows * width * out * wide, attention_bytes(layer, itemsize)
    if kind == "resnet":  # its second convolution reads and writes `out`
        first = band_bytes(layer._replace(kind="in"), band, itemsize)
        second = band_bytes(layer._replace(kind="in", channels=out), band, itemsize)
        return max(first[0], second[0]), max(first[1], second[1])
    made = 4 * out if kind == "double" else out
    rows = min(height, max(2 if kind == "half" else 1, rows_of(band, width, channels, made, itemsize)))
    scratch = width * max((rows + 2) * channels * itemsize, rows * made * wide)
    shared = 2 * width * channels * itemsize
    kernel = 9 * channels * out * itemsize  # laid out for the processor
    if kind == "half":
        held = (rows + 1) * (width + 1) * channels + rows * width * out // 4
        return scratch, kernel + shared + held * itemsize
    if kind == "double":
        kernels = 16 * channels * out * itemsize
        made_of = kernels + 15 * channels * out * wide  # while taps are summed up, before any window
        return scratch, max(made_of, kernels + shared + rows * (width + 1) * 2 * out * itemsize)
    return scratch, kernel + shared + rows * width * made * itemsize
