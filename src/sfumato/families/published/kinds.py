"""What the shared rooms ask of a family of published checkpoints: tables and functions, and no name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.detect import Signature
from sfumato.checkpoint.rules import KeyMap
from sfumato.nn.mmdit import MMDiTConfig
from sfumato.nn.spacetime import SpaceTimeConfig
from sfumato.nn.unet import UNetConfig
from sfumato.text.clip import ClipConfig
from sfumato.text.t5 import T5Config
from sfumato.text.vision import ClipVisionConfig

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.families.published.checkpoint import Checkpoint

DenoiserConfig = UNetConfig | MMDiTConfig | SpaceTimeConfig
TextConfig = ClipConfig | T5Config | ClipVisionConfig  # of what reads the prompt, or the picture in its place


@dataclass(frozen=True)
class TextPart:
    """The place of an encoder of prompts, texts or pictures. name: of the part, and of its diffusers folder. prefixes:
    in a single file; the first is the one written. open_clip: a single file keeps it in open_clip's layout, else in
    transformers'.
    """

    name: str
    config: TextConfig
    prefixes: tuple[str, ...]
    open_clip: bool = False


class Kind(Protocol):
    """A kind of checkpoint: its networks, and the pixels per side that it was trained on."""

    @property
    def denoiser(self) -> DenoiserConfig: ...
    @property
    def vae(self) -> KLConfig: ...
    @property
    def text(self) -> tuple[TextPart, ...]: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class Family:
    """One family. `open_checkpoint` and the writers take what they need from it.

    name: of its folder here. denoiser: the part's and the folder's name of the network that draws; called: that
    network in messages. systems: kind to its networks. predictions: what the network may answer, the usual first.

    signatures(systems): the marks of its denoisers, alone and in whole files.
    prefixes(kind, names), file_map(kind, places, names), folder_map(kind, part, names): the tables of names; `names`
        are those of a file, or None for what is written.
    denoiser_map(config): the denoiser's original names to ours.
    settled(checkpoint, source): the checkpoint, once what its tensors and its scheduler's JSON (`configs`) say is read.
    unsayable(checkpoint): why a single file cannot say what it is, or "". markers(checkpoint): tensors that say it, and
        what else readers of such a file expect beside its parts.
    denoiser_config, scheduler_config, model_index(checkpoint): the JSON of a diffusers folder.
    pads(kind): of each part whose tokenizer comes with the package, the id that pads (see `ClipTokenizer`).
    same_tensors: kinds that no tensor tells apart, to the one that their files are taken for.
    """

    name: str
    denoiser: str
    called: str
    systems: Mapping[str, Any]
    predictions: tuple[str, ...]
    signatures: Callable[[Mapping[str, Any]], Sequence[Signature]]
    prefixes: Callable[[Any, Iterable[str] | None], dict[str, str]]
    file_map: Callable[[Any, Mapping[str, str], Collection[str] | None], KeyMap]
    folder_map: Callable[[Any, str, Collection[str]], KeyMap]
    denoiser_map: Callable[[Any], KeyMap]
    settled: Callable[[Checkpoint, str], Checkpoint]
    unsayable: Callable[[Checkpoint], str]
    markers: Callable[[Checkpoint], Mapping[str, Tensor]]
    denoiser_config: Callable[[Checkpoint], dict[str, Any]]
    scheduler_config: Callable[[Checkpoint], dict[str, Any]]
    model_index: Callable[[Checkpoint, str], dict[str, Any]]
    pads: Callable[[str], Mapping[str, int | None]]
    same_tensors: Mapping[str, str]
