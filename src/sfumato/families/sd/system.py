"""A Stable Diffusion put together from a checkpoint: the networks, and what `generate` asks of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoder.banded import decode_safe, encode_safe
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.autoencoder.model import check_size
from sfumato.autoencoder.preview import preview
from sfumato.checkpoint.fill import fill_layers
from sfumato.checkpoint.rules import View
from sfumato.diffusion.guidance import ALWAYS
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import VE
from sfumato.diffusion.schedules import NoiseLevels, beta_levels, beta_table, zero_terminal_snr
from sfumato.errors import CheckpointError, InputError
from sfumato.families.sd.checkpoint import Checkpoint, open_checkpoint
from sfumato.families.sd.condition import (
    NEGATIVE_AESTHETIC,
    PLANS,
    TextFeatures,
    TextOptions,
    TextStack,
    encode_prompts,
    score_numbers,
    size_numbers,
    size_vector,
)
from sfumato.families.sd.networks import Networks, part_hash
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.shapes import System as Kind
from sfumato.memory import Stage
from sfumato.nn.embed import sinusoid
from sfumato.nn.unet import UNet
from sfumato.text.clip import load_encoder
from sfumato.types import Conditioning, Request


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
    """kind: a key of `SYSTEMS`. prediction: "epsilon" or "v". multiple: what a picture's sides are multiples of."""

    kind: str
    preset: Preset
    prediction: str
    zero_snr: bool
    multiple: int = 8


@dataclass(frozen=True)
class System:
    """Networks of one checkpoint, ready to draw.

    shapes: what the networks measure. networks: "text", "denoiser" and "autoencoder", opened when needed. dtype: of the
    weights, in which the networks work. parts: the files' tensors, read when asked for: "vae", "unet", text encoders.
    sources: what a part is called in errors.
    """

    config: Config
    shapes: Kind
    networks: Networks
    levels: NoiseLevels
    dtype: torch.dtype
    device: torch.device
    parts: Mapping[str, View]
    sources: Mapping[str, str]

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.networks["autoencoder"]

    @property
    def denoiser(self) -> UNet:
        return self.networks["denoiser"]

    @property
    def text(self) -> TextStack:
        return self.networks["text"]

    @property
    def offload(self) -> str:
        return self.networks.offload

    def offloaded(self, offload: str) -> System:
        """The same system with another way to keep its networks: a name of `memory.OFFLOADS`."""
        networks = Networks(openers(self, self.parts, stream=offload == "sequential"), offload)
        networks.open_all()
        return replace(self, networks=networks)

    def trace(
        self, request: Request, size: tuple[int, int], batch: int, *, encodes: bool, offload: str
    ) -> tuple[Stage, ...]:
        """The memory that each stage of drawing takes; see `trace.trace`."""
        from sfumato.families.sd.trace import trace  # which needs this module

        return trace(self, request, size, batch, encodes=encodes, offload=offload)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's tensors as the files have them, whatever precision they are drawn in."""
        return {"autoencoder": part_hash(self.parts["vae"]), "denoiser": part_hash(self.parts["unet"])}

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of a picture in pixels."""
        vae = self.shapes.vae
        check_size(vae.factor, height, width)
        return vae.channels, frames, height // vae.factor, width // vae.factor

    @property
    def parameterization(self) -> Parameterization:
        kind = "v" if self.config.prediction == "v" else "eps"
        return Parameterization(kind, VE, self.levels.time)

    @property
    def clip_layers(self) -> int:
        """How deep from the end `clip_skip` may reach."""
        return min(part.config.layers for part in self.shapes.text)

    @property
    def told_guidance(self) -> bool:
        """Whether the U-Net is told the guidance scale, so that nothing is left to guide."""
        return self.shapes.unet.time_cond > 0

    @property
    def inpaint_channels(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """How to make what a U-Net of nine channels reads beside the noisy latent; None for the others."""
        return self._inpaint_channels if self.shapes.unet.in_channels == 9 else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) → the normalised posterior mean (B, 4, T, H/8, W/8), in bounded memory."""
        autoencoder = self.autoencoder
        return autoencoder.normalize(encode_safe(autoencoder, pixels).mode())

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents → pixels, in bounded memory; in a wider type where the weights' own overflows."""
        autoencoder = self.autoencoder
        return decode_safe(autoencoder, autoencoder.denormalize(latent.float()))

    def preview(self, latent: Tensor) -> Tensor:
        """(1, 4, T, H, W) → (1, 3, T, H, W) pixels of one cell each: a linear look at a latent that is forming."""
        return preview(self.shapes.vae, latent)

    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """2B texts, B wanted and then B to stay away from, as the family's U-Net reads them.

        Sizes: the picture is told to be uncropped and of the size that is drawn.
        """
        options = TextOptions(clip_skip=request.clip_skip)
        half = len(prompts) // 2
        text = self.text
        wanted, unwanted = encode_prompts(
            text, [prompt or "" for prompt in prompts[:half]], prompts[half:], options
        )
        assert unwanted is not None and request.size is not None
        width, height = request.size
        size = (height, width)
        vector = None
        if text.plan.numbers == 6:
            numbers = size_numbers(size)
            vector = torch.cat([_vector(wanted, numbers), _vector(unwanted, numbers)])
        elif text.plan.numbers == 5:
            vector = torch.cat(
                [
                    _vector(wanted, score_numbers(size)),
                    _vector(unwanted, score_numbers(size, aesthetic=NEGATIVE_AESTHETIC)),
                ]
            )
        tokens = torch.cat([wanted.tokens, unwanted.tokens])
        told = None
        if self.told_guidance:
            assert request.guidance is not None
            told = guidance_waves(request.guidance, self.shapes.unet.time_cond).expand(len(tokens), -1)
        return Conditioning(tokens, None, vector, told)

    def network(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """(B, C, 1, H, W) → (B, 4, 1, H, W); the U-Net works on pictures and in the type of its weights."""
        out = self.denoiser(x[:, :, 0], time, cond.tokens, cond.vector, time_cond=cond.guidance)
        return out[:, :, None]

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
    offload: str = "none",
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """The model at `path`, a single file or a diffusers folder, with weights in `dtype` on `device`.

    vae: another autoencoder, a file or a folder. prediction: "epsilon" or "v", over what the checkpoint says. offload:
    see `Networks`; of any but "none" nothing but headers is read before it is needed.
    `CheckpointError` when it is damaged, of no known kind, or a part alone.
    """
    found = open_checkpoint(path, variant=variant, prediction=prediction, systems=systems)
    if found.system is None or "unet" not in found.parts:
        raise CheckpointError(f"{path} is {found.kind} alone; to draw, give a whole checkpoint")
    return build(found, str(path), device, dtype, vae, offload, systems)


def build(
    found: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None = None,
    offload: str = "none",
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """Networks of an opened checkpoint. `name` stands for it in errors."""
    kind = found.system
    assert kind is not None
    lacking = [part for part in ("vae", *(t.name for t in kind.text)) if part not in found.parts]
    if vae is not None and "vae" in lacking:
        lacking.remove("vae")
    if lacking:
        raise CheckpointError(
            f"{name} holds no {' and no '.join(lacking)}; give a whole checkpoint"
            + (", or the autoencoder with --vae" if lacking == ["vae"] else "")
        )
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
    config = Config(found.kind, preset_of(found), found.prediction, found.zero_snr, kind.vae.factor)
    unopened = System(config, kind, Networks({}), levels, dtype, device, parts, sources)
    return unopened.offloaded(offload)


def openers(
    system: System, parts: Mapping[str, Mapping[str, Tensor]], *, stream: bool
) -> dict[str, Callable[[], Any]]:
    """How each network of a system is made from the tensors of its part, in the order in which drawing needs them."""
    shapes, sources, form = system.shapes, system.sources, (system.dtype, system.device)

    def text() -> TextStack:
        encoders = tuple(
            load_encoder(part.config, parts[part.name], system.dtype, sources[part.name], system.device)
            for part in shapes.text
        )
        return TextStack(PLANS[plan_of(system.config.kind)], encoders)

    def denoiser() -> UNet:
        with torch.device("meta"):
            unet = UNet(shapes.unet)
        fill_layers(unet, parts["unet"], sources["unet"], *form, pack=True, stream=stream)
        return unet.eval().requires_grad_(False)

    def autoencoder() -> AutoencoderKL:
        with torch.device("meta"):
            model = AutoencoderKL(shapes.vae)
        fill_layers(model, parts["vae"], sources["vae"], *form)
        return model.eval().requires_grad_(False)

    return {"text": text, "denoiser": denoiser, "autoencoder": autoencoder}


def plan_of(kind: str) -> str:
    """The text plan of a kind: "sdxl-inpaint" reads prompts as "sdxl" does."""
    return kind if kind in PLANS else kind.split("-")[0]


def preset_of(found: Checkpoint) -> Preset:
    """How a checkpoint draws when the user says nothing: its family's custom, and what its scheduler's JSON tells."""
    kind = found.system
    assert kind is not None
    side = 512 if found.kind.startswith("sd2") and found.prediction == "epsilon" else kind.size
    preset = Preset(size=(side, side))
    if found.kind.startswith("sdxl"):
        preset = replace(preset, guidance=5.0)
    said = found.configs.get("scheduler", {})
    if found.kind.endswith("-lcm") or said.get("_class_name") == "LCMScheduler":
        return replace(preset, steps=4, guidance=1.0, sampler="lcm", schedule="trailing")
    if found.zero_snr:
        return replace(preset, sampler="euler", schedule="trailing", rescale=0.7)
    if said.get("timestep_spacing") == "trailing":  # the distilled ones, which draw in one to four steps
        return replace(preset, steps=1, guidance=1.0, sampler="euler_a", schedule="trailing")
    return preset
