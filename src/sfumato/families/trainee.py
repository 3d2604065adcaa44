"""A model that a LoRA is trained for, as `train` knows it, whatever its family.

A system that can be trained so has `trainee(text) -> Trainee`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sfumato.adapters.names import Share
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.schedules import NoiseLevels
from sfumato.types import Conditioning

Read = Callable[[Sequence[str]], Conditioning]
LAYOUTS = ("diffusers", "kohya")


@dataclass(frozen=True)
class Trainee:
    """Networks in plain, frozen layers that let gradients through, and what a training step asks of them.

    system: draws, encodes and decodes with these very networks. kind: what is written in notes ("sdxl"). networks: by
    the names that files of LoRAs have for them; text encoders only if they are to be trained. texts: what the paths
    (part and module) of layers in text encoders begin with. repeated: blocks, to be computed twice where memory is
    short. reader(captions): a function that reads any of these captions, as they stand, into rows of one length; with
    gradients. sized(cond, height, width): the rows with what is told of a picture's size in pixels. predict(x, time,
    cond): the network. spell(path, layout): what a layout calls a layer, and which rows there are the layer's;
    `InputError` where it has no names here. identity(): a hash of all weights. notes: for a file's header, of this
    model.
    """

    system: Any
    kind: str
    networks: Mapping[str, nn.Module]
    texts: tuple[str, ...]
    repeated: tuple[nn.Module, ...]
    parameterization: Parameterization
    levels: NoiseLevels
    reader: Callable[[Iterable[str]], Read]
    sized: Callable[[Conditioning, int, int], Conditioning]
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor]
    spell: Callable[[str, str], Share]
    identity: Callable[[], str]
    notes: Mapping[str, str] = field(default_factory=dict)

    def in_text(self, path: str) -> bool:
        """Whether a layer is a text encoder's."""
        return path.startswith(tuple(f"{start}." for start in self.texts))
