"""What the shared rooms ask of a family of published checkpoints: tables and functions, and no name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.detect import Signature
from sfumato.checkpoint.rules import Drop, KeyMap, within
from sfumato.families.published import keys
from sfumato.families.published.adapters import Naming
from sfumato.text.clip import ClipConfig
from sfumato.text.t5 import T5Config
from sfumato.text.vision import ClipVisionConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sfumato.families.published.checkpoint import Checkpoint

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


@dataclass(frozen=True)
class Network:
    """How a network is made. build(config): with fresh weights. kept: parts of names of layers that stay as they are
    where the others are in eight bits.
    """

    build: Callable[[Any], nn.Module]
    kept: tuple[str, ...] = ()


class Kind(Protocol):
    """A kind of checkpoint: its networks, and the pixels per side that it was trained on."""

    @property
    def denoiser(self) -> Any: ...  # its class is one of `Family.networks`
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
    networks: of its denoisers and ControlNets, by the classes of their configurations.

    signatures(systems): the marks of its denoisers, alone and in whole files.
    denoiser_map(config): the denoiser's original names to ours. extras: what single files hold beside their networks.
    settled(checkpoint, source): the checkpoint, once what its tensors and its scheduler's JSON (`configs`) say is read.
    unsayable(checkpoint): why a single file cannot say what it is, or "". markers(checkpoint): tensors that say it, and
        what else readers of such a file expect beside its parts.
    denoiser_config, scheduler_config, model_index(checkpoint): the JSON of a diffusers folder.
    pads(kind): of each part whose tokenizer comes with the package, the id that pads (see `ClipTokenizer`).
    same_tensors: kinds that no tensor tells apart, to the one that their files are taken for.
    naming: what its denoiser is called in adapters' files; None of one that takes none.
    vae_file_map(config, names): the autoencoder's names in a single file to ours, prefixes and all, where they are not
        those of `keys.vae_map` under one prefix.
    notes(checkpoint): what a single file's header says of it that no tensor can.
    control_title(shapes, metadata): what the models are called that a ControlNet is for, by its file's header; "" where
        it is none of the family's.
    """

    name: str
    denoiser: str
    called: str
    systems: Mapping[str, Any]
    predictions: tuple[str, ...]
    networks: Mapping[type, Network]
    signatures: Callable[[Mapping[str, Any]], Sequence[Signature]]
    denoiser_map: Callable[[Any], KeyMap]
    extras: tuple[Drop, ...]
    settled: Callable[[Checkpoint, str], Checkpoint]
    unsayable: Callable[[Checkpoint], str]
    markers: Callable[[Checkpoint], Mapping[str, Tensor]]
    denoiser_config: Callable[[Checkpoint], dict[str, Any]]
    scheduler_config: Callable[[Checkpoint], dict[str, Any]]
    model_index: Callable[[Checkpoint, str], dict[str, Any]]
    pads: Callable[[str], Mapping[str, int | None]]
    same_tensors: Mapping[str, str]
    naming: Naming | None
    vae_file_map: Callable[[KLConfig, Collection[str] | None], KeyMap] | None = None
    notes: Callable[[Checkpoint], Mapping[str, str]] = lambda found: {}
    control_title: Callable[[Mapping[str, Sequence[int]], Mapping[str, str]], str] = lambda shapes, metadata: (
        ""
    )

    def prefixes(self, kind: Kind, names: Iterable[str] | None = None) -> dict[str, str]:
        """Part to its prefix in a single file: of those that `names` hold; without names, of all as we write them."""
        return keys.prefixes(kind, self.denoiser, names)

    def file_map(
        self, kind: Kind, places: Mapping[str, str] | None = None, names: Collection[str] | None = None
    ) -> KeyMap:
        """The whole of a single file to ours, a part's names under `vae.`, `text_encoder.` and so on.

        places: the parts that a file has and their prefixes, from `prefixes`; None is the complete file as we write it.
        names: all of the file's, None to write one. What real files hold beside their networks is dropped by name.
        """
        places = self.prefixes(kind) if places is None else places
        if self.vae_file_map is None or "vae" not in places:
            return keys.file_map(kind, self._denoiser(kind), places, self.extras, names)
        others = {part: prefix for part, prefix in places.items() if part != "vae"}
        vae = self.vae_file_map(kind.vae, names)
        whole = keys.file_map(kind, self._denoiser(kind), others, self.extras, names)
        return whole | KeyMap(within("", "vae.", vae.rules), vae.drops)

    def folder_map(self, kind: Kind, part: str, names: Collection[str]) -> KeyMap:
        """A part's names in a diffusers folder to ours: the same, save for older spellings, twins and buffers."""
        return keys.folder_map(kind, self._denoiser(kind), part, names)

    def _denoiser(self, kind: Kind) -> tuple[str, KeyMap]:
        return self.denoiser, self.denoiser_map(kind.denoiser)
