"""Products of eight-bit whole numbers, at twice the rate of bfloat16 on CPUs with VNNI or AMX.

Both factors are rounded (W8A8): weights once, to -127 … 127 with a scale for each output channel; activations at every
call, to 0 … 255. There a linear layer takes a scale for each token, from its largest number, so that a token's result
does not depend on its neighbours, and a convolution a scale and a zero for each picture, from its least and largest
number, since what a SiLU leaves lies to one side of zero. Sums are exact; rounding is the only error.

oneDNN's fast kernels want the activation unsigned and without a zero point of its own. So the zero is added to the
numbers, and what it contributes, zero times the sum of a channel's weights, is subtracted with the bias. The padding of
a convolution is written into the codes as that zero.

Source: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), sec. 2, for row- and column-wise scales.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.errors import InputError
from sfumato.nn.attention import attention
from sfumato.nn.packed import CELLS, ROWS, is_laid_out, is_layer, packed
from sfumato.nn.spatial import GEGLU, CrossAttention, TanhGELU, TransformerBlock

LEVELS = 127  # the largest code of a weight and of a token's number, either side of zero
MIDDLE = 128  # added to a token's codes, which makes them unsigned
LEAST = 1e-30  # a scale, where every number is zero


def can_quantize(weight: Tensor) -> bool:
    """Whether products with that weight can be done in eight bits: packed otherwise, and on a CPU with VNNI.

    Without VNNI sums of two products saturate in sixteen bits.
    """
    return is_laid_out(weight) and torch.cpu._is_vnni_supported()


def quantize(network: nn.Module, kept: Collection[str]) -> int:
    """Replace the linear layers and convolutions of `network` by eight-bit twins, in place; returns how many.

    kept: parts of names, such as a network's own `KEPT`. Layers with one of them in their names, and those with no
    eight-bit twin, are packed as `nn.packed.pack` does.
    Raises `InputError` where the CPU has no eight-bit products, or the network is not on a CPU. As after packing, the
    network can only be run, and without gradients.
    """
    require_eight_bits(next(network.parameters()))
    count = 0
    for path, parent, name in list(units(network)):
        twin = stand_in(path, getattr(parent, name), kept)
        if twin is not None:
            setattr(parent, name, twin)
            count += isinstance(twin, EIGHT_BITS)
    return count


def units(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """What is replaced as one, as `packed.layers` tells it; but the self-attention of a block is one too."""
    for name, child in network.named_children():
        path = f"{prefix}{name}"
        if (isinstance(network, TransformerBlock) and name == "attn1") or is_layer(child):
            yield path, network, name
        else:
            yield from units(child, f"{path}.")


def stand_in(path: str, layer: nn.Module, kept: Collection[str]) -> nn.Module | None:
    """What `quantize` puts in the place of one of `units`: an eight-bit twin, a packed one, or None."""
    if isinstance(layer, CrossAttention):
        return QuantizedAttention(layer)
    if any(f".{part}." in f".{path}." for part in kept):
        return packed(layer)
    return quantized(layer) or packed(layer)


def require_eight_bits(weight: Tensor) -> None:
    """`InputError` if no network with such a weight can be quantised, said before it is read."""
    if not can_quantize(weight):
        raise InputError(
            "int8 needs a CPU with AVX512-VNNI or AMX, and weights in float32 or bfloat16; these are "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}",
            argument="dtype",
        )


def quantized(layer: nn.Module) -> nn.Module | None:
    """The eight-bit twin of one layer, or None where there is none."""
    if isinstance(layer, GEGLU):
        return QuantizedGEGLU(layer)
    if isinstance(layer, TanhGELU):
        return QuantizedTanhGELU(layer)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(layer.weight, layer.bias)
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    if layer.groups != 1 or layer.dilation != (1, 1):
        return None
    if layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0):
        return QuantizedPointwise(layer)
    return QuantizedConv2d(layer)


# --- rounding ------------------------------------------------------------------------------------------------------


def channel_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, …) → int8 codes of that shape and the float32 scales (O,) that turn them back."""
    weight = weight.detach().float()
    scale = weight.abs().flatten(1).amax(1).div(LEVELS).clamp_(min=LEAST)
    codes = weight.div(scale.view(-1, *[1] * (weight.ndim - 1))).round_().to(torch.int8)
    return codes.contiguous(), scale


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(…, D) → uint8 codes around MIDDLE and scales (…, 1) in the type of x: x ≈ (codes - MIDDLE) · scale."""
    wide = x.to(torch.float32, copy=True)
    largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    scale = largest.div_(LEVELS).clamp_(min=LEAST).to(x.dtype)  # rounded first: what is divided by it fits it
    return unsigned(wide.mul_(scale.float().reciprocal())), scale


def picture_codes(x: Tensor, border: tuple[int, int]) -> tuple[Tensor, float, int]:
    """(1, C, H, W) → uint8 codes (1, C, H + 2·above, W + 2·beside), channels last, with a border of the code of 0;
    scale and zero: x ≈ (codes - zero) · scale.
    """
    wide = x.to(torch.float32, copy=True, memory_format=torch.channels_last)
    low, high = float(wide.amin()), float(wide.amax())
    if math.isfinite(high - low):
        low, high = min(0.0, low), max(0.0, high)
        scale = max((high - low) / (2 * LEVELS), LEAST)  # one code to spare for the rounding of zero
        zero = round(-low / scale)
    else:
        scale, zero = math.nan, 0  # NaN everywhere, rather than numbers that look sound
    codes = unsigned(wide.mul_(1 / scale).add_(zero - MIDDLE))
    above, beside = border
    if not above and not beside:
        return codes, scale, zero
    _, C, H, W = x.shape
    framed = codes.new_empty(1, H + 2 * above, W + 2 * beside, C).permute(0, 3, 1, 2)
    for edge in (framed[:, :, :above], framed[:, :, H + above :]):
        edge.fill_(zero)
    for edge in (framed[..., :beside], framed[..., W + beside :]):
        edge.fill_(zero)
    framed[:, :, above : above + H, beside : beside + W] = codes
    return framed, scale, zero


def unsigned(x: Tensor) -> Tensor:
    """Numbers that round to -128 … 127, overwritten, → their nearest whole numbers plus 128, uint8.

    Through int8, since a conversion to it is one of vectors and that to uint8 is not; the top bit's flip adds 128.
    """
    return x.round_().to(torch.int8).view(torch.uint8).bitwise_xor_(MIDDLE)


# --- layers --------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """(…, I) → (…, O) in the type of x; weight: (O, I), bias: (O,) or None. Each token has a scale of its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        codes, self.scale = channel_codes(weight)
        self.tiles = torch.ops.onednn.qlinear_prepack(codes, [ROWS, weight.shape[1]])
        self.shift = codes.sum(1).float().mul_(self.scale).mul_(-MIDDLE)
        self.bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(*token_codes(x))

    def product(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The layer's answer to what `token_codes` made, in the type of the scale."""
        sums = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self.tiles, self.scale, None, self.shift, 1.0, 0, scale.dtype, "none", [], ""
        )
        if self.bias is None:
            return sums.mul_(scale)
        return torch.addcmul(self.bias.to(sums.dtype), sums, scale)


class QuantizedGEGLU(nn.Module):
    """(…, D) → (…, hidden): `GEGLU`, value and gate as two products of the same codes."""

    def __init__(self, layer: GEGLU):
        super().__init__()
        (value, gate), (value_bias, gate_bias) = layer.proj.weight.chunk(2), layer.proj.bias.chunk(2)
        self.value = QuantizedLinear(value, value_bias)
        self.gate = QuantizedLinear(gate, gate_bias)

    def forward(self, x: Tensor) -> Tensor:
        codes = token_codes(x)
        gate = functional.gelu(self.gate.product(*codes))
        return gate.mul_(self.value.product(*codes))


class QuantizedTanhGELU(QuantizedLinear):
    """(…, D) → (…, hidden): `TanhGELU`; what follows the product is not rounded to codes."""

    def __init__(self, layer: TanhGELU):
        super().__init__(layer.proj.weight, layer.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(super().forward(x), approximate="tanh")


class QuantizedAttention(nn.Module):
    """(B, N, D) → (B, N, D): tokens that attend to themselves, their queries, keys and values as one product. Scores
    are not rounded to codes.
    """

    def __init__(self, layer: CrossAttention):
        super().__init__()
        self.heads = layer.heads
        joined = torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight])
        self.to_qkv = QuantizedLinear(joined, None)
        self.to_out = QuantizedLinear(layer.to_out[0].weight, layer.to_out[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (B, K, N, D/K)
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


class QuantizedPointwise(QuantizedLinear):
    """(B, C, H, W) → (B, O, H, W): a 1×1 convolution, which is a linear layer of each cell, with a scale for each."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer.weight.flatten(1), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class QuantizedConv2d(nn.Module):
    """(B, C, H, W) → (B, O, H', W') in the type of x, H' and W' by the layer's kernel, stride and padding. Each picture
    has a scale and a zero of its own, and goes alone.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.border: tuple[int, int] = layer.padding  # type: ignore[assignment]
        self.form = (list(layer.stride), [0, 0], [1, 1], 1)  # stride, padding, dilation, groups
        codes, self.scale = channel_codes(layer.weight)
        shape = [1, layer.in_channels, CELLS, CELLS]
        self.sums = codes.flatten(1).sum(1).float().mul_(self.scale)
        self.tiles = torch.ops.onednn.qconv_prepack(codes, self.scale, 1.0, 0, *self.form, shape)
        self.bias = torch.zeros_like(self.scale) if layer.bias is None else layer.bias.detach().float()
        self.zeros = torch.zeros(len(codes), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return self.one(x)
        return torch.cat([self.one(picture) for picture in x.split(1)])

    def one(self, x: Tensor) -> Tensor:
        """`forward` of one picture, (1, C, H, W)."""
        codes, scale, zero = picture_codes(x, self.border)
        bias = torch.add(self.bias, self.sums, alpha=-scale * zero)
        return torch.ops.onednn.qconv_pointwise(
            codes,
            scale,
            0,
            self.tiles,
            self.scale,
            self.zeros,
            bias,
            *self.form,
            1.0,
            0,
            x.dtype,
            "none",
            [],
            "",
        )


EIGHT_BITS = (QuantizedAttention, QuantizedConv2d, QuantizedGEGLU, QuantizedLinear)
