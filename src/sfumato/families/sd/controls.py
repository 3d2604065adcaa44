"""The ControlNets that a Stable Diffusion has opened beside its own networks, and what of them stays in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from sfumato.families.published.networks import part_hash
from sfumato.families.published.system import Controller
from sfumato.families.sd.controlnet import ControlFile, open_control
from sfumato.families.sd.shapes import System
from sfumato.nn.controlnet import ControlNet
from sfumato.nn.unet import UNetConfig
from sfumato.types import Conditioning


@dataclass(frozen=True)
class Controls:
    """ControlNets by name. offload: as of the networks beside them, with which they work.

    With "none" those that were asked for stay. Otherwise one lives as long as somebody draws with it; with "sequential"
    its layers are read from the file at every call. Threads may share it.
    """

    files: Mapping[str, ControlFile]
    device: torch.device
    dtype: torch.dtype
    offload: str = "none"
    _held: dict[str, ControlNet] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> ControlNet:
        with self._lock:
            if name in self._held:
                return self._held[name]
            made = self.files[name].network(self.device, self.dtype, stream=self.offload == "sequential")
            if self.offload == "none":
                self._held[name] = made
            return made

    def openers(
        self,
        names: Iterable[str],
        tensors: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        *,
        stream: bool,
    ) -> dict[str, Callable[[], Callable[[Tensor], Controller]]]:
        """As `PublishedSystem.control_openers`, of names that are here."""

        def opener(file: ControlFile) -> Callable[[], Callable[[Tensor], Controller]]:
            ghost = replace(file, tensors=tensors(file.tensors))
            return lambda: partial(controller, ghost.network(self.device, self.dtype, stream=stream))

        return {name: opener(self.files[name]) for name in names if name in self.files}

    def digests(self) -> dict[str, str]:
        """SHA-256 of the tensors of each as its file has them."""
        return {name: part_hash(file.tensors) for name, file in self.files.items()}


def opened(
    files: Mapping[str, str | os.PathLike[str]],
    unet: UNetConfig,
    kind: str,
    variant: str | None,
    systems: Mapping[str, System] | None = None,
) -> dict[str, ControlFile]:
    """The ControlNets in these files by name, all of them for this U-Net. Only headers are read."""
    found = {name: open_control(path, variant, systems) for name, path in files.items()}
    for file in found.values():
        file.check(unet, kind)
    return found


def controller(network: ControlNet, pixels: Tensor) -> Controller:
    """What a ControlNet adds to the U-Net's skips and to its middle, shown this picture: (1, 3, H, W) in [0, 1]."""
    hint = network.features(pixels)
    channels = network.config.in_channels

    def adds(x: Tensor, time: Tensor, cond: Conditioning, guess: bool) -> tuple[Tensor, ...]:
        # an inpainting U-Net reads more behind the noisy latent
        x = x[:, :channels, 0]
        vector = cond.vector if network.config.vector else None
        return network(x, time, cond.tokens, vector, hint=hint, guess=guess)

    return adds
