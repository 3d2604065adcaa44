"""A Stable Diffusion put together from a checkpoint: the networks, and what `generate` asks of a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoder.banded import decode_safe, encode_safe
from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.autoencoder.preview import preview
from sfumato.checkpoint.fill import fill
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
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.shapes import System as Kind
from sfumato.nn.embed import sinusoid
from sfumato.nn.openvino import PRECISIONS, OpenVINOUNet, plugin
from sfumato.nn.packed import pack
from sfumato.nn.quantized import quantize, require_eight_bits
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import fast_dtype
from sfumato.storage import tensors_hash
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
    """Networks of one checkpoint, ready to draw. sources: the files' tensors of `autoencoder` and `denoiser`, read when
    asked for. dtype: in which the networks work; with int8 that is the U-Net's products alone. engine: what runs it.
    """

    config: Config
    autoencoder: AutoencoderKL
    denoiser: UNet | OpenVINOUNet
    text: TextStack
    levels: NoiseLevels
    sources: Mapping[str, Mapping[str, Tensor]]
    dtype: torch.dtype
    engine: str = "torch"

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's tensors as the files have them, whatever precision they are drawn in."""
        return {name: tensors_hash(tensors) for name, tensors in self.sources.items()}

    @property
    def parameterization(self) -> Parameterization:
        kind = "v" if self.config.prediction == "v" else "eps"
        return Parameterization(kind, VE, self.levels.time)

    @property
    def clip_layers(self) -> int:
        """How deep from the end `clip_skip` may reach."""
        return min(encoder.config.layers for encoder in self.text.encoders)

    @property
    def told_guidance(self) -> bool:
        """Whether the U-Net is told the guidance scale, so that nothing is left to guide."""
        return self.denoiser.config.time_cond > 0

    @property
    def inpaint_channels(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """How to make what a U-Net of nine channels reads beside the noisy latent; None for the others."""
        return self._inpaint_channels if self.denoiser.config.in_channels == 9 else None

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) → the normalised posterior mean (B, 4, T, H/8, W/8), in bounded memory."""
        return self.autoencoder.normalize(encode_safe(self.autoencoder, pixels).mode())

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents → pixels, in bounded memory; in a wider type where the weights' own overflows."""
        return decode_safe(self.autoencoder, self.autoencoder.denormalize(latent.float()))

    def preview(self, latent: Tensor) -> Tensor:
        """(1, 4, T, H, W) → (1, 3, T, H, W) pixels of one cell each: a linear look at a latent that is forming."""
        return preview(self.autoencoder.config, latent)

    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """2B texts, B wanted and then B to stay away from, as the family's U-Net reads them.

        Sizes: the picture is told to be uncropped and of the size that is drawn.
        """
        options = TextOptions(clip_skip=request.clip_skip)
        half = len(prompts) // 2
        wanted, unwanted = encode_prompts(
            self.text, [prompt or "" for prompt in prompts[:half]], prompts[half:], options
        )
        assert unwanted is not None and request.size is not None
        width, height = request.size
        size = (height, width)
        vector = None
        if self.text.plan.numbers == 6:
            numbers = size_numbers(size)
            vector = torch.cat([_vector(wanted, numbers), _vector(unwanted, numbers)])
        elif self.text.plan.numbers == 5:
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
            told = guidance_waves(request.guidance, self.denoiser.config.time_cond).expand(len(tokens), -1)
        return Conditioning(tokens, None, vector, told)

    def network(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """(B, C, 1, H, W) → (B, 4, 1, H, W); the U-Net works on pictures and in the type of its weights."""
        out = self.denoiser(x[:, :, 0], time, cond.tokens, cond.vector, time_cond=cond.guidance)
        return out[:, :, None]

    def _inpaint_channels(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """(1, 3, 1, H, W) with 0 where to paint, (1, 1, 1, H, W) → mask and masked latent (1, 5, 1, H/8, W/8).

        A cell is painted when its first pixel is, as in diffusers, which takes nearest neighbours.
        """
        side = self.autoencoder.factor
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
    engine: str = "torch",
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """The model at `path`, a single file or a diffusers folder, with weights in `dtype` on `device`.

    dtype: int8 makes the U-Net's products in eight bits, and leaves the rest in what the CPU is fast in. vae: another
    autoencoder, a file or a folder. prediction: "epsilon" or "v", over what the checkpoint says. engine: "torch", or
    what `nn.openvino.plugin` takes. `InputError` where this machine cannot do it.
    `CheckpointError` when it is damaged, of no known kind, or a part alone.
    """
    found = open_checkpoint(path, variant=variant, prediction=prediction, systems=systems)
    if found.system is None or "unet" not in found.parts:
        raise CheckpointError(f"{path} is {found.kind} alone; to draw, give a whole checkpoint")
    return build(found, str(path), device, dtype, vae, engine, systems)


def build(
    found: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None = None,
    engine: str = "torch",
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """Networks of an opened checkpoint. `name` stands for it in errors."""
    kept = fast_dtype(device) if dtype == torch.int8 else dtype  # of what is not in eight bits
    check_engine(engine, device, dtype, kept)
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
    unet = denoiser(kind.unet, found.parts["unet"], f"{name} (unet)", device, dtype, engine)
    autoencoder, pixels = _autoencoder(found, kind, name, device, kept, vae, systems)
    plan = PLANS[plan_of(found.kind)]
    encoders = tuple(
        load_encoder(
            part.config,
            {key: found.parts[part.name][key].to(device) for key in found.parts[part.name]},
            kept,
            f"{name} ({part.name})",
        )
        for part in kind.text
    )
    betas = beta_table()
    levels = beta_levels(zero_terminal_snr(betas) if found.zero_snr else betas)
    config = Config(found.kind, preset_of(found), found.prediction, found.zero_snr, autoencoder.factor)
    autoencoder.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    sources = {"autoencoder": pixels, "denoiser": found.parts["unet"]}
    return System(config, autoencoder, unet, TextStack(plan, encoders), levels, sources, dtype, engine)


def check_engine(engine: str, device: torch.device, dtype: torch.dtype, kept: torch.dtype) -> None:
    """`InputError` if this machine cannot run a U-Net so, before anything is read. kept: of what is not in int8."""
    if engine != "torch":
        plugin(engine)
        if dtype not in PRECISIONS:
            raise InputError(
                f"{engine} computes in fp32, bf16 or fp16; int8 is of the engine torch", argument="dtype"
            )
    elif dtype == torch.int8:
        require_eight_bits(torch.empty(0, dtype=kept, device=device))


def denoiser(
    config: UNetConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    device: torch.device,
    dtype: torch.dtype,
    engine: str = "torch",
) -> UNet | OpenVINOUNet:
    """The U-Net with these weights, laid out for what runs it. `where` stands for the weights in errors."""

    def network(device: torch.device, dtype: torch.dtype) -> UNet:
        with torch.device("meta"):
            unet = UNet(config)
        fill(unet, tensors, where, dtype, device)
        return unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]

    if engine != "torch":
        exact = partial(network, torch.device("cpu"), torch.float32)
        return OpenVINOUNet(config, exact, tensors_hash(tensors), dtype, plugin(engine))
    unet = network(device, fast_dtype(device) if dtype == torch.int8 else dtype)
    if dtype == torch.int8:
        quantize(unet)
    else:
        pack(unet)  # on a CPU; elsewhere nothing
    return unet


def _autoencoder(
    found: Checkpoint,
    kind: Kind,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    vae: str | os.PathLike[str] | None,
    systems: Mapping[str, Kind],
) -> tuple[AutoencoderKL, Mapping[str, Tensor]]:
    """The autoencoder, and the tensors it was filled with."""
    config, tensors, where = kind.vae, found.parts.get("vae"), f"{name} (vae)"
    said: Mapping[str, Any] = found.configs.get("vae", {})
    if vae is not None:
        other = open_checkpoint(vae, systems=systems)
        if "vae" not in other.parts:
            raise InputError(f"{vae} holds no autoencoder", argument="vae")
        tensors, said, where = other.parts["vae"], other.configs.get("vae", {}), str(vae)
    assert tensors is not None
    if said:  # a folder's own numbers, with the preview that no file has
        config = replace(KLConfig.from_diffusers(dict(said)), preview=config.preview)
    with torch.device("meta"):
        model = AutoencoderKL(config)
    fill(model, tensors, where, dtype, device)
    return model, tensors


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
