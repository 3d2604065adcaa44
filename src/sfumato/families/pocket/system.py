"""The parts of a pocket model put together, and how they lie in a folder."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.fold import Adapters, Touched
from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.causal import STRIDE, Causal, latents_of
from sfumato.checkpoint.fill import fill
from sfumato.checkpoint.refill import refill
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import FLOW
from sfumato.diffusion.schedules import NoiseLevels, flow_levels
from sfumato.errors import CheckpointError
from sfumato.families.pocket import control as nets
from sfumato.families.pocket.adapters import check, names_of
from sfumato.families.pocket.config import PocketConfig, pixel_twin
from sfumato.families.pocket.video import Animator, VideoConfig, VideoParts, decode, decoded, encode
from sfumato.families.system import DrawingSystem
from sfumato.families.trainee import Trainee
from sfumato.memory import Stage
from sfumato.nn.dit import DiT, DiTConfig
from sfumato.nn.dit_control import DiTControl
from sfumato.storage import load_sharded, read_json, save_sharded, tensors_hash, write_json
from sfumato.tasks.canvas import first_picture
from sfumato.tasks.pixels import to_pixels
from sfumato.text import TextConfig, TextEncoder, Tokenizer
from sfumato.types import Conditioning, Request

FORMAT = "sfumato model 1"
PARTS = ("autoencoder", "denoiser")
VIDEO_PARTS = ("temporal", "animator")  # of a model that draws clips too
WEAK = 0.1  # of the deviation of the table's rows: a word that was hardly learnt has less


def dit_config(config: PocketConfig, labels: bool = True) -> DiTConfig:
    """The shape of its DiT; without `labels`, of one that names no cells, as that of clips."""
    d = config.denoiser
    return DiTConfig(
        latent_channels=config.autoencoder.channels,
        patch=d.patch,
        width=d.width,
        depth=d.depth,
        heads=d.heads,
        text_width=d.text_width,
        label_classes=d.label_classes if labels else (),
    )


class TextDenoiser(nn.Module):
    """Text encoder and DiT, which train as one network: (x, time, ids, mask) → (prediction, label logits or None)."""

    def __init__(self, config: PocketConfig):
        super().__init__()
        d = config.denoiser
        self.text = TextEncoder(
            TextConfig(len(Tokenizer(config.words)), d.text_width, d.text_depth, d.text_heads)
        )
        self.dit = DiT(dit_config(config))

    def forward(self, x: Tensor, time: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.dit.forward_with_labels(x, time, Conditioning(self.text(ids, mask), mask))


@dataclass(frozen=True)
class System(DrawingSystem):
    """A whole model: what `generate` composes and `train` fills with weights."""

    config: PocketConfig
    autoencoder: Autoencoder
    denoiser: TextDenoiser
    tokenizer: Tokenizer
    control_files: Mapping[str, Path] = field(default_factory=dict)
    video: VideoParts | None = None

    @functools.cached_property
    def adapters(self) -> Adapters:
        """The LoRAs opened for it. The weights that it has when this is first asked for are the base."""
        base = dict(self.denoiser.state_dict())

        def renew(touched: Touched) -> None:
            refill(self.denoiser, folds.parts["denoiser"], touched.get("denoiser", ()), "pocket (denoiser)")

        names = functools.cache(lambda: names_of(base))
        folds = Adapters(names, {"denoiser": base}, renew, check)
        return folds

    def trainee(self, text: bool) -> Trainee:
        """Itself as a model that a LoRA is trained for, its text encoder too with `text`."""
        from sfumato.families.pocket.training import trainee  # which needs this module

        return trainee(self, text)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights, without what LoRAs add."""
        return {
            "autoencoder": tensors_hash(self.autoencoder.state_dict()),
            "denoiser": tensors_hash(self.adapters.parts["denoiser"].base),
        }

    def clip_hashes(self) -> dict[str, str]:
        """The same of the parts that only clips are drawn with."""
        if self.video is None:
            return {}
        return {name: tensors_hash(getattr(self.video, name).state_dict()) for name in VIDEO_PARTS}

    @property
    def reads(self) -> frozenset[str]:
        """What of a request for a clip it is told, if it draws any."""
        return frozenset(["frames", "fps", "clip"]) if self.video else frozenset()

    @property
    def clip_preset(self) -> dict[str, Any]:
        """What a request for a clip leaves open; empty for a model that draws none."""
        video = self.config.video
        return {} if video is None or self.video is None else {"frames": video.frames, "fps": video.fps}

    @property
    def window(self) -> tuple[int, int] | None:
        """Latents of a clip that are drawn together, and how many of them are known where a film goes on."""
        video = self.config.video
        return None if video is None or self.video is None else (video.window, video.context)

    @property
    def first_alone(self) -> bool:
        """Whether the first latent of a clip of which nothing is known is drawn by itself, as a picture."""
        video = self.config.video
        return video is not None and self.video is not None and video.first_alone

    @property
    def traces_clips(self) -> bool:
        return self.video is not None

    @property
    def traces_pictures(self) -> bool:
        return True

    def trace_pictures(
        self, request: Request, size: tuple[int, int], batch: int, *, encodes: bool
    ) -> tuple[Stage, ...]:
        """The memory that each stage of drawing pictures takes; see `trace.trace_pictures`."""
        from sfumato.families.pocket.trace import trace_pictures  # which needs this module

        return trace_pictures(self, request, size, batch, encodes)

    def trace_clip(self, request: Request) -> tuple[Stage, ...]:
        """The memory that each stage of drawing a clip takes; see `trace.trace_clip`."""
        from sfumato.families.pocket.trace import trace_clip  # which needs this module

        assert self.window is not None
        return trace_clip(self, request, self.window[0])

    @property
    def shared_noise(self) -> float:
        """Share of the noise's variance that the frames of a clip have in common, as in training."""
        return 0.0 if self.config.video is None else self.config.video.shared

    def frames_of(self, latents: int) -> int:
        """How many frames so many latents of a clip are."""
        return 1 + STRIDE * (latents - 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of so many frames; `InputError` for a size or a number of frames that it cannot draw."""
        count = frames if self.video is None or frames == 1 else latents_of(frames)
        return self.autoencoder.latent_shape(count, height, width)

    @property
    def parameterization(self) -> Parameterization:
        return Parameterization(self.config.denoiser.prediction, FLOW)

    @property
    def levels(self) -> NoiseLevels:
        return flow_levels()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) → normalised latents; four frames to one after the first, of a model of clips."""
        if self.video is not None and pixels.shape[2] > 1:
            return encode(self.autoencoder, self.video.temporal, pixels)
        return self.autoencoder.encode_normalized(pixels)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents → pixels."""
        if self.video is not None and latent.shape[2] > 1:
            return decode(self.autoencoder, self.video.temporal, latent)
        return self.autoencoder.decode_normalized(latent)

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        if self.video is not None and latent.shape[2] > 1:
            return decoded(self.autoencoder, self.video.temporal, latent)
        return super().decode_pieces(latent)

    def condition(self, prompts: Sequence[str | None], request: Request | None = None) -> Conditioning:
        """Text features of the prompts, padded to a common length; None is the empty one. Of a request for a clip that
        has a first picture, that too: `channels` are the latents of known frames, which may be none.
        """
        device = next(self.denoiser.parameters()).device
        if request is not None and request.moves and self.video is not None:
            return self._condition_clip(self.video.animator, prompts, request, device)
        ids, mask = self.tokenizer.batch([prompt or "" for prompt in prompts])
        ids, mask = ids.to(device), mask.to(device)
        return Conditioning(self.denoiser.text(ids, mask), mask)

    def check_texts(self, texts: Sequence[str], request: Request) -> None:
        """`InputError` for a text of more tokens than the network reads."""
        moves = request.moves and self.video is not None
        (self.clip_tokenizer if moves else self.tokenizer).batch(texts)

    def _condition_clip(
        self, animator: Animator, prompts: Sequence[str | None], request: Request, device: torch.device
    ) -> Conditioning:
        ids, mask = self.clip_tokenizer.batch([prompt or "" for prompt in prompts])
        cond = animator.read(self.denoiser.text, ids.to(device), mask.to(device))
        if not request.first_given:
            nothing = cond.tokens.new_empty(len(prompts), self.config.autoencoder.channels, 0, 1, 1)
            return replace(cond, channels=nothing)
        first = to_pixels(first_picture(request))[None].to(device)  # (1, 3, 1, H, W)
        known = self.autoencoder.encode_normalized(first).float()
        return replace(cond, channels=known.expand(len(prompts), -1, -1, -1, -1))

    @functools.cached_property
    def clip_tokenizer(self) -> Tokenizer:
        """Of prompts for clips: the words of pictures, and those of motion after them."""
        assert self.config.video is not None
        words = self.config.words + self.config.video.words
        return Tokenizer(words, self.config.denoiser.max_tokens)

    def network(
        self,
        x: Tensor,
        time: Tensor,
        cond: Conditioning,
        skip_layers: tuple[int, ...] = (),
        control: tuple[Tensor, ...] = (),
    ) -> Tensor:
        if (x.shape[2] > 1 or cond.channels is not None) and self.video is not None:
            return self.video.animator.answer(x, time, cond)
        return self.denoiser.dit(x, time, cond, skip_layers, control)

    def answers(self, moves: bool) -> Any:
        return self.video.animator if moves and self.video is not None else self.denoiser

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of its ControlNets: those in its folder, and those given."""
        return tuple(self.control_files)

    def control_hashes(self) -> dict[str, str]:
        """SHA-256 of the tensors of each ControlNet, by name."""
        return nets.digests(self.control_files)

    def with_controls(self, files: Mapping[str, str | os.PathLike[str]]) -> System:
        """The same with the ControlNets in these files, by name, besides its own."""
        added = {name: Path(file) for name, file in files.items()}
        other = replace(self, control_files={**self.control_files, **added})
        other.__dict__["adapters"] = self.adapters  # they are of the denoiser that both have
        for name in added:
            other._control(name)
        return other

    def _control(self, name: str) -> DiTControl:
        """The ControlNet of that name, read once."""
        if name not in self._opened:
            file = self.control_files[name]
            self._opened[name] = nets.open_file(file, self.denoiser.dit, self.device)
        return self._opened[name]

    @functools.cached_property
    def _opened(self) -> dict[str, DiTControl]:
        return {}

    @property
    def device(self) -> torch.device:
        return self.denoiser.dit.latent_in.weight.device

    def controller(self, name: str, pixels: Tensor) -> nets.Controller:
        """What the ControlNet of that name adds at every step, shown pixels (1, 3, H, W) in [0, 1]."""
        hint = self.encode(2 * pixels[:, :, None] - 1)
        return nets.controller(self._control(name), self.denoiser.dit, hint)

    def control_trainee(self, blocks: int, outputs: int) -> nets.ControlTrainee:
        """A fresh ControlNet beside this model, as training wants it."""
        return nets.ControlTrainee(self, blocks, outputs)

    @property
    def layers(self) -> int:
        """Blocks of the DiT, of which `network` can leave some out."""
        return self.config.denoiser.depth

    def picture_tokens(self, height: int, width: int) -> int:
        """Tokens that the DiT makes of a picture in pixels."""
        side = self.config.autoencoder.factor * self.config.denoiser.patch
        return (height // side) * (width // side)

    @property
    def reuse_order(self) -> int:
        """Forecasting what the blocks add by a line errs less than keeping it (benchmarks/approximate.py)."""
        return 1

    def split(
        self, x: Tensor, time: Tensor, cond: Conditioning, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`network` in two parts; the deep one is what the blocks add."""
        return self.denoiser.dit.forward_with_deep(x, time, cond, deep)

    def pixel_twin(self) -> System:
        """The same trunk in pixel space, on the CPU, with fresh weights from the global generator."""
        return build(pixel_twin(self.config))


def build(config: PocketConfig) -> System:
    """Fresh weights from the global generator's current state (seed it first)."""
    return System(
        config,
        Autoencoder(config.autoencoder),
        TextDenoiser(config),
        Tokenizer(config.words, config.denoiser.max_tokens),
    )


def fresh_video(system: System, video: VideoConfig) -> System:
    """The system with parts for clips: no mixing of frames yet, and the denoiser of pictures, which knows no motion."""
    temporal = Causal(video.temporal)
    dit = DiT(dit_config(system.config, labels=False))
    base = system.denoiser.dit.state_dict()
    dit.load_state_dict({name: base[name] for name in dit.state_dict()})
    animator = Animator(dit, len(video.words), system.denoiser.text.config)
    nn.init.normal_(animator.words, std=_scale(system))
    return replace(system, config=replace(system.config, video=video), video=VideoParts(temporal, animator))


def continued_video(system: System, video: VideoConfig) -> System:
    """The system with copies of its parts for clips, which learn on; words that are all but zero are set apart anew, as
    the text encoder cannot tell them from one another beside words of the size that it knows."""
    assert system.video is not None
    parts = copy.deepcopy(system.video)
    rows, size = parts.animator.words, _scale(system)
    with torch.no_grad():
        weak = rows.square().mean(1).sqrt() < WEAK * size
        rows[weak] = size * torch.randn(int(weak.sum()), rows.shape[1]).to(rows)
    return replace(system, config=replace(system.config, video=video), video=parts)


def _scale(system: System) -> float:
    """The deviation of the rows of the text encoder's table."""
    return float(system.denoiser.text.embedding.weight.detach().float().square().mean().sqrt())


def save_folder(system: System, directory: Path, extra: dict[str, Any] | None = None) -> list[Path]:
    """Write bfloat16 weights into a folder, and then `model.json`: where the card is, the model is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}
    for name in (*PARTS, *VIDEO_PARTS):
        for old in directory.glob(f"{name}*.safetensors"):
            if (directory / "model.json").exists():
                (directory / "model.json").unlink()
            old.unlink()
        if name in VIDEO_PARTS and system.video is None:
            continue
        state = getattr(system.video if name in VIDEO_PARTS else system, name).state_dict()
        keep = {"latent_mean", "latent_std"}
        tensors = {k: v if k in keep else v.to(torch.bfloat16) for k, v in state.items()}
        files[name] = save_sharded(directory, name, tensors)
    card = {"format": FORMAT, "family": "pocket", **system.config.to_dict(), "files": files, **(extra or {})}
    write_json(directory / "model.json", card)
    return [directory / "model.json", *(directory / f for group in files.values() for f in group)]


def open_folder(directory: Path, device: torch.device) -> System:
    """Read what `save_folder` wrote, strictly: every tensor present, of its shape, finite, and none besides."""
    card, config = _card(directory)
    with torch.device("meta"):
        system = build(config)
    for name in PARTS:
        _read(getattr(system, name), name, directory, card, device)
    if config.video is not None:
        system = _with_video(system, config.video, directory, card, device)
    return replace(system, control_files=nets.beside(directory))


def _with_video(
    system: System, video: VideoConfig, directory: Path, card: dict[str, Any], device: torch.device
) -> System:
    """The system with the parts for clips that lie beside it."""
    with torch.device("meta"):
        temporal = Causal(video.temporal)
        dit = DiT(dit_config(system.config, labels=False))
        animator = Animator(dit, len(video.words), system.denoiser.text.config)
    for name, module in (("temporal", temporal), ("animator", animator)):
        _read(module, name, directory, card, device)
    return replace(system, video=VideoParts(temporal, animator))


def open_autoencoder(directory: Path, device: torch.device) -> Autoencoder:
    """The autoencoder of such a folder alone, as strictly."""
    card, config = _card(directory)
    with torch.device("meta"):
        autoencoder = Autoencoder(config.autoencoder)
    return _read(autoencoder, "autoencoder", directory, card, device)


def _card(directory: Path) -> tuple[dict[str, Any], PocketConfig]:
    card = read_json(directory / "model.json")
    if card.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / 'model.json'} is of format {card.get('format')!r}, not {FORMAT!r}"
        )
    config = PocketConfig.from_dict(card)
    files = card.get("files")
    for name in (*PARTS, *(VIDEO_PARTS if config.video else ())):
        if not isinstance(files, dict) or not isinstance(files.get(name), list):
            raise CheckpointError(f"{directory / 'model.json'} lacks the list of {name} under 'files'")
    return card, config


def _read(module: Any, name: str, directory: Path, card: dict[str, Any], device: torch.device) -> Any:
    """The network with the weights that the card names for it."""
    tensors = load_sharded(directory, card["files"][name])
    fill(module, tensors, f"{directory} ({name})", torch.float32)
    return module.to(device).eval().requires_grad_(False)
