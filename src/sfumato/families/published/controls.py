"""ControlNets that a system has opened beside its own networks, and what of them stays in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoint.detect import Signature
from sfumato.checkpoint.layout import find_parts
from sfumato.checkpoint.rules import Joined
from sfumato.checkpoint.source import Weights, open_folder, open_weights
from sfumato.errors import CheckpointError
from sfumato.families.published.folder import WEIGHTS
from sfumato.families.published.networks import part_hash
from sfumato.families.published.openers import denoiser
from sfumato.families.published.signatures import refused
from sfumato.types import Conditioning

# (x, time, cond, guess) → what a ControlNet adds to what the denoiser works with
Controller = Callable[[Tensor, Tensor, Conditioning, bool], tuple[Tensor, ...]]
Place = str | os.PathLike[str]
Stand = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class ControlFile:
    """A ControlNet's tensors under our names.

    kind: of the models that it is for. config: of its network. source: what it is called in errors. beside: tensors of
    the base that its network works with too.
    """

    kind: str
    config: Any
    tensors: Mapping[str, Tensor]
    source: str
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def network(self, device: torch.device, dtype: torch.dtype, *, keep: int | None = None) -> Any:
        """The network, laid out as the denoiser beside it: packed for a CPU, in eight bits, or read as it is called."""
        tensors = Joined(("", self.tensors), ("", self.beside)) if self.beside else self.tensors
        return denoiser(self.config, tensors, self.source, device, dtype, keep=keep)

    def with_tensors(self, stand: Stand) -> ControlFile:
        """The same with what stands for its tensors."""
        return replace(self, tensors=stand(self.tensors), beside=stand(self.beside))


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
    _held: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        with self._lock:
            if name in self._held:
                return self._held[name]
            made = self.files[name].network(
                self.device, self.dtype, keep=0 if self.offload == "sequential" else None
            )
            if self.offload == "none":
                self._held[name] = made
            return made

    def digests(self) -> dict[str, str]:
        """SHA-256 of the tensors of each as its file has them."""
        return {name: part_hash(file.tensors) for name, file in self.files.items()}


def relatives() -> list[Signature]:
    """What controls a model too and is no ControlNet, or one that works otherwise."""
    return [
        *refused(
            "a union ControlNet (several kinds in one), not supported",
            "*task_embedding",
            "*control_type_proj*",
            "*control_add_embedding.*",
        ),
        *refused(
            "a ControlNet of FLUX, not supported",
            "controlnet_x_embedder.weight",
            together("controlnet_blocks.0.weight", "single_transformer_blocks.0.attn.to_q.weight"),
        ),
        *refused(
            "a T2I-Adapter, not supported",
            "adapter.body.*",
            "body.0.in_conv.weight",
            "body.0.block1.weight",
            "body.0.resnets.0.block1.weight",
        ),
        *refused("a Control-LoRA, not supported", "lora_controlnet"),
        *refused("a ControlLLLite, not supported", "lllite_*"),
        *refused(
            "a ControlNet kept as its difference from a base model; take the file that holds it whole",
            "difference",
        ),
        *refused("an IP-Adapter, not supported", "image_proj.*", "ip_adapter.*"),
        *refused("a LoRA, not a ControlNet", "*.lora_down.weight", "*.lora_A.weight", "*.lora.down.weight"),
    ]


def together(*names: str) -> dict[str, None]:
    """Marks of a file that has all of these names."""
    return dict.fromkeys(names)


def control_weights(path: Place, variant: str | None = None) -> tuple[Weights, Mapping[str, Any]]:
    """The tensors in a .safetensors file, a diffusers folder, or a folder's part; and what its config.json says."""
    path = Path(path)
    if not path.is_dir():
        return open_weights(path), {}
    part = find_parts(path).parts.get("model")
    if part is None:
        raise CheckpointError(f"{path} is the folder of a whole model; name that of its ControlNet")
    return open_folder(path, part.stem or WEIGHTS["unet"], variant), part.config
