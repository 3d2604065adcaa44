"""The values that travel between the stages, and the legend of their shapes.

Legend, used on every line where a shape changes:
    B  batch          C  channels       T  frames (1 for a picture)
    H  height, W  width: latent cells, or pixels where said
    N  tokens         D  width of a token          K  attention heads

Pixels inside the system are float (B, 3, T, H, W) in [-1, 1]; a canonical latent is (B, C, T, H, W), normalised to
zero mean and unit variance per channel over its training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from sfumato import checks
from sfumato.errors import InputError
from sfumato.parts import (
    MAX_FPS,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    Clip,
    Control,
    HiRes,
    Inpaint,
    LoraUse,
    Micro,
    Motion,
    Part,
    SkipLayers,
    Variation,
    fingerprint,
    known_picture,
    nested,
    tupled,
)

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    from sfumato.receipts.signing import Signer

MAX_COUNT = 64
MAX_CLIP_SKIP = 24
MAX_REUSE = 10  # calls that share deep features; DeepCache goes to 10
MAX_TEXT_LENGTH = 512  # tokens of a text encoder without windows; T5 was trained on these
MAX_FRAMES = 20_000
MAX_CLIP_PIXELS = 1_500_000_000  # of all frames of a clip together, three bytes each
FITS = ("cover", "contain", "stretch")
PARTS: dict[str, type[Part]] = {
    "inpaint": Inpaint,
    "hires": HiRes,
    "variation": Variation,
    "micro": Micro,
    "motion": Motion,
    "skip_layers": SkipLayers,
}
LISTS: dict[str, Any] = {"loras": LoraUse, "controls": Control}  # fields with several of one part


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told. The last four are for networks that ask for them, and None for others.

    tokens: (B, N, D) features of a text, or of a picture. mask: (B, N) bool, True where a token is real; or numbers,
    how many equal tokens each one stands for; None where all are read, once each. vector: (B, V) pooled text and sizes.
    guidance: (B, G) the guidance scale, embedded. channels: (B, E, T, H, W) what the network sees beside the sample, of
    one frame where all frames see the same; or the latents that are known at the beginning of a clip, (B, C, 0, 1, 1)
    where there are none.
    """

    tokens: Tensor
    mask: Tensor | None = None
    vector: Tensor | None = None
    guidance: Tensor | None = None
    channels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def change(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with `change` applied to every tensor that is there."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in tensors.items() if v is not None})


@dataclass(frozen=True)
class Request:
    """One wish for pictures, shared by Python, the command line and HTTP; `validate` is the only gatekeeper.

    None means the model's own preset, or that something is not wanted. No `negative` is what the model's family makes
    of it, which need not be the empty text: SDXL was trained with features of zero there. `size` is (width, height) in
    pixels. Picture k has seed `seed + k` (modulo 2**64), so it is the picture of a request for that seed alone (see
    `part`).

    From a picture:
        image: the picture to begin with. Without `size` the pictures drawn have its size.
        strength: how much of it to redraw. Sampling begins int(steps · strength) steps before the end of the
            schedule, as in diffusers; 1 is text to image, 0 only passes it through the autoencoder. None is 0.75,
            or 1 with a mask or outpainting.
        fit: how to bring the picture to another size: cover (scaled and cropped in the middle), contain (scaled, the
            rest filled with its edge) or stretch. None refuses another size.
        mask: white where to paint, black where to keep; of the size of `image`. `inpaint`: how it is used.
        outpaint: pixels to add at the (left, top, right, bottom). `size` is then that of the whole.
    hires: enlarge the picture and draw over it once more.
    variation: mix in the noise of a second seed. Then picture k has the variation's seed + k, and `seed` stays.
    eta: fresh noise of the samplers that know the word, from 0 to 1.
    clip_skip: which layer of a CLIP text encoder to take from the end, as web UIs count: 1 the last, 2 the one before.

    Faster, and not quite the same picture:
        reuse: of how many calls of the network only the first computes its deep features; 1 is every one, exact.
        guidance_interval: guide only where low < sigma <= high, as the model counts sigma; the others cost half.
    prompt_rules: what brackets and signs in prompts mean to a CLIP text encoder, a name of `text.syntax.RULES`; None is
        a1111. weighting: what a weight does to a token's features, one of `text.weighting.WEIGHTINGS`; None is the way
        of those rules.
    text_length: tokens that a text encoder without windows (T5) reads at least; None is its model's. A longer prompt is
        read whole.
    skip_layers: more guidance, away from a network that lacks layers, at the cost of a call in each step that has it.
    micro: what SDXL is told of sizes, crops and aesthetics.
    refine_at: the share of the noise levels, from the noisiest, after which a model's refiner takes over, diffusers'
        denoising_end; None is 0.8 where there is a refiner.
    Clips, of models that draw them:
        frames: how many; None is as many as the model was made for. A model of clips draws a picture of 1.
        fps: frames per second, of which such a model may be told, and at which the clip is shown.
        image: the clip's first picture; `fit` is then cover unless it says otherwise, and without `size` the clip has
            the model's own, on end if the picture is.
        guidance_first: guidance of the first frame; from there it changes evenly to `guidance`, which is the last's.
        motion: how much is to move.
        clip: frames to begin with instead of noise, as `strength` of them is redrawn; 0.75 by default. Without `frames`
            all are taken, without `fps` their own rate, and without `image` the first is the picture. `fit` as of
            image.
    loras: which of the LoRAs that the model has opened to draw with, and how much; None is as they were attached.
    controls: pictures that ControlNets of the model read. Then `fit` brings these to the size that is drawn, too.
    """

    prompt: str = ""
    negative: str | None = None
    count: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    size: tuple[int, int] | None = None
    image: Image | None = None
    strength: float | None = None
    fit: str | None = None
    mask: Image | None = None
    inpaint: Inpaint | None = None
    outpaint: tuple[int, int, int, int] | None = None
    hires: HiRes | None = None
    variation: Variation | None = None
    eta: float | None = None
    clip_skip: int | None = None
    reuse: int | None = None
    guidance_interval: tuple[float, float] | None = None
    prompt_rules: str | None = None
    weighting: str | None = None
    text_length: int | None = None
    skip_layers: SkipLayers | None = None
    micro: Micro | None = None
    refine_at: float | None = None
    loras: tuple[LoraUse, ...] | None = None
    controls: tuple[Control, ...] | None = None
    frames: int | None = None
    fps: float | None = None
    guidance_first: float | None = None
    motion: Motion | None = None
    clip: Clip | None = None

    def __post_init__(self) -> None:
        tupled(self)

    @property
    def moves(self) -> bool:
        """Whether a clip is asked for."""
        return (self.frames or 1) > 1

    @property
    def first_given(self) -> bool:
        """Whether the first frame of the clip that is asked for is given: a picture, and no clip to draw over."""
        return self.moves and self.image is not None and self.clip is None

    @classmethod
    def from_dict(cls, values: dict[str, Any], pictures: Iterable[Image] = ()) -> Request:
        """Build from plain JSON values; an unknown field is an `InputError` that lists the known ones.

        JSON names a picture by its fingerprint, as `to_dict` does; the pictures themselves are among `pictures`.
        """
        if not isinstance(values, dict):
            raise InputError(f"a request must be an object of named fields, not {checks.shown(values)}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(
                    f"unknown field {checks.shown(name)}; a request has {', '.join(known)}", argument=name
                )
        values = dict(values)
        pictures = tuple(pictures)
        for name, kind in PARTS.items():
            if values.get(name) is not None:
                values[name] = nested(kind, name, values[name])
        for name, kind in LISTS.items():
            if isinstance(values.get(name), list | tuple):
                values[name] = tuple(
                    _entry(kind, name, number, each, pictures) for number, each in enumerate(values[name])
                )
            elif values.get(name) is not None:
                raise InputError(f"{name} must be a list, not {checks.shown(values[name])}", argument=name)
        for name in ("image", "mask"):
            if isinstance(values.get(name), str):
                values[name] = known_picture(name, values[name], pictures, name)
        if values.get("clip") is not None:
            values["clip"] = Clip.from_json(values["clip"], pictures)
        return cls(**values).validate()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without what is None; pictures by their fingerprints."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            if f.name in ("image", "mask"):
                value = fingerprint(f.name, value)
            elif f.name == "clip":
                value = value.to_json()
            elif f.name in LISTS:
                value = [each.to_json() for each in value]
            elif is_dataclass(value):
                inner = {g.name: getattr(value, g.name) for g in fields(value)}
                value = {name: v for name, v in inner.items() if v is not None}
            values[f.name] = value
        return values

    def with_defaults(self, **defaults: Any) -> Request:
        """Fill every field that is None from `defaults`."""
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def for_some(self) -> list[str]:
        """The fields given, inner ones as `micro.crop`, that only some families of models read."""
        given = [
            name
            for name in (
                *("prompt_rules", "weighting", "text_length"),
                *("frames", "fps", "guidance_first", "motion", "clip"),
            )
            if getattr(self, name) is not None
        ]
        if self.motion is not None and self.motion.augment != Motion.augment:
            given.insert(0, "motion.augment")
        if self.micro is not None:
            given += [
                f"micro.{f.name}" for f in fields(self.micro) if getattr(self.micro, f.name) is not None
            ]
        return given

    def seeds(self) -> list[int]:
        """The seed of each picture."""
        if self.variation is not None:
            return [self.seed] * self.count
        return [(self.seed + k) % (MAX_SEED + 1) for k in range(self.count)]

    def part(self, start: int, count: int = 1) -> Request:
        """The request for pictures `start` … `start + count − 1` of this one, to the bit."""
        if self.variation is not None:
            seed = (self.variation.seed + start) % (MAX_SEED + 1)
            return replace(self, count=count, variation=replace(self.variation, seed=seed))
        return replace(self, count=count, seed=(self.seed + start) % (MAX_SEED + 1))

    def validate(self) -> Request:
        """Check everything that can be known without a model; return self. Raises `InputError` naming the argument."""
        checks.text("prompt", self.prompt)
        if self.negative is not None:
            checks.text("negative", self.negative)
        checks.integer("count", self.count, 1, MAX_COUNT)
        checks.integer("seed", self.seed, 0, MAX_SEED)
        if self.steps is not None:
            checks.integer("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            checks.number("guidance", self.guidance, 0.0, 100.0)
        if self.guidance_first is not None:
            checks.number("guidance_first", self.guidance_first, 0.0, 100.0)
        if self.frames is not None:
            checks.integer("frames", self.frames, 1, MAX_FRAMES)
        if self.fps is not None:
            checks.number("fps", self.fps, 1.0, MAX_FPS)
        for name in ("sampler", "schedule", "prompt_rules", "weighting"):
            checks.name(name, getattr(self, name))
        if self.size is not None:
            if not (isinstance(self.size, tuple) and len(self.size) == 2):
                raise InputError(
                    f"size must be two numbers, width and height, not {checks.shown(self.size)}",
                    argument="size",
                )
            for side, pixels in zip(("width", "height"), self.size, strict=True):
                checks.integer(f"size's {side}", pixels, 1, MAX_SIDE, "size")
        if self.eta is not None:
            checks.number("eta", self.eta, 0.0, 1.0)
        if self.refine_at is not None:
            checks.number("refine_at", self.refine_at, 0.0, 1.0)
        if self.clip_skip is not None:
            checks.integer("clip_skip", self.clip_skip, 1, MAX_CLIP_SKIP)
        if self.text_length is not None:
            checks.integer("text_length", self.text_length, 1, MAX_TEXT_LENGTH)
        if self.reuse is not None:
            checks.integer("reuse", self.reuse, 1, MAX_REUSE)
        if self.guidance_interval is not None:
            checks.interval("guidance_interval", self.guidance_interval)
        self._validate_picture()
        self._validate_parts()
        return self

    def _validate_picture(self) -> None:
        for name in ("image", "mask"):
            if getattr(self, name) is not None:
                checks.picture(name, getattr(self, name))
        for name in ("strength", "fit", "mask", "outpaint"):
            given = self.image is not None or (name == "fit" and bool(self.controls))
            given = given or (name in ("fit", "strength") and self.clip is not None)
            if getattr(self, name) is not None and not given:
                what = "a `clip` to begin with" if self.frames is not None else "an `image` to work on"
                what += ", or an `image`" if self.frames is not None and name == "fit" else ""
                raise InputError(f"{name} needs {what}", argument=name)
        if self.clip is not None:
            if not isinstance(self.clip, Clip):
                raise InputError(f"clip must be of type Clip, not {checks.shown(self.clip)}", argument="clip")
            self.clip.validate()
        if self.strength is not None:
            checks.number("strength", self.strength, 0.0, 1.0)
        if self.fit is not None and self.fit not in FITS:
            raise InputError(
                f"fit must be {checks.either(FITS)}, not {checks.shown(self.fit)}", argument="fit"
            )
        if self.outpaint is not None:
            if not (isinstance(self.outpaint, tuple) and len(self.outpaint) == 4):
                raise InputError(
                    f"outpaint must be four numbers, left, top, right and bottom, not {checks.shown(self.outpaint)}",
                    argument="outpaint",
                )
            for side, pixels in zip(("left", "top", "right", "bottom"), self.outpaint, strict=True):
                checks.integer(f"outpaint's {side}", pixels, 0, MAX_SIDE, "outpaint")
            if not any(self.outpaint):
                raise InputError("outpaint adds no pixels; give at least one side some", argument="outpaint")

    def _validate_parts(self) -> None:
        for name, kind in PARTS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InputError(
                    f"{name} must be of type {kind.__name__}, not {checks.shown(value)}", argument=name
                )
            if value is not None:
                value.validate()
        for name, kind in LISTS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, tuple) or not all(isinstance(each, kind) for each in value):
                raise InputError(
                    f"{name} must be a tuple of {kind.__name__}, not {checks.shown(value)}", argument=name
                )
            for each in value:
                each.validate()
        names = [use.name for use in self.loras or ()]
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise InputError(
                f"loras names {checks.shown(twice[0])} twice; add up its weights", argument="loras"
            )
        if self.inpaint is not None:
            if self.mask is None and self.outpaint is None:
                raise InputError("inpaint needs a `mask`, or `outpaint`", argument="inpaint")
            if self.inpaint.padding is not None and self.outpaint is not None:
                raise InputError(
                    "inpaint.padding draws part of a picture, and `outpaint` the whole: choose one",
                    argument="inpaint.padding",
                )
        if self.hires is not None and (self.mask is not None or self.outpaint is not None):
            raise InputError(
                "hires redraws the whole picture, which a `mask` or `outpaint` promises to keep: "
                "do one after the other",
                argument="hires",
            )


def _entry(kind: Any, name: str, number: int, value: Any, pictures: tuple[Image, ...]) -> Any:
    """One of a list, whose number the error says."""
    try:
        return kind.from_json(value, pictures)
    except InputError as error:
        if not (said := str(error)).startswith(f"{name} "):
            raise
        raise InputError(f"{name}[{number}]{said.removeprefix(name)}", argument=name) from None


@dataclass(frozen=True)
class Result:
    """Pictures, or clips, and how they came to be. recipe: plain JSON: request, model, hashes, versions, seconds."""

    images: tuple[Image, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    clips: tuple[Clip, ...] = ()

    def save(self, path: str | Path, sign: Signer | None = None) -> list[Path]:
        """Write `path`, or `name-0.png` … `name-(n-1).png` for several, atomically, each with its recipe inside.

        Pictures are written as .png, .jpg or .webp, clips as .mp4, .webm, .gif, .webp or, without an ending, as folders
        of .png. sign: who seals pictures with a C2PA manifest (`receipts.signing.open_signer`); clips are not signed.
        """
        from sfumato.receipts.clips import save_clips
        from sfumato.receipts.provenance import save_images

        if self.clips and sign is not None:
            raise InputError("clips are not signed; sign pictures (.png, .jpg, .webp)", argument="sign")
        return save_clips(self, path) if self.clips else save_images(self, path, sign)
