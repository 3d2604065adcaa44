"""Statistics of a GroupNorm gathered from bands of rows, and the norm by given ones.

Means and variances of bands, two passes each in float32, are merged in float64 (Chan, Golub & LeVeque 1983); that is
closer to the truth than PyTorch's own channels-last GroupNorm, which adds up in sequence in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato import checks
from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.errors import InputError, NonFiniteError


def not_finite(layer: str, dtype: torch.dtype) -> NonFiniteError:
    """What to raise where a layer of the autoencoder, by its name as in the weights' file, gives NaN or infinity."""
    kind = str(dtype).removeprefix("torch.")
    why = "its weights are damaged, or not of this model"
    if dtype == torch.float16:
        why = "float16 ends at 65504, so compute in bfloat16 or float32"
    return NonFiniteError(f"{layer} of the autoencoder gives NaN or infinity in {kind}; {why}", layer)


class Moments:
    """Mean and sum of squared deviations of each channel, gathered band by band."""

    def __init__(self, channels: int, device: torch.device):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.square = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, band: Tensor) -> None:
        """band: (1, C, h, W) in float32 or wider; it is overwritten."""
        n = band.shape[2] * band.shape[3]
        mean = band.mean((0, 2, 3))
        square = band.sub_(mean[:, None, None]).square_().mean((0, 2, 3)).double() * n
        total = self.count + n
        delta = mean.double() - self.mean
        self.square += square + delta**2 * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each channel's group, (C,)."""
        means = self.mean.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        variance = (self.square.view(groups, -1) / self.count + (means - mean) ** 2).mean(1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()

    def finite(self) -> bool:
        return not bool((~torch.isfinite(self.mean + self.square)).any())


def normalise(x: Tensor, norm: nn.GroupNorm, moments: Moments, wide: torch.dtype) -> None:
    """In place, by given statistics, which is what a batch norm does outside training; in one rounding.

    x: (1, C, H, W). wide: the type of the arithmetic.
    """
    mean, variance = (value.to(wide) for value in moments.of_groups(norm.num_groups))
    weight, bias = norm.weight.to(wide), norm.bias.to(wide)
    unused = x.new_empty(0, dtype=wide)
    torch.native_batch_norm(
        x, weight, bias, mean, variance, False, 0.0, norm.eps, out=(x, unused, unused.clone())
    )


def settled(
    model: AutoencoderKL, band: int, dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, dict[nn.Module, str]]:
    """What a pass by bands computes in, what its statistics are taken in, and its layers' names.

    dtype: the weights' by default. `InputError` for a band of no bytes, and a type without fractions.
    """
    checks.whole("band", band, 1)
    dtype = model.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type, not {dtype}", argument="dtype")
    names = {module: name for name, module in model.named_modules()}
    return dtype, torch.promote_types(dtype, torch.float32), names
