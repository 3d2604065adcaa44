"""The values that travel between the stages, and the legend of their shapes.

Legend, used on every line where a shape changes:
    B  batch          C  channels       T  frames (1 for a picture)
    H  height, W  width: latent cells, or pixels where said
    N  tokens         D  width of a token          K  attention heads

Pixels inside the system are float (B, 3, T, H, W) in [-1, 1]; a canonical latent is (B, C, T, H, W), normalised to
zero mean and unit variance per channel over its training data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

MAX_PROMPT = 32_000  # characters; what the OpenAI image endpoint accepts
MAX_STEPS = 1_000
MAX_COUNT = 64
MAX_SIDE = 4_096  # pixels
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told. tokens: (B, N, D) text features; mask: (B, N) bool, True where a token is real."""

    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Request:
    """One wish for pictures, shared by Python, the command line and HTTP; `validate` is the only gatekeeper.

    None means the model's own preset. `size` is (width, height) in pixels. Picture k of the request has seed
    `seed + k` (modulo 2**64), so it is the picture of a request for that seed alone.
    """

    prompt: str = ""
    negative: str = ""
    count: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Request:
        """Build from plain JSON values; an unknown field is an `InputError` that lists the known ones."""
        if not isinstance(values, dict):
            raise InputError(f"a request must be an object of named fields, not {_shown(values)}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(
                    f"unknown field {_shown(name)}; a request has {', '.join(known)}", argument=name
                )
        values = dict(values)
        if isinstance(values.get("size"), list):
            values["size"] = tuple(values["size"])
        return cls(**values).validate()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def with_defaults(self, **defaults: Any) -> Request:
        """Fill every field that is None from `defaults`."""
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def seeds(self) -> list[int]:
        return [(self.seed + k) % (MAX_SEED + 1) for k in range(self.count)]

    def validate(self) -> Request:
        """Check everything that can be known without a model; return self. Raises `InputError` naming the argument."""
        _text("prompt", self.prompt)
        _text("negative", self.negative)
        _integer("count", self.count, 1, MAX_COUNT)
        _integer("seed", self.seed, 0, MAX_SEED)
        if self.steps is not None:
            _integer("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, 100.0)
        for name in ("sampler", "schedule"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} must be a name, not {_shown(value)}", argument=name)
        if self.size is not None:
            if not (isinstance(self.size, tuple) and len(self.size) == 2):
                raise InputError(f"size must be (width, height), not {_shown(self.size)}", argument="size")
            _integer("width", self.size[0], 1, MAX_SIDE)
            _integer("height", self.size[1], 1, MAX_SIDE)
        return self


@dataclass(frozen=True)
class Result:
    """Pictures and how they came to be. `recipe` is plain JSON: request, model, hashes, versions, seconds."""

    images: tuple[Image, ...]
    recipe: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> list[Path]:
        """Write `path`, or `name-0.png` … `name-(n-1).png` for several, atomically, each with its recipe inside."""
        from sfumato.receipts.provenance import save_images

        return save_images(self, path)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {type(value).__name__}", argument=name)
    if len(value) > MAX_PROMPT:
        raise InputError(
            f"{name} has {len(value)} characters; at most {MAX_PROMPT} are accepted", argument=name
        )
    if "\0" in value:
        raise InputError(f"{name} holds a NUL character; remove it", argument=name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half of a surrogate pair at position {error.start}; give valid Unicode",
            argument=name,
        ) from None


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, not {_shown(value)}", argument=name)
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {_shown(value)}", argument=name)


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, not {_shown(value)}", argument=name)
    if not low <= value <= high:  # false for NaN too
        raise InputError(f"{name} must be between {low:g} and {high:g}, not {_shown(value)}", argument=name)


def _shown(value: object) -> str:
    """A value as a message can hold it: short, and without failing on a number of a million digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."
