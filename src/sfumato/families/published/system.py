"""A system of a published checkpoint: what all families' have in common of what `generate` asks of a model."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.adapters.fold import Adapters, Touched
from sfumato.autoencoder import framed
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.autoencoder.model import PIXEL_CHANNELS, check_size
from sfumato.autoencoder.preview import has_factors, preview
from sfumato.autoencoder.safe import decode_safe, encode_safe
from sfumato.autoencoder.temporal import TemporalAutoencoderKL
from sfumato.checkpoint.rules import View
from sfumato.diffusion.guidance import ALWAYS
from sfumato.diffusion.schedules import NoiseLevels
from sfumato.errors import CheckpointError, InputError
from sfumato.families.control import require_control
from sfumato.families.lora import TITLES, mark_of
from sfumato.families.published.adapters import adapters_of
from sfumato.families.published.checkpoint import (
    Checkpoint,
    Families,
    completed,
    open_checkpoint,
    same_latents,
)
from sfumato.families.published.controls import ControlFile, Controller, Controls, Stand
from sfumato.families.published.kinds import Family
from sfumato.families.published.networks import Networks, part_hash
from sfumato.families.published.openers import kept_dtype, offloads, require_offload
from sfumato.families.published.signatures import VAES
from sfumato.families.system import DrawingSystem
from sfumato.memory import Stage
from sfumato.text.inversion import Inversion

PREVIEW_CELLS = 16  # of the longer side, where a preview has to be decoded
Place = str | os.PathLike[str]
Embeddings = Iterable[Place] | Mapping[str, Place]  # files of textual inversions, perhaps by name


@dataclass(frozen=True)
class Preset:
    """What a request that leaves things open gets. interval: of sigma, where guidance acts. frames: more than 1 of a
    model of clips; fps, guidance_first: of those, and `guidance` is then that of the last frame. refine_at: where a
    refiner takes over.
    """

    steps: int
    guidance: float
    sampler: str
    schedule: str
    size: tuple[int, int]
    interval: tuple[float, float] = ALWAYS
    rescale: float = 0.0  # of guidance: 0.7 where training ended in pure noise (Lin et al. 2023, sec. 3.4)
    frames: int = 1
    fps: float | None = None
    guidance_first: float | None = None
    refine_at: float = (
        0.8  # of the noise levels: a refiner's share is the last fifth (Podell et al. 2023, sec. 2.5)
    )


@dataclass(frozen=True, kw_only=True)
class PublishedSystem(DrawingSystem):
    """Networks of one checkpoint, ready to draw.

    config: with `kind`, `preset` and `multiple`. shapes: what the networks measure. networks: "denoiser",
    "autoencoder" and those of `texts`, opened when needed. dtype: in which the networks work; with int8 that is the
    denoiser's products alone. parts: the files' tensors, read when asked for. sources: what a part is called in errors.
    engine: what runs the denoiser. inversions: textual ones, as `text.inversion.read_inversion` gives them. loras:
    those opened for it, and its parts with what they add. controlnets: those opened beside it.
    """

    config: Any
    shapes: Any
    networks: Networks
    levels: NoiseLevels
    dtype: torch.dtype
    device: torch.device
    parts: Mapping[str, View]
    sources: Mapping[str, str]
    engine: str = "torch"
    inversions: tuple[Mapping[str, Inversion], ...] = ()
    loras: Adapters | None = None
    controlnets: Controls = field(default_factory=lambda: Controls({}, torch.device("cpu"), torch.float32))

    family: ClassVar[Family]
    traces: ClassVar[bool] = True
    controls_encoded: ClassVar[bool] = False  # ControlNets read latents of their pictures

    @abstractmethod
    def openers(
        self, parts: Mapping[str, Mapping[str, Tensor]], *, keep: int | None
    ) -> dict[str, Callable[[], Any]]:
        """How each network is made from the tensors of its part, in the order in which drawing needs them.

        keep: bytes of the denoiser's layers that stay in memory, the others being read whenever they are called, as
        those of other large networks are; None keeps all.
        """

    @property
    @abstractmethod
    def texts(self) -> tuple[str, ...]:
        """Names of the networks that read prompts."""

    @abstractmethod
    def renewers(
        self, parts: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Callable[[Any, Touched], bool]]:
        """How each network takes over tensors of its parts that have changed; False where it must be opened again."""

    @property
    def part(self) -> str:
        """The denoiser's name, of `parts`."""
        return self.family.denoiser

    # --- adapters --------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Adapters:
        """The LoRAs opened for it. Text encoders that are not read take none."""
        if self.loras is not None:
            return self.loras
        read = {name: self.parts[name] for name in (self.part, "vae", *self.text_parts)}
        return adapters_of(self.family, self.config.kind, self.shapes, read, lambda touched: None)

    @property
    def drawn_from(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the networks are made from: the tensors of `parts`, and what adapters add to them."""
        return self.adapters.parts

    @property
    def added(self) -> int:
        """Bytes of what adapters add, which stay in memory beside the networks."""
        return self.adapters.size

    @property
    def embeddings(self) -> dict[str, str]:
        """Textual inversions by the names that call them, with the hashes of their files."""
        found = [next(iter(inversions.values())) for inversions in self.inversions]
        return {inversion.name: inversion.digest for inversion in found}

    # --- ControlNets -----------------------------------------------------------------------------------------------

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the ControlNets that it has opened."""
        return tuple(self.controlnets.files)

    def control_hashes(self) -> dict[str, str]:
        """SHA-256 of the tensors of each ControlNet, by name."""
        return self.controlnets.digests()

    def control_file(self, path: Place, systems: Mapping[str, Any] | None) -> ControlFile:
        """The ControlNet in a file or folder, for this model; only headers are read. systems: instead of the family's.

        `InputError` for one of another family, and of a family that takes none; `CheckpointError` for what is none.
        """
        raise InputError(f"{self.config.kind} takes no ControlNets", argument="controlnets")

    def with_controls(self, files: Mapping[str, Place], systems: Mapping[str, Any] | None = None) -> Self:
        """The same with the ControlNets in these files, by name, besides its own. Errors of `control_file`."""
        if self.engine != "torch":
            raise InputError(
                f"ControlNets go with the engine torch; {self.engine} runs {self.family.called} as it is",
                argument="engine",
            )
        if self.family.naming is not None:
            for path in files.values():
                require_control(Path(path), self.family.name, TITLES[mark_of(self.config.kind)])
        found = {name: self.control_file(path, systems) for name, path in files.items()}
        known = Controls({**self.controlnets.files, **found}, self.device, self.dtype, self.offload)
        return replace(self, controlnets=known)

    @abstractmethod
    def shown(self, name: str, pixels: Tensor, mask: Tensor | None) -> Tensor:
        """What the ControlNet of that name reads of pixels (1, 3, H, W) in [0, 1]; mask: as of `controller`."""

    @abstractmethod
    def control(self, name: str, network: Any, shown: Tensor) -> Controller:
        """What a ControlNet's network adds at every step. shown: of `shown`, or a tensor of its form."""

    def controller(self, name: str, pixels: Tensor, mask: Tensor | None = None) -> Controller:
        """What the ControlNet of that name adds at every step, shown pixels (1, 3, H, W) in [0, 1].

        mask: (1, 1, H, W), 1 where to paint, for those of `masked_controls`; None is everywhere.
        """
        shown = self.shown(name, pixels, mask)
        return self.control(name, self.controlnets[name], shown)

    def control_openers(
        self, names: Iterable[str], stand: Stand, *, keep: int | None
    ) -> dict[str, Callable[[], Callable[[Tensor], Controller]]]:
        """How each ControlNet of these names is opened: to what it adds, given a tensor of the form of `shown`.

        stand: makes what stands for the tensors of its file.
        """

        def opener(name: str) -> Callable[[], Callable[[Tensor], Controller]]:
            ghost = self.controlnets.files[name].with_tensors(stand)
            return lambda: partial(self.control, name, ghost.network(self.device, self.dtype, keep=keep))

        return {name: opener(name) for name in names if name in self.controlnets.files}

    def shown_shape(self, name: str, height: int, width: int) -> tuple[int, ...]:
        """Of what `shown` gives for a picture of that size in pixels."""
        return 1, PIXEL_CHANNELS, height, width

    # --- networks --------------------------------------------------------------------------------------------------

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.networks["autoencoder"]

    @property
    def denoiser(self) -> Any:
        return self.networks["denoiser"]

    @property
    def called(self) -> str:
        return self.family.called.removeprefix("a ")

    @property
    def kept(self) -> torch.dtype:
        """In which all works that is not in eight bits."""
        return kept_dtype(self.device, self.dtype)

    @property
    def offload(self) -> str:
        return self.networks.offload

    @property
    def built_from(self) -> Any:
        return self.shapes

    @property
    def rescale(self) -> float:
        return self.config.preset.rescale

    @property
    def clip_preset(self) -> dict[str, Any]:
        """Of a model of clips, what a request leaves open."""
        preset = self.config.preset
        if preset.frames <= 1:
            return {}
        known = {"frames": preset.frames, "fps": preset.fps, "guidance_first": preset.guidance_first}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def offloads(self) -> tuple[str, ...]:
        """The ways to keep its networks, of `memory.OFFLOADS`."""
        return offloads(self.engine, self.dtype)

    def offloaded(self, offload: str, keep: int = 0) -> Self:
        """The same system with another way to keep its networks. `InputError` unless it is one of `offloads`.

        keep: bytes of the denoiser's layers that "sequential" keeps in memory all the same.
        """
        require_offload(offload, self.engine, self.dtype)
        held: list[Networks] = []
        loras = self.adapters.moved(lambda touched: held[0].renew(touched) if held else None)
        make = self.openers(loras.parts, keep=keep if offload == "sequential" else None)
        held.append(Networks(make, offload, self.renewers(loras.parts)))
        held[0].open_all()
        controlnets = replace(self.controlnets, offload=offload)
        return replace(self, networks=held[0], loras=loras, controlnets=controlnets)

    def trace(
        self, request: Any, size: tuple[int, int], batch: int, *, encodes: bool, offload: str, keep: int = 0
    ) -> tuple[Stage, ...]:
        """The memory that each stage of drawing takes; see `trace.trace`."""
        from sfumato.families.published.trace import trace  # which needs this module

        return trace(self, request, size, batch, encodes=encodes, offload=offload, keep=keep)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's tensors as the files have them, whatever precision they are drawn in."""
        read = {"autoencoder": "vae", "denoiser": self.part} | {name: name for name in self.text_parts}
        return {network: part_hash(self.parts[part]) for network, part in read.items()}

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The text encoders that are read."""
        return tuple(part.name for part in self.shapes.text)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of a picture in pixels."""
        vae = self.shapes.vae
        check_size(vae.factor, height, width)
        return vae.channels, frames, height // vae.factor, width // vae.factor

    @property
    def latent_space(self) -> tuple[float, ...]:
        """What latents are of: models with equal ones can go on with each other's."""
        vae = self.shapes.vae
        return vae.latent_channels, vae.factor, vae.scaling_factor, vae.shift_factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) → the normalised posterior mean (B, C, T, H/8, W/8), in bounded memory."""
        autoencoder = self.autoencoder
        return autoencoder.normalize(encode_safe(autoencoder, pixels).mode())

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents → pixels, in bounded memory; in a wider type where the weights' own overflows."""
        autoencoder = self.autoencoder
        return decoded(autoencoder, autoencoder.denormalize(latent.float()))

    def preview(self, latent: Tensor) -> Tensor:
        """(1, C, T, H, W) → (1, 3, T, h, w): a look at a latent that is forming.

        One pixel for each cell where the colours of this autoencoder's latents are known; else the latent shrunk to
        16 cells and decoded, at the cost of a picture of 128².
        """
        if has_factors(self.shapes.vae):
            return preview(self.shapes.vae, latent)
        height, width = latent.shape[-2:]
        shrink = max(height, width) / PREVIEW_CELLS
        if shrink > 1:
            size = max(round(height / shrink), 1), max(round(width / shrink), 1)
            latent = F.interpolate(latent[:, :, 0], size, mode="area")[:, :, None]
        return self.decode(latent)


def decoded(autoencoder: AutoencoderKL | TemporalAutoencoderKL, latent: Tensor) -> Tensor:
    """Pixels of a latent as the autoencoder has it, in bounded memory; in a wider type where its own overflows."""
    if isinstance(autoencoder, TemporalAutoencoderKL):
        return framed.decode_safe(autoencoder, latent)
    return decode_safe(autoencoder, latent)


def opened(
    path: Place,
    families: Families,
    *,
    variant: str | None = None,
    prediction: str | None = None,
    parts: Place | Iterable[Place] = (),
) -> Checkpoint:
    """The checkpoint to draw with. parts: where to take what a denoiser alone lacks, whole checkpoints or single
    networks. `CheckpointError` when it is damaged, of no known kind, or holds no denoiser.
    """
    found = open_checkpoint(path, families, variant=variant, prediction=prediction)
    if parts:
        others = [parts] if isinstance(parts, str | os.PathLike) else parts
        found = completed(found, str(path), others, families)
    if not found.draws:
        raise CheckpointError(f"{path} is {found.kind} alone; to draw, give a whole checkpoint")
    return found


@dataclass(frozen=True)
class Ready:
    """Parts of a checkpoint that can be drawn with, what each is called in errors, and what its networks measure."""

    parts: Mapping[str, View]
    sources: Mapping[str, str]
    shapes: Any


def ready(found: Checkpoint, name: str, texts: Iterable[str], vae: Place | None, families: Families) -> Ready:
    """The parts of an opened checkpoint, with another autoencoder if one is given.

    name: stands for the checkpoint in errors. texts: the text encoders that it must have. `CheckpointError` that says
    what it lacks.
    """
    kind = found.system
    lacking = [part for part in ("vae", *texts) if part not in found.parts]
    if vae is not None and "vae" in lacking:
        lacking.remove("vae")
    if lacking:
        raise CheckpointError(
            f"{name} holds no {' and no '.join(lacking)}; give a whole checkpoint"
            + (", or the autoencoder with --vae" if lacking == ["vae"] else "")
            + (
                ", or one to take them from with --parts"
                if found.family and set(found.parts) == {found.family.denoiser}
                else ""
            )
        )
    parts = dict(found.parts)
    said: Mapping[str, Any] = found.configs.get("vae", {})
    sources = {part: f"{name} ({part})" for part in parts}
    if vae is not None:
        other = open_checkpoint(vae, families)
        if "vae" not in other.parts:
            raise InputError(f"{vae} holds no autoencoder", argument="vae")
        if other.kind in VAES and not same_latents(other.kind, kind):
            raise InputError(
                f"{vae} is {other.kind}, an autoencoder of other latents than {name} has", argument="vae"
            )
        parts["vae"], said, sources["vae"] = other.parts["vae"], other.configs.get("vae", {}), str(vae)
        theirs = VAES[other.kind] if other.system is None else other.system.vae
        form = {name: getattr(theirs, name) for name in ("temporal", "use_post_quant_conv")}
        kind = replace(kind, vae=replace(kind.vae, **form))
    if said:  # a folder's own numbers, with the preview that no file has
        kind = replace(kind, vae=replace(KLConfig.from_diffusers(dict(said)), preview=kind.vae.preview))
    return Ready(parts, sources, kind)
