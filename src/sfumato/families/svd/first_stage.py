"""The first stage's encoder, which other programs look for in a single file: ours, with the convolution after it in
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.rules import Info, KeyMap, View, info
from sfumato.families.published.keys import VAE_PREFIX
from sfumato.families.svd.keys import encoder_map

LAST = "encoder.conv_out.weight", "encoder.conv_out.bias"  # what folding changes


class FirstStage(Mapping[str, Tensor]):
    """Tensors under the names of a single file, made of a VAE's own when they are asked for.

    The encoder's last convolution W, b and the 1×1 one after it, Q, q, are one of Q·W and Q·b + q: what a program draws
    that has no place for the second.
    """

    def __init__(self, vae: View, config: KLConfig):
        self.vae = vae
        rules: KeyMap = encoder_map(config)
        self.tensors = rules.within(f"{VAE_PREFIX}", "").to_theirs(_Encoder(vae))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if name.removeprefix(VAE_PREFIX) not in LAST:
            return tensor
        quant = self.vae["quant_conv.weight"].flatten(1).float()  # (2C, 2C)
        folded = torch.tensordot(quant, tensor.float(), dims=1)
        if tensor.ndim == 1:
            folded += self.vae["quant_conv.bias"].float()
        return folded.to(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:  # the one of `Mapping` would make the tensor
        return name in self.tensors

    def info(self, name: str) -> Info:
        return self.tensors.info(name)


class _Encoder(Mapping[str, Tensor]):
    """A VAE's encoder alone, under its own names."""

    def __init__(self, vae: View):
        self.vae = vae

    def __getitem__(self, name: str) -> Tensor:
        return self.vae[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.vae if name.startswith("encoder."))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def info(self, name: str) -> Info:
        return info(self.vae, name)
