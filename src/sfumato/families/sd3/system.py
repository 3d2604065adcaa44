"""A Stable Diffusion 3 put together from a checkpoint: the networks, and what `generate` asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.adapters.fold import Touched
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import FLOW
from sfumato.diffusion.schedules import flow_levels
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.checkpoint import Checkpoint, Families
from sfumato.families.published.condition import TextOptions
from sfumato.families.published.controls import ControlFile, Controller
from sfumato.families.published.kinds import TextConfig
from sfumato.families.published.networks import Networks
from sfumato.families.published.openers import autoencoder, check_engine, denoiser, renewed, require_offload
from sfumato.families.published.system import Embeddings, Place, Preset, PublishedSystem, opened, ready
from sfumato.families.sd3.condition import (
    READERS,
    Reader,
    TextShape,
    TextStack,
    encode_prompts,
    extent,
    fit,
    readers_of,
)
from sfumato.families.sd3.controlnet import open_control
from sfumato.families.sd3.controls import controller, read_picture
from sfumato.families.sd3.family import FAMILY, distilled_by
from sfumato.families.sd3.folder import SHIFT
from sfumato.families.sd3.shapes import SAME_TENSORS, SYSTEMS
from sfumato.families.sd3.shapes import System as Kind
from sfumato.families.sd3.text import text_openers, text_renewers, tokenizers_of
from sfumato.families.trainee import Trainee
from sfumato.nn.mmdit import check_cells
from sfumato.nn.mmdit_control import MMDiTControl
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.inversion import read_inversions
from sfumato.text.syntax import parse
from sfumato.text.t5 import T5Config
from sfumato.text.t5_tokens import T5Tokenizer
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.families.sd3.control_training import ControlTrainee

# steps and guidance of the published model cards
PRESETS = {
    "sd3-medium": (28, 7.0),
    "sd3.5-medium": (40, 4.5),
    "sd3.5-large": (28, 3.5),
    "sd3.5-large-turbo": (4, 1.0),  # distilled to draw without guidance
}


@dataclass(frozen=True)
class Config:
    """kind: a key of `SYSTEMS`. multiple: what a picture's sides are multiples of. distilled: how it is drawn, "turbo"
    or "plain"; guessed: the words that this was guessed from, if it was.
    """

    kind: str
    preset: Preset
    multiple: int = 16
    distilled: str = "plain"
    guessed: str = ""


@dataclass(frozen=True, kw_only=True)
class System(PublishedSystem):
    """Networks of a Stable Diffusion 3, ready to draw.

    networks: each text encoder is one of its own, so that no two of them, nor one and the transformer, have to be in
    memory together. readers: the encoders that are read. tokenizers: theirs, by part. without: those that the user left
    out. text_dtype: what T5 is kept in, where that was asked for.
    """

    config: Config
    shapes: Kind
    readers: tuple[Reader, ...] = READERS
    tokenizers: Mapping[str, ClipTokenizer | T5Tokenizer]
    without: tuple[str, ...] = ()
    text_dtype: torch.dtype | None = None

    family = FAMILY
    reads = frozenset(["prompt_rules", "weighting", "text_length"])
    controls_encoded = True

    @property
    def configs(self) -> dict[str, TextConfig]:
        """Of the text encoders, by part."""
        return {part.name: part.config for part in self.shapes.text}

    def openers(
        self, parts: Mapping[str, Mapping[str, Tensor]], *, keep: int | None
    ) -> dict[str, Callable[[], Any]]:
        shapes, sources, form = self.shapes, self.sources, (self.kept, self.device)
        texts = text_openers(
            self.readers,
            self.configs,
            parts,
            sources,
            *form,
            text_dtype=self.text_dtype,
            stream=keep is not None and self.text_dtype != torch.int8,
        )
        of = (self.device, self.dtype, self.engine)
        weights, where = parts["transformer"], sources["transformer"]
        return texts | {
            "denoiser": lambda: denoiser(shapes.transformer, weights, where, *of, keep=keep),
            "autoencoder": lambda: autoencoder(shapes.vae, parts["vae"], sources["vae"], *form),
        }

    def renewers(
        self, parts: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Callable[[Any, Touched], bool]]:
        shapes, sources, form = self.shapes, self.sources, (self.kept, self.device)

        def transformer(network: Any, touched: Touched) -> bool:
            names, config = touched.get("transformer", frozenset()), shapes.transformer
            of = sources["transformer"], self.device, self.dtype
            return renewed(network, config, parts["transformer"], names, *of)

        texts = text_renewers(self.readers, self.configs, parts, sources, *form, text_dtype=self.text_dtype)
        return texts | {
            "denoiser": transformer,
            "autoencoder": lambda network, touched: "vae" not in touched,
        }

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(reader.part for reader in self.readers)

    @property
    def text_parts(self) -> tuple[str, ...]:
        return self.texts

    @property
    def read_as(self) -> dict[str, str]:
        """What its files may leave open, as it was taken or said: `preset`."""
        return {"preset": self.config.distilled}

    @property
    def text(self) -> TextStack:
        return TextStack(self.networks, self.tokenizers, text_shape(self.shapes), self.inversions)

    @property
    def parameterization(self) -> Parameterization:
        return Parameterization("flow", FLOW, _thousandths)

    @property
    def clip_layers(self) -> int:
        """How deep from the end `clip_skip` may reach: into the shallower of the CLIPs that are read."""
        clips = [
            p.config for p in self.shapes.text if p.name in self.texts and not isinstance(p.config, T5Config)
        ]
        return min((config.layers for config in clips), default=1)

    def trainee(self, text: bool) -> Trainee:
        """Itself as a model that a LoRA is trained for, its CLIPs too with `text`; see `training.trainee`."""
        from sfumato.families.sd3.training import trainee  # which needs this module

        return trainee(self, text)

    @property
    def layers(self) -> int:
        """Blocks of the transformer, of which `network` can leave some out."""
        return self.shapes.transformer.layers

    def picture_tokens(self, height: int, width: int) -> int:
        """Tokens that the transformer makes of a picture in pixels."""
        side = self.shapes.vae.factor * self.shapes.transformer.patch
        return (height // side) * (width // side)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of a picture in pixels. `InputError` for one larger than the transformer has places for."""
        config = self.shapes.transformer
        largest = config.positions * config.patch * self.shapes.vae.factor
        if max(height, width) > largest:
            raise InputError(
                f"{width}x{height} is more than the {largest} pixels on a side that this transformer has places for",
                argument="size",
            )
        shape = super().latent_shape(frames, height, width)
        check_cells(config, *shape[-2:])
        return shape

    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """2B texts, B wanted and then B to stay away from; one that is not there is the empty one."""
        texts = [prompt or "" for prompt in prompts]
        features, _ = encode_prompts(self.text, texts, options=TextOptions.of(request))
        return Conditioning(features.tokens, features.mask, features.pooled)

    def check_texts(self, texts: Sequence[str], request: Request) -> None:
        """`InputError` for a text that cannot be laid out, as one of more tokens than T5 reads."""
        options = TextOptions.of(request)
        extent(self.text, [parse(text, options.rule) for text in texts], options)

    def network(
        self,
        x: Tensor,
        time: Tensor,
        cond: Conditioning,
        skip_layers: tuple[int, ...] = (),
        control: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """(B, 16, 1, H, W) → (B, 16, 1, H, W); the transformer works on pictures and in the type of its weights.

        control: what ControlNets add to its tokens.
        """
        more: dict[str, Any] = {"control": control} if control else {}
        told = (cond.tokens, cond.vector, cond.mask)
        out = self.denoiser(x[:, :, 0], time, *told, skip_layers=skip_layers, **more)
        return out[:, :, None]

    # --- ControlNets -----------------------------------------------------------------------------------------------

    def control_file(self, path: Place, systems: Mapping[str, Kind] | None) -> ControlFile:
        return open_control(path, self.shapes.transformer, self.config.kind, self.parts["transformer"])

    @property
    def masked_controls(self) -> frozenset[str]:
        return frozenset(name for name, file in self.controlnets.files.items() if file.config.extra)

    def shown(self, name: str, pixels: Tensor, mask: Tensor | None) -> Tensor:
        return read_picture(self, self.controlnets.files[name].config, pixels, mask)

    def shown_shape(self, name: str, height: int, width: int) -> tuple[int, ...]:
        channels, _, *cells = self.latent_shape(1, height, width)
        return 1, channels + self.controlnets.files[name].config.extra, *cells

    def control(self, name: str, network: MMDiTControl, shown: Tensor) -> Controller:
        together = lcm(*(file.config.blocks.layers for file in self.controlnets.files.values()))
        return controller(network, shown, together // network.config.blocks.layers)

    def control_trainee(self, blocks: int, outputs: int) -> ControlTrainee:
        """A fresh ControlNet of so many of the transformer's first blocks, as training wants it; each of them adds."""
        from sfumato.families.sd3.control_training import ControlTrainee

        return ControlTrainee(self, blocks)


def _thousandths(sigma: Tensor) -> Tensor:
    """What the transformer is told of a noise level."""
    return 1000 * sigma


def text_shape(kind: Kind) -> TextShape:
    """What features of a kind's text encoders measure, there or left out."""
    *clips, _ = (part.config for part in kind.text)
    widths, pooled = [clip.width for clip in clips], [getattr(clip, "projection", 0) for clip in clips]
    return TextShape((widths[0], widths[1]), (pooled[0], pooled[1]), kind.transformer.context)


def open_system(
    path: Place,
    device: torch.device,
    dtype: torch.dtype,
    *,
    systems: Mapping[str, Kind] = SYSTEMS,
    variant: str | None = None,
    prediction: str | None = None,
    parts: Place | Iterable[Place] = (),
    **options: Any,
) -> System:
    """The model at `path`, a single file or a diffusers folder. options: of `build`; the rest as for
    `published.system.opened`.
    """
    families = (replace(FAMILY, systems=systems),)
    found = opened(path, families, variant=variant, prediction=prediction, parts=parts)
    return build(found, str(path), device, dtype, families, **options)


def build(
    found: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    families: Families,
    *,
    vae: Place | None = None,
    engine: str = "torch",
    offload: str = "none",
    without: Sequence[str] = (),
    text_dtype: torch.dtype | None = None,
    tokenizer: Place | None = None,
    preset: str | None = None,
    embeddings: Embeddings = (),
) -> System:
    """Networks of an opened checkpoint, with weights in `dtype` on `device`. `name` stands for it in errors.

    dtype: int8 makes the transformer's products in eight bits, and leaves the rest in what the CPU is fast in. vae:
    another autoencoder, a file or a folder. engine: "torch", or what `nn.openvino.plugin` takes. offload: see
    `Networks`. without: text encoders to leave out, of clip_l, clip_g and t5. text_dtype: of T5's weights, float32,
    bfloat16 or int8. tokenizer: T5's, where the checkpoint has none. preset: "turbo" or "plain", over what name and
    notes of a large one say. embeddings: files of textual inversions, called in prompts by their names or by those
    they are given here.
    """
    found, guess = as_preset(found, name, preset)
    check_engine(engine, device, dtype)
    require_offload(offload, engine, dtype)
    made = ready(found, name, (), vae, families)
    inversions = tuple(read_inversions(embeddings).values())  # before gigabytes, should one be no such file
    fit(text_shape(found.system), inversions)
    readers = readers_of(found.parts, without, name)
    t5 = next(part.config for part in found.system.text if isinstance(part.config, T5Config))
    tokenizers = tokenizers_of(
        readers,
        found.folder,
        name,
        file=found.file,
        given=None if tokenizer is None else Path(tokenizer),
        vocabulary=t5.vocabulary,
    )
    side = made.shapes.vae.factor * made.shapes.transformer.patch
    unopened = System(
        config=Config(found.kind, preset_of(found), side, preset_named(found), guess),
        shapes=made.shapes,
        networks=Networks({}),
        levels=flow_levels(shift_of(found, name)),
        dtype=dtype,
        device=device,
        parts=made.parts,
        sources=made.sources,
        engine=engine,
        inversions=inversions,
        readers=readers,
        tokenizers=tokenizers,
        without=tuple(without),
        text_dtype=text_dtype,
    )
    return unopened.offloaded(offload)


def as_preset(found: Checkpoint, name: str, preset: str | None) -> tuple[Checkpoint, str]:
    """The checkpoint as the distilled kind or the plain one, and the words by which it is taken for distilled.

    `InputError` for a preset that a checkpoint of its shapes does not have.
    """
    turbo = {plain: distilled for distilled, plain in SAME_TENSORS.items()}
    plain = SAME_TENSORS.get(found.kind, found.kind)
    if preset is None:
        return found, distilled_by(found, name) if found.kind in SAME_TENSORS else ""
    kinds = {"plain": plain} | ({"turbo": turbo[plain]} if plain in turbo else {})
    if preset not in kinds:
        raise InputError(
            f"{name} is of {plain}, whose presets are {', '.join(kinds)}, not {preset!r}", argument="preset"
        )
    return replace(found, kind=kinds[preset]), ""


def preset_named(found: Checkpoint) -> str:
    return "turbo" if found.kind in SAME_TENSORS else "plain"


def shift_of(found: Checkpoint, name: str) -> float:
    """Of the noise levels, as the scheduler's JSON has it, or else the published models'."""
    shift = found.configs.get("scheduler", {}).get("shift", SHIFT)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < 1000:
        raise CheckpointError(f"{name}: the scheduler's shift must be a positive number, not {shift!r}")
    return float(shift)


def usual_preset(found: Checkpoint) -> Preset:
    """How a checkpoint draws of which nothing but the kind is known."""
    return preset_of(found)


def preset_of(found: Checkpoint) -> Preset:
    """How a checkpoint draws when the user says nothing. A folder's transformer may name another size."""
    steps, guidance = PRESETS[found.kind]
    cells, side = found.configs.get("transformer", {}).get("sample_size"), found.system.size
    if isinstance(cells, int) and 0 < cells <= 512:
        side = cells * found.system.vae.factor
    return Preset(steps, guidance, "euler", "flow_match", (side, side))
