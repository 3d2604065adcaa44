"""A Stable Diffusion put together from a checkpoint: the networks, and what `generate` asks of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.autoencoder.banded import decode_safe, encode_safe
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.autoencoder.model import check_size
from sfumato.autoencoder.preview import has_factors, preview
from sfumato.checkpoint.rules import View
from sfumato.diffusion.guidance import ALWAYS
from sfumato.diffusion.parameterization import Parameterization, consistency
from sfumato.diffusion.path import VE
from sfumato.diffusion.schedules import NoiseLevels, beta_levels, beta_table, zero_terminal_snr
from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd.checkpoint import Checkpoint, completed, open_checkpoint
from sfumato.families.sd.condition import (
    TextFeatures,
    TextOptions,
    TextStack,
    encode_prompts,
    fit,
    micro_numbers,
    plan_of,
    size_vector,
)
from sfumato.families.sd.controls import Controller, Controls, controller, opened
from sfumato.families.sd.networks import Networks, part_hash
from sfumato.families.sd.openers import (
    check_engine,
    kept_dtype,
    offloads,
    openers,
    require_offload,
    tokenizer_of,
)
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.shapes import System as Kind
from sfumato.memory import Stage
from sfumato.nn.embed import sinusoid
from sfumato.nn.openvino import OpenVINOUNet
from sfumato.nn.unet import UNet
from sfumato.sampling.reuse import Split
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.inversion import Inversion, read_inversions
from sfumato.types import Conditioning, Micro, Request

if TYPE_CHECKING:
    from sfumato.families.sd.control_training import Trainee

PREVIEW_CELLS = 16  # of the longer side, where a preview has to be decoded
Embeddings = Iterable[str | Path] | Mapping[str, str | Path]  # files of textual inversions, perhaps by name


@dataclass(frozen=True)
class Preset:
    """What a request that leaves things open gets. interval: of sigma, where guidance acts."""

    steps: int = 25
    guidance: float = 7.0
    sampler: str = "dpmpp_2m"
    schedule: str = "karras"
    size: tuple[int, int] = (512, 512)
    interval: tuple[float, float] = ALWAYS
    rescale: float = 0.0  # of guidance: 0.7 where training ended in pure noise (Lin et al. 2023, sec. 3.4)


@dataclass(frozen=True)
class Config:
    """kind: a key of `SYSTEMS`. prediction: "epsilon" or "v". multiple: what a picture's sides are multiples of.
    consistent: it is a latent consistency model.
    """

    kind: str
    preset: Preset
    prediction: str
    zero_snr: bool
    multiple: int = 8
    consistent: bool = False


@dataclass(frozen=True)
class System:
    """Networks of one checkpoint, ready to draw.

    shapes: what the networks measure. networks: "text", "denoiser" and "autoencoder", opened when needed. dtype: in
    which the networks work; with int8 that is the U-Net's products alone. parts: the files' tensors, read when asked
    for: "vae", "unet", text encoders. sources: what a part is called in errors. tokenizers: one for each text encoder.
    inversions: textual ones, as `text.inversion.read_inversion` gives them. engine: what runs the U-Net.
    """

    config: Config
    shapes: Kind
    networks: Networks
    levels: NoiseLevels
    dtype: torch.dtype
    device: torch.device
    parts: Mapping[str, View]
    sources: Mapping[str, str]
    tokenizers: tuple[ClipTokenizer, ...] = ()
    inversions: tuple[Mapping[str, Inversion], ...] = ()
    engine: str = "torch"
    controlnets: Controls = field(default_factory=lambda: Controls({}, torch.device("cpu"), torch.float32))

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.networks["autoencoder"]

    @property
    def denoiser(self) -> UNet | OpenVINOUNet:
        return self.networks["denoiser"]

    @property
    def text(self) -> TextStack:
        return self.networks["text"]

    @property
    def kept(self) -> torch.dtype:
        """In which all works that is not in eight bits."""
        return kept_dtype(self.device, self.dtype)

    @property
    def offload(self) -> str:
        return self.networks.offload

    @property
    def offloads(self) -> tuple[str, ...]:
        """The ways to keep its networks, of `memory.OFFLOADS`."""
        return offloads(self.engine, self.dtype)

    def offloaded(self, offload: str) -> System:
        """The same system with another way to keep its networks. `InputError` unless it is one of `offloads`."""
        require_offload(offload, self.engine, self.dtype)
        networks = Networks(openers(self, self.parts, stream=offload == "sequential"), offload)
        networks.open_all()
        return replace(self, networks=networks, controlnets=replace(self.controlnets, offload=offload))

    def trace(
        self, request: Request, size: tuple[int, int], batch: int, *, encodes: bool, offload: str
    ) -> tuple[Stage, ...]:
        """The memory that each stage of drawing takes; see `trace.trace`."""
        from sfumato.families.sd.trace import trace  # which needs this module

        return trace(self, request, size, batch, encodes=encodes, offload=offload)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's tensors as the files have them, whatever precision they are drawn in."""
        return {"autoencoder": part_hash(self.parts["vae"]), "denoiser": part_hash(self.parts["unet"])}

    @property
    def embeddings(self) -> dict[str, str]:
        """Textual inversions by the names that call them, with the hashes of their files."""
        found = [next(iter(inversions.values())) for inversions in self.inversions]
        return {inversion.name: inversion.digest for inversion in found}

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the ControlNets that it has opened."""
        return tuple(self.controlnets.files)

    def control_hashes(self) -> dict[str, str]:
        """SHA-256 of the tensors of each ControlNet, by name."""
        return self.controlnets.digests()

    def with_controls(
        self, files: Mapping[str, str | os.PathLike[str]], systems: Mapping[str, Kind] | None = None
    ) -> System:
        """The same with the ControlNets in these files, by name, besides its own. Nothing is read but headers.

        `InputError` for one of another family; `CheckpointError` for what is none.
        """
        if self.engine != "torch":
            raise InputError(
                f"ControlNets go with the engine torch; {self.engine} runs the U-Net as it is",
                argument="engine",
            )
        found = opened(files, self.shapes.unet, self.config.kind, None, systems)
        files_ = {**self.controlnets.files, **found}
        return replace(self, controlnets=Controls(files_, self.device, self.dtype, self.offload))

    def control_trainee(self, blocks: int, outputs: int) -> Trainee:
        """A fresh ControlNet beside this model, as training wants it; blocks and outputs are those of the U-Net."""
        from sfumato.families.sd.control_training import Trainee

        return Trainee(self)

    def controller(self, name: str, pixels: Tensor) -> Controller:
        """What the ControlNet of that name adds at every step, shown pixels (1, 3, H, W) in [0, 1]."""
        return controller(self.controlnets[name], pixels)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of a picture in pixels."""
        vae = self.shapes.vae
        check_size(vae.factor, height, width)
        return vae.channels, frames, height // vae.factor, width // vae.factor

    @property
    def parameterization(self) -> Parameterization:
        kind = "v" if self.config.prediction == "v" else "eps"
        return Parameterization(kind, VE, self.levels.time, consistency if self.config.consistent else None)

    @property
    def clip_layers(self) -> int:
        """How deep from the end `clip_skip` may reach."""
        return min(part.config.layers for part in self.shapes.text)

    @property
    def reads(self) -> frozenset[str]:
        """What of a request `condition` reads that other systems may not: see `Model`."""
        told = {6: ("original", "crop", "target"), 5: ("original", "crop", "aesthetic")}
        micro = told.get(plan_of(self.config.kind).numbers, ())
        names = [f"micro.{prefix}{name}" for name in micro for prefix in ("", "negative_")]
        return frozenset(["prompt_rules", "weighting", *names])

    @property
    def latent_space(self) -> tuple[float, ...]:
        """What latents are of: models with equal ones can go on with each other's."""
        vae = self.shapes.vae
        return vae.latent_channels, vae.factor, vae.scaling_factor

    @property
    def told_guidance(self) -> bool:
        """Whether the U-Net is told the guidance scale, so that nothing is left to guide."""
        return self.shapes.unet.time_cond > 0

    @property
    def inpaint_channels(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """How to make what a U-Net of nine channels reads beside the noisy latent; None for the others."""
        return self._inpaint_channels if self.shapes.unet.in_channels == 9 else None

    @property
    def split(self) -> Split | None:
        """The U-Net in two parts; None where something else stands in its place."""
        return self._split if self.engine == "torch" else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) → the normalised posterior mean (B, 4, T, H/8, W/8), in bounded memory."""
        autoencoder = self.autoencoder
        return autoencoder.normalize(encode_safe(autoencoder, pixels).mode())

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents → pixels, in bounded memory; in a wider type where the weights' own overflows."""
        autoencoder = self.autoencoder
        return decode_safe(autoencoder, autoencoder.denormalize(latent.float()))

    def preview(self, latent: Tensor) -> Tensor:
        """(1, 4, T, H, W) → (1, 3, T, h, w): a look at a latent that is forming.

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

    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """2B texts, B wanted and then B to stay away from, as the family's U-Net reads them.

        Sizes: where `request.micro` does not say otherwise, the picture is uncropped and of the size that is drawn.
        """
        options = TextOptions(request.prompt_rules or "a1111", request.weighting, request.clip_skip)
        half = len(prompts) // 2
        text = self.text
        wanted, unwanted = encode_prompts(
            text, [prompt or "" for prompt in prompts[:half]], prompts[half:], options
        )
        assert unwanted is not None and request.size is not None
        vector = None
        if text.plan.numbers:
            numbers, negative = micro_numbers(text.plan.numbers, request.size, request.micro or Micro())
            vector = torch.cat([_vector(wanted, numbers), _vector(unwanted, negative)])
        tokens = torch.cat([wanted.tokens, unwanted.tokens])
        told = None
        if self.told_guidance:
            assert request.guidance is not None
            told = guidance_waves(request.guidance, self.shapes.unet.time_cond).expand(len(tokens), -1)
        return Conditioning(tokens, None, vector, told)

    def network(
        self, x: Tensor, time: Tensor, cond: Conditioning, control: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """(B, C, 1, H, W) → (B, 4, 1, H, W); the U-Net works on pictures and in the type of its weights.

        control: what ControlNets add to its skips and, the last, to its middle.
        """
        *down, middle = control or (None,)
        more = {"down_residuals": down, "mid_residual": middle} if control else {}
        out = self.denoiser(x[:, :, 0], time, cond.tokens, cond.vector, time_cond=cond.guidance, **more)
        return out[:, :, None]

    def _split(
        self, x: Tensor, time: Tensor, cond: Conditioning, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        unet = self.denoiser
        assert isinstance(unet, UNet)  # others have no `split`
        out, deep = unet.forward_with_deep(
            x[:, :, 0], time, cond.tokens, cond.vector, time_cond=cond.guidance, deep=deep
        )
        return out[:, :, None], deep

    def _inpaint_channels(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """(1, 3, 1, H, W) with 0 where to paint, (1, 1, 1, H, W) → mask and masked latent (1, 5, 1, H/8, W/8).

        A cell is painted when its first pixel is, as in diffusers, which takes nearest neighbours.
        """
        side = self.shapes.vae.factor
        cells = mask[..., ::side, ::side]
        return torch.cat([cells, self.encode(pixels)], dim=1)


def _vector(features: TextFeatures, numbers: tuple[float, ...]) -> Tensor:
    assert features.pooled is not None
    return size_vector(features.pooled, numbers)


def guidance_waves(scale: float, width: int) -> Tensor:
    """(1, width): the guidance scale as a latent consistency model is told it: sines, then cosines, of 1000 (w − 1).

    Luo et al. 2023 (2310.04378), sec. 4.3; diffusers, `get_guidance_scale_embedding`.
    """
    waves = sinusoid(torch.tensor([1000.0 * (scale - 1)]), width)
    cosines, sines = waves.chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


def open_system(
    path: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae: str | os.PathLike[str] | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    embeddings: Embeddings = (),
    parts: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
    engine: str = "torch",
    offload: str = "none",
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """The model at `path`, a single file or a diffusers folder, with weights in `dtype` on `device`.

    dtype: int8 makes the U-Net's products in eight bits, and leaves the rest in what the CPU is fast in. vae: another
    autoencoder, a file or a folder. prediction: "epsilon" or "v", over what the checkpoint says. engine: "torch", or
    what `nn.openvino.plugin` takes. embeddings: files of textual inversions, called in prompts by their names or by
    those they are given here. parts: where to take what a U-Net alone lacks, whole checkpoints or single networks.
    offload: see `Networks`; of any but "none" nothing but headers is read before it is needed, and not every one goes
    with int8 or an engine. `InputError` where this machine cannot do it.
    `CheckpointError` when it is damaged, of no known kind, or a part alone.
    """
    found = open_checkpoint(path, variant=variant, prediction=prediction, systems=systems)
    if parts:
        others = [parts] if isinstance(parts, str | os.PathLike) else parts
        found = completed(found, str(path), others, systems)
    if found.system is None or "unet" not in found.parts:
        raise CheckpointError(f"{path} is {found.kind} alone; to draw, give a whole checkpoint")
    return build(found, str(path), device, dtype, vae, embeddings, engine, offload, systems)


def build(
    found: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None = None,
    embeddings: Embeddings = (),
    engine: str = "torch",
    offload: str = "none",
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """Networks of an opened checkpoint. `name` stands for it in errors."""
    check_engine(engine, device, dtype)
    require_offload(offload, engine, dtype)
    kind = found.system
    assert kind is not None
    lacking = [part for part in ("vae", *(t.name for t in kind.text)) if part not in found.parts]
    if vae is not None and "vae" in lacking:
        lacking.remove("vae")
    if lacking:
        raise CheckpointError(
            f"{name} holds no {' and no '.join(lacking)}; give a whole checkpoint"
            + (", or the autoencoder with --vae" if lacking == ["vae"] else "")
            + (", or one to take them from with --parts" if found.alone else "")
        )
    inversions = tuple(read_inversions(embeddings).values())  # before gigabytes, should one be no such file
    plan = plan_of(found.kind)
    tokenizers = tuple(tokenizer_of(found.folder, reader) for reader in plan.readers)
    fit(plan, [part.config for part in kind.text], tokenizers, inversions)
    parts = dict(found.parts)
    said: Mapping[str, Any] = found.configs.get("vae", {})
    sources = {part: f"{name} ({part})" for part in parts}
    if vae is not None:
        other = open_checkpoint(vae, systems=systems)
        if "vae" not in other.parts:
            raise InputError(f"{vae} holds no autoencoder", argument="vae")
        parts["vae"], said, sources["vae"] = other.parts["vae"], other.configs.get("vae", {}), str(vae)
    if said:  # a folder's own numbers, with the preview that no file has
        kind = replace(kind, vae=replace(KLConfig.from_diffusers(dict(said)), preview=kind.vae.preview))
    betas = beta_table()
    levels = beta_levels(zero_terminal_snr(betas) if found.zero_snr else betas)
    config = Config(
        found.kind, preset_of(found), found.prediction, found.zero_snr, kind.vae.factor, consistent(found)
    )
    texts = tokenizers, inversions
    unopened = System(config, kind, Networks({}), levels, dtype, device, parts, sources, *texts, engine)
    return unopened.offloaded(offload)


def consistent(found: Checkpoint) -> bool:
    """Whether it is a latent consistency model: its U-Net is told the guidance, or its scheduler is made for one."""
    said = found.configs.get("scheduler", {}).get("_class_name")
    return found.kind.endswith("-lcm") or said == "LCMScheduler"


def preset_of(found: Checkpoint) -> Preset:
    """How a checkpoint draws when the user says nothing: its family's custom, and what its scheduler's JSON tells."""
    kind = found.system
    assert kind is not None
    side = 512 if found.kind.startswith("sd2") and found.prediction == "epsilon" else kind.size
    preset = Preset(size=(side, side))
    if found.kind.startswith("sdxl"):
        preset = replace(preset, guidance=5.0)
    said, cells = found.configs.get("scheduler", {}), found.configs.get("unet", {}).get("sample_size")
    if isinstance(cells, int) and 0 < cells <= 256:  # distilled ones may draw smaller than their parents
        preset = replace(preset, size=(cells * kind.vae.factor,) * 2)
    if consistent(found):  # what its makers draw with, where it is told the guidance
        guidance = 8.0 if kind.unet.time_cond else 1.0
        return replace(preset, steps=4, guidance=guidance, sampler="lcm", schedule="lcm")
    if found.zero_snr:
        return replace(preset, sampler="euler", schedule="trailing", rescale=0.7)
    if said.get("timestep_spacing") == "trailing":  # the distilled ones, which draw in one to four steps
        sampler = "euler_a" if "Ancestral" in said.get("_class_name", "") else "euler"
        return replace(preset, steps=1, guidance=1.0, sampler=sampler, schedule="trailing")
    return preset
