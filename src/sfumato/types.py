"""The values that travel between the stages, and the legend of their shapes.

Legend, used on every line where a shape changes:
    B  batch          C  channels       T  frames (1 for a picture)
    H  height, W  width: latent cells, or pixels where said
    N  tokens         D  width of a token          K  attention heads

Pixels inside the system are float (B, 3, T, H, W) in [-1, 1]; a canonical latent is (B, C, T, H, W), normalised to
zero mean and unit variance per channel over its training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
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
MAX_BLUR = 256  # pixels
MAX_CLIP_SKIP = 24
MAX_REUSE = 10  # calls that share deep features; DeepCache goes to 10
MAX_LEVEL = 1e6  # of noise
MAX_WEIGHT = 100.0  # of a LoRA
MAX_LAYERS = 1_000  # of a network
MAX_TEXT_LENGTH = 512  # tokens of a text encoder without windows; T5 was trained on these
MAX_CONTROL = 10.0  # weight of a control picture
MAX_TOLD = 2**16  # pixels; of sizes that a network is told
MAX_FRAMES = 1_000
MAX_FPS = 240.0
MAX_MOTION = 1_023  # buckets; training had 0 to 255
FITS = ("cover", "contain", "stretch")


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told. The last four are for networks that ask for them, and None for others.

    tokens: (B, N, D) features of a text, or of a picture. mask: (B, N) bool, True where a token is real; None where all
    are read. vector: (B, V) pooled text and sizes. guidance: (B, G) the guidance scale, embedded. channels: (B, E, T,
    H, W) what the network sees beside the sample; of one frame where all frames see the same.
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
class Inpaint:
    """How a mask is used.

    blur: over how many pixels, counted inwards from the mask's edge, the painted part fades into the picture.
    paste: lay the given picture over everything outside the mask, so that there it comes back byte for byte.
    padding: None paints in the whole picture; a number paints only the mask's surroundings, that many pixels wide,
        at the request's full `size`, and puts them back. The picture may then have any size.
    """

    blur: int = 4
    paste: bool = True
    padding: int | None = None


@dataclass(frozen=True)
class HiRes:
    """A second pass over the enlarged picture.

    scale: sides are multiplied by it. strength: as in image-to-image; 0 only enlarges.
    steps: None takes the request's. upscaler: a name of `tasks.latent.UPSCALERS`; latent-… enlarge the latent,
    others the picture.
    """

    scale: float
    steps: int | None = None
    strength: float = 0.5
    upscaler: str = "lanczos"


@dataclass(frozen=True)
class Variation:
    """A second seed, and how far its noise replaces the first's: 0 not at all, 1 altogether."""

    seed: int
    strength: float


@dataclass(frozen=True)
class Control:
    """A picture that a ControlNet of the model reads beside the prompt.

    name: what that ControlNet was opened as: canny, depth … image: the picture; one of another size than is drawn is
    brought to it, and refused if its shape is another (see `Request.fit`). Transparency is black. weight: of what it
    adds; 1 is what it was trained for. start, end: the shares of the steps between which it acts. prepare: what to make
    of the picture first, a name of `tasks.hints.PREPARE`; None takes it as it is. guess: it acts on the prompt's half
    of guidance alone, and less on what is fine: for prompts that say nothing (diffusers' guess mode).
    """

    name: str
    image: Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    prepare: str | None = None
    guess: bool = False

    def validate(self) -> Control:
        """`InputError` for what no ControlNet could do."""
        if not isinstance(self.name, str) or not self.name:
            raise InputError(
                f"a control needs the name of its ControlNet, not {_shown(self.name)}", argument="controls"
            )
        what = f"control {self.name}"
        try:
            _picture(what, self.image)
            for name, value, most in (
                ("weight", self.weight, MAX_CONTROL),
                ("start", self.start, 1.0),
                ("end", self.end, 1.0),
            ):
                _number(f"{what}'s {name}", value, 0.0, most)
            if self.start > self.end:
                raise InputError(f"{what} starts at {self.start:g}, after its end at {self.end:g}")
            _name(f"{what}'s prepare", self.prepare)
            if not isinstance(self.guess, bool):
                raise InputError(f"{what}'s guess must be true or false, not {_shown(self.guess)}")
        except InputError as error:
            raise InputError(str(error), argument="controls") from None
        return self

    @classmethod
    def from_json(cls, value: object, pictures: dict[str, Image] | None = None) -> Control:
        """From an object such as {"name": "depth", "image": "sha256:…"}, its picture among `pictures`."""
        if isinstance(value, cls):
            return value
        try:
            found = _nested(cls, "controls", value)
        except InputError as error:
            raise InputError(str(error), argument="controls") from None
        assert isinstance(found, cls)
        if not isinstance(found.image, str):
            return found
        if found.image not in (pictures or {}):
            raise InputError(
                f"control {found.name} names the picture {_shown(found.image)}; give the picture itself",
                argument="controls",
            )
        return replace(found, image=(pictures or {})[found.image])

    def to_json(self) -> dict[str, Any]:
        """Plain values without those by default; the picture by its fingerprint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return values | {"image": _control_fingerprint(self.image)}


@dataclass(frozen=True)
class LoraUse:
    """A LoRA that a model has opened, and how much of it.

    name: what it was opened as. weight: 1 is what it was trained for, 0 none, and less its opposite. blocks: pairs, or
    a dictionary, of parts of the networks and factors of the weight there: ("down.1", 0.5), ("text", 0).
    """

    name: str
    weight: float = 1.0
    blocks: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.blocks, Mapping):
            object.__setattr__(self, "blocks", tuple(self.blocks.items()))

    def validate(self) -> LoraUse:
        """`InputError` for a name that is none and for numbers that are none or too large."""
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a LoRA's name must be text, not {_shown(self.name)}", argument="loras")
        _number(f"the weight of LoRA {_shown(self.name)}", self.weight, -MAX_WEIGHT, MAX_WEIGHT, "loras")
        pairs = self.blocks if isinstance(self.blocks, tuple) else None
        if pairs is None or not all(
            isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
        ):
            raise InputError(
                f"the blocks of LoRA {_shown(self.name)} must be names with factors, not {_shown(self.blocks)}",
                argument="loras",
            )
        for block, factor in pairs:
            _number(f"the factor of {_shown(block)} in a LoRA", factor, -MAX_WEIGHT, MAX_WEIGHT, "loras")
        return self

    @classmethod
    def from_json(cls, value: object) -> LoraUse:
        """From an object such as {"name": "ink", "weight": 0.8, "blocks": {"down.1": 0.5}}, or from a name."""
        if isinstance(value, LoraUse):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, dict) or "name" not in value or value.keys() - {"name", "weight", "blocks"}:
            raise InputError(
                f"a LoRA must be an object of name, weight and blocks, not {_shown(value)}", argument="loras"
            )
        if not isinstance(value.get("blocks", {}), dict):
            raise InputError("a LoRA's blocks must be an object of names and factors", argument="loras")
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"name": self.name, "weight": self.weight}
        return values | ({"blocks": dict(self.blocks)} if self.blocks else {})


@dataclass(frozen=True)
class Micro:
    """What SDXL is told of a picture beside the prompt: its micro-conditioning (Podell et al. 2023, sec. 2.2).

    Sizes are (width, height) and crops (left, top), in pixels; None is the size that is drawn, and no crop.
    original: the size a training picture of this kind had; a small one asks for the look of an enlarged picture.
    crop: where it was cut; other than (0, 0) the subject may leave the picture. target: the size it was cut to.
    aesthetic: the score of such a picture, 0 to 10, which the refiner is told in place of target; None is 6.
    negative_…: the same for the negative prompt; None is as for the prompt, and 2.5 for the score.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    aesthetic: float | None = None
    negative_original: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target: tuple[int, int] | None = None
    negative_aesthetic: float | None = None


@dataclass(frozen=True)
class Motion:
    """What Stable Video Diffusion is told of a clip beside the picture it begins with and its frames per second.

    bucket: how much moves, 0 to 255 in training. augment: deviation of the noise laid over the picture's pixels in
    [-1, 1]; more of it lets the clip part further from the picture.
    """

    bucket: int = 127
    augment: float = 0.02


@dataclass(frozen=True)
class Clip:
    """Pictures of one size, shown one after the other. fps: how many a second."""

    frames: tuple[Image, ...]
    fps: float

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps

    def validate(self) -> Clip:
        """`InputError` for what no clip is: fewer than two pictures, of several sizes, or a rate that is none."""
        if not isinstance(self.frames, tuple) or len(self.frames) < 2:
            raise InputError("a clip to begin with needs two frames or more", argument="clip")
        for frame in self.frames:
            _picture("clip", frame)
        if len({frame.size for frame in self.frames}) > 1:
            raise InputError("the frames of a clip must have one size", argument="clip")
        _number("a clip's fps", self.fps, 0.0, MAX_FPS, "clip")
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain values; the frames by their fingerprints."""
        return {"frames": [_fingerprint(frame) for frame in self.frames], "fps": self.fps}

    @classmethod
    def from_json(cls, value: object, pictures: dict[str, Image] | None = None) -> Clip:
        """From such values, with the frames among `pictures`."""
        if isinstance(value, cls):
            return value
        try:
            found = _nested(cls, "clip", value)
        except InputError as error:
            raise InputError(str(error), argument="clip") from None
        assert isinstance(found, cls)
        named = found.frames if isinstance(found.frames, tuple) else ()
        missing = [name for name in named if isinstance(name, str) and name not in (pictures or {})]
        if missing:
            raise InputError(
                f"clip names {len(missing)} frames, of which {_shown(missing[0])} is the first; give the clip itself",
                argument="clip",
            )
        frames = tuple((pictures or {})[name] if isinstance(name, str) else name for name in named)
        return cls(frames, found.fps)


@dataclass(frozen=True)
class SkipLayers:
    """Guidance away from what the network draws without some of its layers (`diffusion.guidance.Skipping`).

    layers: their numbers, counted from 0; 7, 8 and 9 are Stability's for SD 3.5 Medium, and so are the other values.
    interval: shares of the schedule's steps, of which those between the two have it; the first step never has.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    interval: tuple[float, float] = (0.01, 0.2)


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

    @property
    def moves(self) -> bool:
        """Whether a clip is asked for."""
        return (self.frames or 1) > 1

    @classmethod
    def from_dict(cls, values: dict[str, Any], pictures: Iterable[Image] = ()) -> Request:
        """Build from plain JSON values; an unknown field is an `InputError` that lists the known ones.

        JSON names a picture by its fingerprint, as `to_dict` does; the pictures themselves are among `pictures`.
        """
        if not isinstance(values, dict):
            raise InputError(f"a request must be an object of named fields, not {_shown(values)}")
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(
                    f"unknown field {_shown(name)}; a request has {', '.join(known)}", argument=name
                )
        values = dict(values)
        for name in ("size", "outpaint", "guidance_interval"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        if isinstance(values.get("loras"), list | tuple):
            values["loras"] = tuple(LoraUse.from_json(value) for value in values["loras"])
        for name, kind in _NESTED.items():
            if values.get(name) is not None:
                values[name] = _nested(kind, name, values[name])
        if values.get("clip") is not None:
            values["clip"] = Clip.from_json(values["clip"], _fingerprints(pictures := tuple(pictures)))
        if isinstance(values.get("controls"), list | tuple):
            known_controls = _control_fingerprints(pictures := tuple(pictures))
            values["controls"] = tuple(Control.from_json(each, known_controls) for each in values["controls"])
        named = [name for name in ("image", "mask") if isinstance(values.get(name), str)]
        if named:
            known_pictures = _fingerprints(pictures)
            for name in named:
                if values[name] not in known_pictures:
                    raise InputError(
                        f"{name} names the picture {_shown(values[name])}; give the picture itself",
                        argument=name,
                    )
                values[name] = known_pictures[values[name]]
        return cls(**values).validate()

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without what is None; pictures by their fingerprints."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                continue
            if f.name == "image":
                value = _fingerprint(value)
            elif f.name == "mask":
                value = _mask_fingerprint(value)
            elif f.name == "clip":
                value = value.to_json()
            elif f.name == "loras":
                value = [use.to_json() for use in value]
            elif f.name == "controls":
                value = [control.to_json() for control in value]
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
        _text("prompt", self.prompt)
        if self.negative is not None:
            _text("negative", self.negative)
        _integer("count", self.count, 1, MAX_COUNT)
        _integer("seed", self.seed, 0, MAX_SEED)
        if self.steps is not None:
            _integer("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, 100.0)
        if self.guidance_first is not None:
            _number("guidance_first", self.guidance_first, 0.0, 100.0)
        if self.frames is not None:
            _integer("frames", self.frames, 1, MAX_FRAMES)
        if self.fps is not None:
            _number("fps", self.fps, 1.0, MAX_FPS)
        for name in ("sampler", "schedule", "prompt_rules", "weighting"):
            _name(name, getattr(self, name))
        if self.size is not None:
            if not (isinstance(self.size, tuple) and len(self.size) == 2):
                raise InputError(f"size must be (width, height), not {_shown(self.size)}", argument="size")
            _integer("width", self.size[0], 1, MAX_SIDE)
            _integer("height", self.size[1], 1, MAX_SIDE)
        if self.eta is not None:
            _number("eta", self.eta, 0.0, 1.0)
        if self.refine_at is not None:
            _number("refine_at", self.refine_at, 0.0, 1.0)
        if self.loras is not None:
            _loras(self.loras)
        if self.clip_skip is not None:
            _integer("clip_skip", self.clip_skip, 1, MAX_CLIP_SKIP)
        if self.text_length is not None:
            _integer("text_length", self.text_length, 1, MAX_TEXT_LENGTH)
        if self.reuse is not None:
            _integer("reuse", self.reuse, 1, MAX_REUSE)
        if self.guidance_interval is not None:
            _interval("guidance_interval", self.guidance_interval)
        self._validate_picture()
        self._validate_nested()
        if self.controls is not None:
            if not isinstance(self.controls, tuple) or not all(isinstance(c, Control) for c in self.controls):
                raise InputError(
                    f"controls must be a tuple of Control, not {_shown(self.controls)}", argument="controls"
                )
            for control in self.controls:
                control.validate()
        return self

    def _validate_picture(self) -> None:
        for name in ("image", "mask"):
            if getattr(self, name) is not None:
                _picture(name, getattr(self, name))
        for name in ("strength", "fit", "mask", "outpaint"):
            given = self.image is not None or (name == "fit" and bool(self.controls))
            given = given or (name in ("fit", "strength") and self.clip is not None)
            if getattr(self, name) is not None and not given:
                raise InputError(f"{name} needs an image to work on", argument=name)
        if self.clip is not None:
            if not isinstance(self.clip, Clip):
                raise InputError(f"clip must be of type Clip, not {_shown(self.clip)}", argument="clip")
            self.clip.validate()
        if self.strength is not None:
            _number("strength", self.strength, 0.0, 1.0)
        if self.fit is not None and self.fit not in FITS:
            raise InputError(f"fit must be {_either(FITS)}, not {_shown(self.fit)}", argument="fit")
        if self.outpaint is not None:
            if not (isinstance(self.outpaint, tuple) and len(self.outpaint) == 4):
                raise InputError(
                    f"outpaint must be (left, top, right, bottom), not {_shown(self.outpaint)}",
                    argument="outpaint",
                )
            for side, pixels in zip(("left", "top", "right", "bottom"), self.outpaint, strict=True):
                _integer(f"outpaint's {side}", pixels, 0, MAX_SIDE, "outpaint")
            if not any(self.outpaint):
                raise InputError("outpaint adds no pixels; give at least one side some", argument="outpaint")

    def _validate_nested(self) -> None:
        for name, kind in _NESTED.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InputError(
                    f"{name} must be of type {kind.__name__}, not {_shown(value)}", argument=name
                )
        if self.inpaint is not None:
            if self.mask is None and self.outpaint is None:
                raise InputError("inpaint needs a mask, or outpaint", argument="inpaint")
            _integer("inpaint.blur", self.inpaint.blur, 0, MAX_BLUR)
            if not isinstance(self.inpaint.paste, bool):
                raise InputError(
                    f"inpaint.paste must be true or false, not {_shown(self.inpaint.paste)}",
                    argument="inpaint.paste",
                )
            if self.inpaint.padding is not None:
                _integer("inpaint.padding", self.inpaint.padding, 0, MAX_SIDE)
                if self.outpaint is not None:
                    raise InputError(
                        "inpaint.padding draws part of a picture, and outpaint the whole: choose one",
                        argument="inpaint.padding",
                    )
        if self.hires is not None:
            _number("hires.scale", self.hires.scale, 1.0, 16.0)
            _number("hires.strength", self.hires.strength, 0.0, 1.0)
            if self.hires.steps is not None:
                _integer("hires.steps", self.hires.steps, 1, MAX_STEPS)
            _name("hires.upscaler", self.hires.upscaler)
            if self.mask is not None or self.outpaint is not None:
                raise InputError(
                    "hires redraws the whole picture, which a mask or outpaint promises to keep: "
                    "do one after the other",
                    argument="hires",
                )
        if self.variation is not None:
            _integer("variation.seed", self.variation.seed, 0, MAX_SEED)
            _number("variation.strength", self.variation.strength, 0.0, 1.0)
        if self.micro is not None:
            _validate_micro(self.micro)
        if self.motion is not None:
            _integer("motion.bucket", self.motion.bucket, 0, MAX_MOTION)
            _number("motion.augment", self.motion.augment, 0.0, 10.0)
        if self.skip_layers is not None:
            _validate_skip_layers(self.skip_layers)


_NESTED: dict[str, type] = {
    "inpaint": Inpaint,
    "hires": HiRes,
    "variation": Variation,
    "micro": Micro,
    "motion": Motion,
    "skip_layers": SkipLayers,
}


def _validate_skip_layers(skip: SkipLayers) -> None:
    if not isinstance(skip.layers, tuple) or not skip.layers:
        raise InputError(
            f"skip_layers.layers must be some numbers of layers, not {_shown(skip.layers)}",
            argument="skip_layers.layers",
        )
    for layer in skip.layers:
        _integer("skip_layers.layers", layer, 0, MAX_LAYERS)
    if len(set(skip.layers)) < len(skip.layers):
        raise InputError("skip_layers.layers names a layer twice", argument="skip_layers.layers")
    _number("skip_layers.scale", skip.scale, 0.0, 100.0)
    _interval("skip_layers.interval", skip.interval)
    if skip.interval[1] > 1:
        raise InputError(
            f"skip_layers.interval has shares of the steps, 0 to 1, not {_shown(skip.interval)}",
            argument="skip_layers.interval",
        )


def _validate_micro(micro: Micro) -> None:
    for f in fields(micro):
        name, value = f"micro.{f.name}", getattr(micro, f.name)
        if value is None:
            continue
        if f.name.endswith("aesthetic"):
            _number(name, value, 0.0, 10.0)
            continue
        pair = "(left, top)" if f.name.endswith("crop") else "(width, height)"
        if not (isinstance(value, tuple) and len(value) == 2):
            raise InputError(f"{name} must be {pair}, not {_shown(value)}", argument=name)
        for side in value:
            _integer(name, side, 0 if f.name.endswith("crop") else 1, MAX_TOLD)


@dataclass(frozen=True)
class Result:
    """Pictures, or clips, and how they came to be. recipe: plain JSON: request, model, hashes, versions, seconds."""

    images: tuple[Image, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    clips: tuple[Clip, ...] = ()

    def save(self, path: str | Path) -> list[Path]:
        """Write `path`, or `name-0.png` … `name-(n-1).png` for several, atomically, each with its recipe inside.

        Pictures are written as .png, .jpg or .webp, clips as .mp4, .webm, .gif, .webp or, without an ending, as folders
        of .png.
        """
        from sfumato.receipts.clips import save_clips
        from sfumato.receipts.provenance import save_images

        return save_clips(self, path) if self.clips else save_images(self, path)


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


def _name(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be a name, not {_shown(value)}", argument=name)


def _integer(name: str, value: object, low: int, high: int, argument: str | None = None) -> None:
    argument = argument or name
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, not {_shown(value)}", argument=argument)
    if not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {_shown(value)}", argument=argument)


def _number(name: str, value: object, low: float, high: float, argument: str | None = None) -> None:
    argument = argument or name
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, not {_shown(value)}", argument=argument)
    if not low <= value <= high:  # false for NaN too
        raise InputError(
            f"{name} must be between {low:g} and {high:g}, not {_shown(value)}", argument=argument
        )


def _loras(value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(use, LoraUse) for use in value):
        raise InputError(f"loras must be a tuple of LoraUse, not {_shown(value)}", argument="loras")
    for use in value:
        use.validate()
    names = [use.name for use in value]
    if len(set(names)) < len(names):
        raise InputError("loras names one twice; add up its weights", argument="loras")


def _interval(name: str, value: object) -> None:
    if not (isinstance(value, tuple) and len(value) == 2):
        raise InputError(f"{name} must be (low, high), not {_shown(value)}", argument=name)
    for end, bound in zip(("low", "high"), value, strict=True):
        _number(f"{name}.{end}", bound, 0.0, MAX_LEVEL)
    if value[0] > value[1]:
        raise InputError(f"{name} must go from low to high, not {_shown(value)}", argument=name)


def _picture(name: str, value: object) -> None:
    from PIL.Image import Image

    if not isinstance(value, Image):
        raise InputError(
            f"{name} must be a PIL picture (`sfumato.pictures` makes one of a file or an array), not "
            f"{type(value).__name__}",
            argument=name,
        )
    if 0 in value.size:
        raise InputError(f"{name} has no pixels", argument=name)


def _nested(kind: type, name: str, value: object) -> object:
    """`kind` from the JSON object `value`."""
    if isinstance(value, kind):
        return value
    known = {f.name: f for f in fields(kind)}
    if not isinstance(value, dict):
        raise InputError(
            f"{name} must be an object of {', '.join(known)}, not {_shown(value)}", argument=name
        )
    for inner in value:
        if inner not in known:
            raise InputError(
                f"{name} has no field {_shown(inner)}; it has {', '.join(known)}", argument=f"{name}.{inner}"
            )
    for inner, f in known.items():
        if inner not in value and f.default is MISSING:
            raise InputError(f"{name} needs {inner}", argument=f"{name}.{inner}")
    return kind(**{inner: tuple(v) if isinstance(v, list) else v for inner, v in value.items()})


def _fingerprint(image: Image) -> str:
    from sfumato.pictures import fingerprint, flatten

    return fingerprint(flatten(image, "image"))


def _mask_fingerprint(mask: Image) -> str:
    from sfumato.pictures import binary, fingerprint

    return fingerprint(binary(mask, "mask"))


def _control_fingerprint(image: Image) -> str:
    from sfumato.pictures import BLACK, fingerprint, flatten

    return fingerprint(flatten(image, "a control picture", BLACK))


def _control_fingerprints(pictures: Iterable[Image]) -> dict[str, Image]:
    return {_control_fingerprint(picture): picture for picture in pictures}


def _fingerprints(pictures: Iterable[Image]) -> dict[str, Image]:
    """Every picture under the names that it has as an image and as a mask."""
    found: dict[str, Image] = {}
    for picture in pictures:
        found[_fingerprint(picture)] = found[_mask_fingerprint(picture)] = picture
    return found


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _shown(value: object) -> str:
    """A value as a message can hold it: short, and without failing on a number of a million digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of very many digits"
    return text if len(text) <= 80 else text[:77] + "..."
