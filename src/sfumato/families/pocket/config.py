"""What decides a pocket model's shape, and what it does when the user says nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sfumato.autoencoder import AutoencoderConfig
from sfumato.errors import CheckpointError


@dataclass(frozen=True)
class Preset:
    """What a request leaves open. `size` is (width, height) in pixels; guidance acts on sigma in `interval`."""

    steps: int = 20
    guidance: float = 4.0
    sampler: str = "dpmpp_2m"
    schedule: str = "linear"
    size: tuple[int, int] = (128, 128)
    interval: tuple[float, float] = (0.0, 1.0)


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


@dataclass(frozen=True)
class PocketConfig:
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    words: tuple[str, ...] = ()  # the tokenizer's words, in the order of their ids
    preset: Preset = field(default_factory=Preset)

    @property
    def multiple(self) -> int:
        """Width and height of a picture must be multiples of this many pixels."""
        return self.autoencoder.factor * self.denoiser.patch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PocketConfig:
        """The inverse of `to_dict` after a passage through JSON; unknown or ill-typed parts are a `CheckpointError`."""
        try:
            return cls(
                autoencoder=AutoencoderConfig.from_dict(values["autoencoder"]),
                denoiser=_plain(DenoiserConfig, values["denoiser"]),
                words=tuple(values["words"]),
                preset=_plain(Preset, values["preset"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the model card is not one of a pocket model: {error}") from None


def pixel_twin(config: PocketConfig) -> PocketConfig:
    """The same trunk in pixel space: identity autoencoder, as many tokens through patches, x-prediction."""
    return replace(
        config,
        autoencoder=AutoencoderConfig(factor=1),
        denoiser=replace(config.denoiser, patch=config.multiple, prediction="x"),
    )


def _plain(kind: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    unknown = values.keys() - known
    if unknown:
        raise TypeError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
