"""A Stable Diffusion put together from a checkpoint: the networks, and what `generate` asks of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.adapters.fold import Touched
from sfumato.diffusion.parameterization import Parameterization, consistency
from sfumato.diffusion.path import VE
from sfumato.families.published.checkpoint import Checkpoint, Families
from sfumato.families.published.condition import TextFeatures, TextOptions
from sfumato.families.published.controls import ControlFile, Controller
from sfumato.families.published.networks import Networks
from sfumato.families.published.openers import check_engine, require_offload
from sfumato.families.published.system import Embeddings, Place, Preset, PublishedSystem, opened, ready
from sfumato.families.published.text import tokenizer_of
from sfumato.families.sd.condition import (
    TextStack,
    check_texts,
    encode_prompts,
    fit,
    micro_numbers,
    plan_of,
    size_vector,
)
from sfumato.families.sd.controlnet import check, controller, open_control
from sfumato.families.sd.distilled import check_preset, drawn, preset_named
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.levels import noise_levels
from sfumato.families.sd.openers import openers, renewers
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.shapes import System as Kind
from sfumato.families.trainee import Trainee
from sfumato.nn.unet import UNet
from sfumato.sampling.reuse import Split
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.inversion import read_inversions
from sfumato.types import Conditioning, Micro, Request

if TYPE_CHECKING:
    from sfumato.families.sd.control_training import ControlTrainee


@dataclass(frozen=True)
class Config:
    """kind: a key of `SYSTEMS`. prediction: "epsilon" or "v". multiple: what a picture's sides are multiples of.
    distilled: how it is drawn, a name of `distilled.PRESETS`; guessed: the words that this was guessed from, if it was.
    """

    kind: str
    preset: Preset
    prediction: str
    zero_snr: bool
    multiple: int = 8
    distilled: str = "plain"
    guessed: str = ""


@dataclass(frozen=True, kw_only=True)
class System(PublishedSystem):
    """Networks of a Stable Diffusion, ready to draw.

    networks: "text" has all text encoders. tokenizers: one for each of them.
    """

    config: Config
    shapes: Kind
    tokenizers: tuple[ClipTokenizer, ...] = ()

    family = FAMILY
    texts = ("text",)

    def openers(
        self, parts: Mapping[str, Mapping[str, Tensor]], *, keep: int | None
    ) -> dict[str, Callable[[], Any]]:
        return openers(self, parts, keep=keep)

    @property
    def text(self) -> TextStack:
        return self.networks["text"]

    def trainee(self, text: bool) -> Trainee:
        """Itself as a model that a LoRA is trained for, its text encoders too with `text`; see `training.trainee`."""
        from sfumato.families.sd.training import trainee  # which needs this module

        return trainee(self, text)

    def renewers(
        self, parts: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Callable[[Any, Touched], bool]]:
        return renewers(self, parts)

    def control_file(self, path: Place, systems: Mapping[str, Kind] | None) -> ControlFile:
        found = open_control(path, systems=systems)
        check(found, self.shapes.unet, self.config.kind)
        return found

    def shown(self, name: str, pixels: Tensor, mask: Tensor | None) -> Tensor:
        return pixels

    def control(self, name: str, network: Any, shown: Tensor) -> Controller:
        return controller(network, shown)

    def control_trainee(self, blocks: int, outputs: int) -> ControlTrainee:
        """A fresh ControlNet beside this model, as training wants it; blocks and outputs are those of the U-Net."""
        from sfumato.families.sd.control_training import ControlTrainee

        return ControlTrainee(self)

    @property
    def parameterization(self) -> Parameterization:
        kind = "v" if self.config.prediction == "v" else "eps"
        lcm = "lcm" in (self.config.distilled, self.adapters.preset(self.adapters.now).get("sampler"))
        return Parameterization(kind, VE, self.levels.time, consistency if lcm else None)

    @property
    def clip_layers(self) -> int:
        """How deep from the end `clip_skip` may reach."""
        return min(part.config.layers for part in self.shapes.text)

    @property
    def reads(self) -> frozenset[str]:
        """The rules and weightings of prompts, and the numbers that this U-Net is told."""
        told = {6: ("original", "crop", "target"), 5: ("original", "crop", "aesthetic")}
        micro = told.get(plan_of(self.config.kind).numbers, ())
        names = [f"micro.{prefix}{name}" for name in micro for prefix in ("", "negative_")]
        return frozenset(["prompt_rules", "weighting", *names])

    @property
    def read_as(self) -> dict[str, str]:
        """What its files may leave open, as it was taken or said: `prediction` and `preset`."""
        return {"prediction": self.config.prediction, "preset": self.config.distilled}

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

    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """2B texts, B wanted and then B to stay away from, as the family's U-Net reads them.

        Sizes: where `request.micro` does not say otherwise, the picture is uncropped and of the size that is drawn.
        """
        options = TextOptions.of(request)
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

    def check_texts(self, texts: Sequence[str], request: Request) -> None:
        """`InputError` for a text that cannot be laid out; of any length they can be."""
        check_texts(self.text, texts, TextOptions.of(request))

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
    half = width // 2  # unlike that of times, the slowest wave is reached: 1 / 10,000
    waves = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
    angles = 1000.0 * (scale - 1) * waves
    return torch.cat([angles.sin(), angles.cos()])[None]


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
    preset: str | None = None,
    systems: Mapping[str, Kind] = SYSTEMS,
) -> System:
    """The model at `path`, a single file or a diffusers folder, with weights in `dtype` on `device`.

    dtype: int8 makes the U-Net's products in eight bits, and leaves the rest in what the CPU is fast in. vae: another
    autoencoder, a file or a folder. prediction: "epsilon" or "v", over what the checkpoint says. engine: "torch", or
    what `nn.openvino.plugin` takes. embeddings: files of textual inversions, called in prompts by their names or by
    those they are given here. parts: where to take what a U-Net alone lacks, whole checkpoints or single networks.
    offload: see `Networks`; of any but "none" nothing but headers is read before it is needed, and not every one goes
    with int8 or an engine. preset: how a distilled model is drawn, a name of `distilled.PRESETS`, over what the
    checkpoint says. `InputError` where this machine cannot do it.
    `CheckpointError` when it is damaged, of no known kind, or a part alone.
    """
    families = (replace(FAMILY, systems=systems),)
    found = opened(path, families, variant=variant, prediction=prediction, parts=parts)
    return build(
        found,
        str(path),
        device,
        dtype,
        families,
        vae=vae,
        embeddings=embeddings,
        engine=engine,
        offload=offload,
        preset=preset,
    )


def build(
    found: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    families: Families,
    *,
    vae: str | os.PathLike[str] | None = None,
    embeddings: Embeddings = (),
    engine: str = "torch",
    offload: str = "none",
    preset: str | None = None,
) -> System:
    """Networks of an opened checkpoint. `name` stands for it in errors; the rest as for `open_system`."""
    check_preset(preset)
    check_engine(engine, device, dtype)
    require_offload(offload, engine, dtype)
    text, levels = found.system.text, noise_levels(found, name)
    made = ready(found, name, [part.name for part in text], vae, families)
    inversions = tuple(read_inversions(embeddings).values())  # before gigabytes, should one be no such file
    plan = plan_of(found.kind)
    tokenizers = tuple(tokenizer_of(found.folder, reader.part, reader.pad) for reader in plan.readers)
    fit(plan, [part.config for part in text], tokenizers, inversions)
    how, guess = preset_named(found) if preset is None else (preset, "")
    like, factor = preset_of(found, how), found.system.vae.factor
    unopened = System(
        config=Config(found.kind, like, found.prediction, found.zero_snr, factor, how, guess),
        shapes=made.shapes,
        networks=Networks({}),
        levels=levels,
        dtype=dtype,
        device=device,
        parts=made.parts,
        sources=made.sources,
        engine=engine,
        tokenizers=tokenizers,
        inversions=inversions,
    )
    return unopened.offloaded(offload)


def usual_preset(found: Checkpoint) -> Preset:
    """How a checkpoint draws of which nothing but the kind is known."""
    return preset_of(found, preset_named(found)[0])


def preset_of(found: Checkpoint, name: str = "plain") -> Preset:
    """How a checkpoint draws when the user says nothing: its family's custom, and that of the preset `name`."""
    kind = found.system
    assert kind is not None
    side = 512 if found.kind.startswith("sd2") and found.prediction == "epsilon" else kind.size
    preset = Preset(25, 7.0, "dpmpp_2m", "karras", (side, side))
    if found.kind.startswith("sdxl"):
        preset = replace(preset, guidance=5.0)
    cells = found.configs.get("unet", {}).get("sample_size")
    if isinstance(cells, int) and 0 < cells <= 256:  # distilled ones may draw smaller than their parents
        preset = replace(preset, size=(cells * kind.vae.factor,) * 2)
    if found.zero_snr:
        preset = replace(preset, sampler="euler", schedule="trailing", rescale=0.7)
    return replace(preset, **drawn(name, found))
