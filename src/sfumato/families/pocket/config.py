"""What decides a pocket model's shape, and what it does when the user says nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sfumato import checks
from sfumato.autoencoder import AutoencoderConfig
from sfumato.diffusion.schedules import flow_levels, sigmas_for
from sfumato.errors import CheckpointError, InputError
from sfumato.families.pocket.video import VideoConfig
from sfumato.sampling import sampler_named
from sfumato.types import Request

MOST = {"depth": 1_000, "text_depth": 1_000}  # what a card may ask for before its weights are looked at
MOST_OTHERWISE = 100_000
PREDICTIONS = ("flow", "x", "v")  # eps would say nothing about the picture where a flow begins, in pure noise


@dataclass(frozen=True)
class Preset:
    """What a request leaves open. `size` is (width, height) in pixels; guidance acts on sigma in `interval`."""

    steps: int = 20
    guidance: float = 4.0
    sampler: str = "dpmpp_2m"
    schedule: str = "linear"
    size: tuple[int, int] = (128, 128)
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("steps", "guidance", "sampler", "schedule", "size"):
            if getattr(self, name) is None:
                raise InputError(f"the preset needs {name}", argument=name)
        Request(
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            schedule=self.schedule,
            size=self.size,
        ).validate()
        sampler_named(self.sampler)
        sigmas_for(self.schedule, self.steps, flow_levels(), tokens=1)
        numbers = isinstance(self.interval, tuple) and all(isinstance(v, int | float) for v in self.interval)
        if not (numbers and len(self.interval) == 2 and self.interval[0] <= self.interval[1]):
            raise InputError(f"interval must be (low, high), not {self.interval!r}", argument="interval")


@dataclass(frozen=True)
class DenoiserConfig:
    """The trunk. Its input is whatever the autoencoder gives: latents, or pixels when the factor is 1."""

    width: int = 256  # channels of a token
    depth: int = 8  # blocks
    heads: int = 4  # attention heads; 64 channels each
    patch: int = 1  # latent cells per token and side; the pixel baseline uses the latent model's factor
    text_width: int = 256  # channels of the text encoder
    text_depth: int = 2  # its blocks
    max_tokens: int = 128  # longest prompt, in words and spelt letters
    prediction: str = "flow"  # what the network predicts: flow for latents, x for pixels (JiT, 2511.13720)
    label_classes: tuple[int, ...] = ()  # per-cell attributes to learn beside the picture; () for none

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch", "text_width", "text_depth", "max_tokens"):
            checks.integer(name, getattr(self, name), 1, MOST.get(name, MOST_OTHERWISE))
        for name, heads in (("width", self.heads), ("text_width", self.text_heads)):
            if getattr(self, name) % (2 * heads):
                raise InputError(
                    f"{name} must be {heads} heads of an even number of channels, not {getattr(self, name)}",
                    argument=name,
                )
        if self.prediction not in PREDICTIONS:
            raise InputError(
                f"prediction must be one of {', '.join(PREDICTIONS)}, not {self.prediction!r}",
                argument="prediction",
            )
        if not isinstance(self.label_classes, tuple):
            raise InputError(
                f"label_classes must be a list, not {self.label_classes!r}", argument="label_classes"
            )
        for count in self.label_classes:
            checks.integer("label_classes", count, 1, MOST_OTHERWISE)

    @property
    def text_heads(self) -> int:
        """Heads of the text encoder, 64 channels each."""
        return max(1, self.text_width // 64)


@dataclass(frozen=True)
class PocketConfig:
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    words: tuple[str, ...] = ()  # the tokenizer's words, in the order of their ids
    preset: Preset = field(default_factory=Preset)
    video: VideoConfig | None = None  # of a model that draws clips too

    def __post_init__(self) -> None:
        if any(side % self.multiple for side in self.preset.size):
            raise InputError(
                f"the preset's size {self.preset.size} is not a multiple of {self.multiple} pixels "
                "(the autoencoder's factor times the denoiser's patch)",
                argument="preset.size",
            )

    @property
    def multiple(self) -> int:
        """Width and height of a picture must be multiples of this many pixels."""
        return self.autoencoder.factor * self.denoiser.patch

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.video else {name: value for name, value in values.items() if name != "video"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PocketConfig:
        """The inverse of `to_dict` after a passage through JSON; unknown or ill-typed parts are a `CheckpointError`."""
        try:
            words = values["words"]
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise TypeError("words must be a list of texts")
            return cls(
                autoencoder=AutoencoderConfig.from_dict(values["autoencoder"]),
                denoiser=_plain(DenoiserConfig, "denoiser", values["denoiser"]),
                words=tuple(words),
                preset=_plain(Preset, "preset", values["preset"]),
                video=None if values.get("video") is None else VideoConfig.from_dict(values["video"]),
            )
        except (InputError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the model card is not one of a pocket model: {error}") from None


def configure(
    autoencoder: AutoencoderConfig, denoiser: DenoiserConfig, words: tuple[str, ...], preset: Preset
) -> PocketConfig:
    """The configuration that a recipe's tables and a learnt vocabulary add up to."""
    return PocketConfig(autoencoder, denoiser, words, preset)


def pixel_twin(config: PocketConfig) -> PocketConfig:
    """The same trunk in pixel space: identity autoencoder, as many tokens through patches, x-prediction."""
    return replace(
        config,
        autoencoder=AutoencoderConfig(factor=1),
        denoiser=replace(config.denoiser, patch=config.multiple, prediction="x"),
    )


def _plain(kind: type, where: str, values: Any) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{where} must be an object")
    known = {f.name for f in fields(kind)}
    unknown = values.keys() - known
    if unknown:
        raise TypeError(f"{where} has no field {min(unknown)!r}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
