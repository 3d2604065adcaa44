"""Linear layers whose weights alone are eight-bit whole numbers: half the memory of bfloat16, on every device.

Weights are rounded once, with a scale for each output channel; activations and sums keep their type, so that outliers
among activations, of which language models are full, cost nothing. A layer's codes are widened for each product, which
makes this slower than `nn/quantized.py` and of use where a network is run once and is large.

Source: LLM.int8() (Dettmers et al. 2022, 2208.07339), sec. 2, for the scales.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from sfumato.nn.quantized import channel_codes


class NarrowLinear(nn.Module):
    """x (…, I) → (…, O), with codes (O, I) int8 and scales (O,) float32: weight ≈ codes · scale."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear):
        super().__init__()
        codes, scale = channel_codes(layer.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        sums = functional.linear(x, self.codes.to(x.dtype)).float().mul_(self.scale)
        if self.bias is not None:
            sums += self.bias
        return sums.to(x.dtype)


def narrowed(layer: nn.Module) -> nn.Module | None:
    """The eight-bit twin of a linear layer; None for others."""
    return NarrowLinear(layer) if isinstance(layer, nn.Linear) else None


def size_of(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
