"""The parts of a request that have fields of their own. Each can `validate` itself: what is known without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sfumato import checks
from sfumato.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_STEPS = 1_000
MAX_SIDE = 4_096  # pixels
MAX_SEED = 2**64 - 1
MAX_BLUR = 256  # pixels
MAX_WEIGHT = 100.0  # of a LoRA
MAX_LAYERS = 1_000  # of a network
MAX_CONTROL = 10.0  # weight of a control picture
MAX_FPS = 240.0
MAX_MOTION = 1_023  # buckets; training had 0 to 255
MAX_TOLD = 2**16  # pixels; of sizes that a network is told


Kind = TypeVar("Kind", bound="Part")


def tupled(part: Any) -> None:
    """Have a frozen dataclass hold tuples where it was given lists, as JSON has them."""
    for f in fields(part):
        if isinstance(value := getattr(part, f.name), list):
            object.__setattr__(part, f.name, tuple(value))


class Part:
    """What the parts have in common."""

    def __post_init__(self) -> None:
        tupled(self)

    def validate(self) -> Self:
        """Itself, or `InputError` for values that no model could take."""
        raise NotImplementedError


@dataclass(frozen=True)
class Inpaint(Part):
    """How a mask is used.

    blur: over how many pixels, counted inwards from the mask's edge, the painted part fades into the picture.
    paste: lay the given picture over everything outside the mask, so that there it comes back byte for byte.
    padding: None paints in the whole picture; a number paints only the mask's surroundings, that many pixels wide,
        at the request's full `size`, and puts them back. The picture may then have any size.
    """

    blur: int = 4
    paste: bool = True
    padding: int | None = None

    def validate(self) -> Self:
        checks.integer("inpaint.blur", self.blur, 0, MAX_BLUR)
        if not isinstance(self.paste, bool):
            raise InputError(
                f"inpaint.paste must be true or false, not {checks.shown(self.paste)}",
                argument="inpaint.paste",
            )
        if self.padding is not None:
            checks.integer("inpaint.padding", self.padding, 0, MAX_SIDE)
        return self


@dataclass(frozen=True)
class HiRes(Part):
    """A second pass over the enlarged picture.

    scale: sides are multiplied by it. strength: as in image-to-image; 0 only enlarges.
    steps: None takes the request's. upscaler: a name of `tasks.latent.UPSCALERS`; latent-… enlarge the latent,
    others the picture.
    """

    scale: float
    steps: int | None = None
    strength: float = 0.5
    upscaler: str = "lanczos"

    def validate(self) -> Self:
        checks.number("hires.scale", self.scale, 1.0, 16.0)
        checks.number("hires.strength", self.strength, 0.0, 1.0)
        if self.steps is not None:
            checks.integer("hires.steps", self.steps, 1, MAX_STEPS)
        checks.name("hires.upscaler", self.upscaler)
        return self


@dataclass(frozen=True)
class Variation(Part):
    """A second seed, and how far its noise replaces the first's: 0 not at all, 1 altogether."""

    seed: int
    strength: float

    def validate(self) -> Self:
        checks.integer("variation.seed", self.seed, 0, MAX_SEED)
        checks.number("variation.strength", self.strength, 0.0, 1.0)
        return self


@dataclass(frozen=True)
class Control(Part):
    """A picture that a ControlNet of the model reads beside the prompt.

    name: what that ControlNet was opened as: canny, depth … image: the picture; one of another size than is drawn is
    brought to it, and refused if its shape is another (see `Request.fit`). Transparency is black. weight: of what it
    adds; 1 is what it was trained for. start, end: the shares of the steps between which it acts. prepare: what to make
    of the picture first, a name of `tasks.hints.PREPARE` or of the model's annotators; None takes it as it is.
    guess: it acts on the prompt's half of guidance alone, and less on what is fine: for prompts that say nothing
    (diffusers' guess mode).
    """

    name: str
    image: Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    prepare: str | None = None
    guess: bool = False

    def validate(self) -> Self:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(
                f"a control needs the name of its ControlNet, not {checks.shown(self.name)}",
                argument="controls",
            )
        what = f"control {self.name}"
        try:
            checks.picture(what, self.image)
            for name, value, most in (
                ("weight", self.weight, MAX_CONTROL),
                ("start", self.start, 1.0),
                ("end", self.end, 1.0),
            ):
                checks.number(f"{what}'s {name}", value, 0.0, most)
            if self.start > self.end:
                raise InputError(f"{what} starts at {self.start:g}, after its end at {self.end:g}")
            checks.name(f"{what}'s prepare", self.prepare)
            if not isinstance(self.guess, bool):
                raise InputError(f"{what}'s guess must be true or false, not {checks.shown(self.guess)}")
        except InputError as error:
            raise InputError(str(error), argument="controls") from None
        return self

    @classmethod
    def from_json(cls, value: object, pictures: Iterable[Image] = ()) -> Control:
        """From an object such as {"name": "depth", "image": "sha256:…"}, its picture among `pictures`."""
        if isinstance(value, cls):
            return value
        try:
            found = nested(cls, "controls", value)
        except InputError as error:
            raise InputError(str(error), argument="controls") from None
        if not isinstance(found.image, str):
            return found
        picture = known_picture("control", found.image, pictures, f"control {found.name}", "controls")
        return replace(found, image=picture)

    def to_json(self) -> dict[str, Any]:
        """Plain values without those by default; the picture by its fingerprint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return values | {"image": fingerprint("control", self.image)}


@dataclass(frozen=True)
class LoraUse(Part):
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
        super().__post_init__()

    def validate(self) -> Self:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a LoRA's name must be text, not {checks.shown(self.name)}", argument="loras")
        checks.number(
            f"the weight of LoRA {checks.shown(self.name)}", self.weight, -MAX_WEIGHT, MAX_WEIGHT, "loras"
        )
        pairs = self.blocks if isinstance(self.blocks, tuple) else None
        if pairs is None or not all(
            isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in pairs
        ):
            raise InputError(
                f"the blocks of LoRA {checks.shown(self.name)} must be names with factors, "
                f"not {checks.shown(self.blocks)}",
                argument="loras",
            )
        for block, factor in pairs:
            checks.number(
                f"the factor of {checks.shown(block)} in a LoRA", factor, -MAX_WEIGHT, MAX_WEIGHT, "loras"
            )
        return self

    @classmethod
    def from_json(cls, value: object, pictures: Iterable[Image] = ()) -> LoraUse:
        """From an object such as {"name": "ink", "weight": 0.8, "blocks": {"down.1": 0.5}}, or from a name."""
        if isinstance(value, LoraUse):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, dict) or "name" not in value or value.keys() - {"name", "weight", "blocks"}:
            raise InputError(
                f"a LoRA must be an object of name, weight and blocks, not {checks.shown(value)}",
                argument="loras",
            )
        if not isinstance(value.get("blocks", {}), dict):
            raise InputError("a LoRA's blocks must be an object of names and factors", argument="loras")
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"name": self.name, "weight": self.weight}
        return values | ({"blocks": dict(self.blocks)} if self.blocks else {})


@dataclass(frozen=True)
class Micro(Part):
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

    def validate(self) -> Self:
        for f in fields(self):
            name, value = f"micro.{f.name}", getattr(self, f.name)
            if value is None:
                continue
            if f.name.endswith("aesthetic"):
                checks.number(name, value, 0.0, 10.0)
                continue
            pair = "left and top" if f.name.endswith("crop") else "width and height"
            if not (isinstance(value, tuple) and len(value) == 2):
                raise InputError(
                    f"{name} must be two numbers, {pair}, not {checks.shown(value)}", argument=name
                )
            for side in value:
                checks.integer(name, side, 0 if f.name.endswith("crop") else 1, MAX_TOLD)
        return self


@dataclass(frozen=True)
class Motion(Part):
    """What Stable Video Diffusion is told of a clip beside the picture it begins with and its frames per second.

    bucket: how much moves, 0 to 255 in training. augment: deviation of the noise laid over the picture's pixels in
    [-1, 1]; more of it lets the clip part further from the picture.
    """

    bucket: int = 127
    augment: float = 0.02

    def validate(self) -> Self:
        checks.integer("motion.bucket", self.bucket, 0, MAX_MOTION)
        checks.number("motion.augment", self.augment, 0.0, 10.0)
        return self


@dataclass(frozen=True)
class Clip(Part):
    """Pictures of one size, shown one after the other. fps: how many a second.

    frames: a tuple, or of a long film that was drawn a `video.frames.Frames`, which reads each from the disk.
    """

    frames: Sequence[Image]
    fps: float

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps

    def validate(self) -> Self:
        """`InputError` for what no clip is: fewer than two pictures, of several sizes, or a rate that is none."""
        if not isinstance(self.frames, Sequence) or len(self.frames) < 2:
            raise InputError("a clip to begin with needs two frames or more", argument="clip")
        for frame in self.frames:
            checks.picture("clip", frame)
        if len({frame.size for frame in self.frames}) > 1:
            raise InputError("the frames of a clip must have one size", argument="clip")
        checks.number("a clip's fps", self.fps, 0.0, MAX_FPS, "clip")
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain values; the frames by their fingerprints."""
        return {"frames": [fingerprint("image", frame) for frame in self.frames], "fps": self.fps}

    @classmethod
    def from_json(cls, value: object, pictures: Iterable[Image] = ()) -> Clip:
        """From such values, with the frames among `pictures`."""
        if isinstance(value, cls):
            return value
        try:
            found = nested(cls, "clip", value)
        except InputError as error:
            raise InputError(str(error), argument="clip") from None
        named = found.frames if isinstance(found.frames, tuple) else ()
        known = {fingerprint("image", picture): picture for picture in pictures}
        missing = [name for name in named if isinstance(name, str) and name not in known]
        if missing:
            raise InputError(
                f"clip names {len(missing)} frames, of which {checks.shown(missing[0])} is the first; give the clip "
                "itself",
                argument="clip",
            )
        return cls(tuple(known[name] if isinstance(name, str) else name for name in named), found.fps)


@dataclass(frozen=True)
class SkipLayers(Part):
    """Guidance away from what the network draws without some of its layers (`diffusion.guidance.Skipping`).

    layers: their numbers, counted from 0; 7, 8 and 9 are Stability's for SD 3.5 Medium, and so are the other values.
    interval: shares of the schedule's steps, of which those between the two have it; the first step never has.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    interval: tuple[float, float] = (0.01, 0.2)

    def validate(self) -> Self:
        if not isinstance(self.layers, tuple) or not self.layers:
            raise InputError(
                f"skip_layers.layers must be some numbers of layers, not {checks.shown(self.layers)}",
                argument="skip_layers.layers",
            )
        for layer in self.layers:
            checks.integer("skip_layers.layers", layer, 0, MAX_LAYERS)
        if len(set(self.layers)) < len(self.layers):
            raise InputError("skip_layers.layers names a layer twice", argument="skip_layers.layers")
        checks.number("skip_layers.scale", self.scale, 0.0, 100.0)
        checks.interval("skip_layers.interval", self.interval)
        if self.interval[1] > 1:
            raise InputError(
                f"skip_layers.interval has shares of the steps, 0 to 1, not {checks.shown(self.interval)}",
                argument="skip_layers.interval",
            )
        return self


def fingerprint(role: str, picture: Image) -> str:
    """What JSON names a picture by: the hash of its pixels as an `image`, a `mask` or a `control` has them."""
    from sfumato.pictures import BLACK, WHITE, binary, flatten
    from sfumato.pictures import fingerprint as of

    if role == "mask":
        return of(binary(picture))
    return of(flatten(picture, ground=BLACK if role == "control" else WHITE))


def known_picture(
    role: str, name: str, pictures: Iterable[Image], what: str, argument: str | None = None
) -> Image:
    """The one of `pictures` whose fingerprint is `name`. `InputError`, by `what` names it, where there is none."""
    for picture in pictures:
        if fingerprint(role, picture) == name:
            return picture
    raise InputError(
        f"{what} names the picture {checks.shown(name)}; give the picture itself", argument=argument or what
    )


def nested(kind: type[Kind], name: str, value: object) -> Kind:
    """The part `kind` of a request from the JSON object `value` that its field `name` has."""
    if isinstance(value, kind):
        return value
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise InputError(
            f"{name} must be an object of {', '.join(known)}, not {checks.shown(value)}", argument=name
        )
    for inner in value:
        if inner not in known:
            raise InputError(
                f"{name} has no field {checks.shown(inner)}; it has {', '.join(known)}",
                argument=f"{name}.{inner}",
            )
    for inner, f in known.items():
        if inner not in value and f.default is MISSING:
            raise InputError(f"{name} needs {inner}", argument=f"{name}.{inner}")
    return kind(**value)
