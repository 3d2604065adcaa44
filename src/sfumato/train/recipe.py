"""Recipes: a TOML file, checked field by field into frozen dataclasses before anything runs.

    [data]         where pictures and captions come from
    [autoencoder]  its shape; [autoencoder.loss] its loss; [autoencoder.train] its optimisation
    [denoiser]     its shape; [denoiser.loss] its loss; [denoiser.train] its optimisation
    [lora]         instead of both: which model to train one beside, and which layers of it; [lora.loss], [lora.train],
                   [lora.prior] its class
    [control]      instead of all three: which model to train a ControlNet beside; [control.train]
    [video]        instead of all four: which model to teach clips; [video.temporal] the shape of the layers between
                   frames, [video.codec] their optimisation, [video.loss] and [video.train] those of its denoiser
    [preset]       how the finished model draws when the user says nothing

A table that is absent leaves its stage out, or takes its defaults.
"""

from __future__ import annotations

import math
import tomllib
import types
import typing
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from sfumato.adapters.svd import MAX_RANK
from sfumato.autoencoder import AutoencoderConfig
from sfumato.autoencoder.losses import LossConfig
from sfumato.diffusion.loss import DENSITIES, WEIGHTINGS
from sfumato.errors import InputError
from sfumato.families import DEFAULT_FAMILY, family_named
from sfumato.families.trainee import LAYOUTS
from sfumato.train.activations import CHOICES
from sfumato.train.fitting import TrainRecipe, above_zero, check_train, one_of, within
from sfumato.train.video_recipe import VideoRecipe, check_video

__all__ = ["Recipe", "TrainRecipe", "VideoRecipe", "parse_recipe", "read_recipe"]
STAGES = ("autoencoder", "denoiser")  # of a model, in this order
BESIDE = ("lora", "control", "video")  # instead: what is trained beside a finished model


@dataclass(frozen=True)
class DataRecipe:
    """Pictures with captions."""

    kind: str = "folder"  # folder, or scenes for the procedural world
    path: str = ""  # folder: where; a plain folder, metadata.jsonl, kohya folders or class folders
    size: int = 128  # side in pixels of a square picture; other shapes get about the same area
    count: int = 10_000  # scenes: how many different ones
    split: str = "train"  # scenes: which split
    objects: tuple[int, int] = (1, 5)  # scenes: fewest and most objects
    seed: int = 0  # scenes: which world; folder: the choice of crops
    flip: bool = False  # folder: add the mirror image of every picture
    held_out: float = 0.02  # folder: share of the pictures kept from the autoencoder, to measure it on
    cache: str = ""  # scenes: where rendered pictures are kept; empty for the run's own folder


@dataclass(frozen=True)
class DenoiserLoss:
    """What the denoiser is asked for. density: where noise levels fall; logit-normal as SD3 (2403.03206, eq. 19)."""

    density: str = "logit_normal"  # logit_normal, or uniform
    mean: float = 0.0  # of the logit; above 0 visits noisier levels more often
    std: float = 1.0
    shift: float = 1.0  # resolution shift of the levels (eq. 23)
    weighting: str = "plain"  # plain, min_snr or flow (`sfumato.diffusion.loss.loss_weight`)
    drop_prompt: float = 0.1  # share of pictures whose prompt is emptied, for guidance
    labels: float = 0.0  # weight of naming what each latent cell shows; needs a source with labels


@dataclass(frozen=True)
class AutoencoderRecipe:
    model: AutoencoderConfig
    loss: LossConfig
    train: TrainRecipe
    init: str = ""  # a model whose autoencoder to start from; its shape is then that model's


@dataclass(frozen=True)
class DenoiserRecipe:
    model: Any  # the family's DenoiserConfig
    loss: DenoiserLoss
    train: TrainRecipe
    vocabulary: int = 4096  # most frequent words that get a token of their own
    init: str = ""  # a model whose denoiser and text encoder to start from; its shape and words are kept


@dataclass(frozen=True)
class LoraLoss:
    """What the adapter is asked for: the error of the model's own prediction, be it noise, v or flow.

    Models of Stable Diffusion 1, 2 and XL are trained at the steps of their own table, drawn uniformly. density, mean,
    std and shift are for models of flow.
    """

    weighting: str = "plain"  # plain, or min_snr (`sfumato.diffusion.loss.loss_weight`)
    gamma: float = 5.0  # of min_snr
    density: str = "logit_normal"  # logit_normal, or uniform
    mean: float = 0.0  # of the logit; above 0 visits noisier levels more often
    std: float = 1.0
    shift: float = 0.0  # of the levels; 0 for the model's own
    drop_prompt: float = 0.0  # share of pictures whose caption is emptied
    prior_weight: float = 1.0  # of the pictures of the class


@dataclass(frozen=True)
class PriorRecipe:
    """Pictures of the class that a subject is of, which the model shall go on drawing as before (DreamBooth)."""

    prompt: str = ""  # such as "a photo of a dog"; empty for no prior
    path: str = ""  # a folder of captioned pictures to take; empty to have the model draw them first
    count: int = 100  # pictures to draw
    steps: int = 0  # of the sampler; 0 for the model's own
    guidance: float = 0.0  # 0 for the model's own


@dataclass(frozen=True)
class LoraRecipe:
    """A LoRA: which model it is for, which layers it changes, how it is kept."""

    loss: LoraLoss
    train: TrainRecipe
    prior: PriorRecipe
    base: str = DEFAULT_FAMILY  # a packaged model, a file, a folder or org/name
    rank: int = 8
    alpha: float = 0.0  # the scale is alpha / rank; 0 for the rank
    targets: tuple[str, ...] = (
        "attention",
    )  # attention, all, or patterns of layers such as "unet.*.attn2.to_k"
    text: bool = False  # also beside the text encoders
    dora: bool = False  # magnitudes of their own (weight decomposition)
    trigger: str = ""  # words before every caption
    layout: str = "diffusers"  # names in the file: diffusers, or kohya
    dtype: str = "float16"  # of the file
    recompute: str = "auto"  # on: blocks are computed twice and keep little; auto: where memory is short
    samples: tuple[str, ...] = ()  # prompts of the sample sheets; by default some captions


@dataclass(frozen=True)
class ControlRecipe:
    """A ControlNet: beside which model, for which kind of control picture."""

    train: TrainRecipe
    base: str = DEFAULT_FAMILY  # a packaged model, a file, a folder or org/name; it stays as it is
    kind: str = "depth"  # what it is called; of scenes, which picture it reads: depth, edge or mask
    pictures: str = ""  # of a folder: where the control pictures are, with the names of the pictures
    blocks: int = 1  # of a model of our own: how many of the base's blocks are copied
    outputs: int = 4  # of a model of our own: before how many blocks something is added
    mean: float = (
        0.8  # of the logit of a flow's noise levels; what stands where is decided at the noisier ones
    )
    drop_prompt: float = (
        0.3  # share of pictures whose caption is emptied, so that the control picture says it all
    )


LORA_TRAIN = {  # what [lora.train] has where it says nothing: few weights, few pictures
    "steps": 1000,
    "batch": 1,
    "lr": 1e-4,
    "betas": [0.9, 0.999],
    "warmup": 20,
    "decay": 0.0,
    "ema": 0.0,
    "save_every": 100,
    "sheet_every": 500,
}


@dataclass(frozen=True)
class Recipe:
    name: str
    data: DataRecipe
    autoencoder: AutoencoderRecipe | None = None
    denoiser: DenoiserRecipe | None = None
    lora: LoraRecipe | None = None
    control: ControlRecipe | None = None
    video: VideoRecipe | None = None
    preset: Any = None  # the family's Preset
    seed: int = 0
    family: str = DEFAULT_FAMILY
    out: str = ""  # where the run goes; runs/<name> by default
    log: str = "csv"  # csv, or tensorboard for both


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file as they stand; `InputError` for one that is not there or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no recipe {str(path)!r}", argument="recipe") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, not TOML, no possible name
        raise InputError(f"{path} is not a readable TOML recipe: {error}", argument="recipe") from None


def read_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe. `overrides` are dotted keys, such as {"denoiser.train.steps": 100}."""
    path = Path(path)
    values = read_tables(path)
    set_values(values, overrides or {})
    values.setdefault("name", path.stem)
    values.setdefault("data", {})
    return parse_recipe(values)


def set_values(values: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Put values into nested tables, in place, by dotted keys such as denoiser.train.steps; missing tables are made."""
    for key, value in overrides.items():
        *parents, last = key.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise InputError(f"{key} cannot be set: {parent} is a value, not a table", argument=key)
        table[last] = value


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Build a `Recipe` from plain tables; every unknown key or wrong type is an `InputError` that names it."""
    values = dict(values)
    family = family_named(_value(str, values.get("family", DEFAULT_FAMILY), "family"))
    for stage, kind, model in (
        ("autoencoder", AutoencoderRecipe, AutoencoderConfig),
        ("denoiser", DenoiserRecipe, family.DenoiserConfig),
    ):
        table = values.get(stage)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise InputError(f"{stage} must be a table, not {table!r}", argument=stage)
        own = {f.name for f in fields(kind)} - {"model"}
        shape = {name: value for name, value in table.items() if name not in own}
        rest = {name: value for name, value in table.items() if name in own}
        values[stage] = build(kind, rest, stage, model=build(model, shape, stage))
    lora = values.get("lora")
    if isinstance(lora, dict):
        train = lora.get("train", {})
        targets = lora.get("targets", "attention")
        more = {"targets": [targets] if isinstance(targets, str) else targets}
        values["lora"] = lora | more | ({"train": LORA_TRAIN | train} if isinstance(train, dict) else {})
    values["preset"] = build(family.Preset, values.get("preset", {}), "preset")
    recipe = build(Recipe, values, "")
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """`InputError` for what does not go together, or is out of its range."""
    one_of("data.kind", recipe.data.kind, ("folder", "scenes"))
    if len(recipe.data.objects) != 2 or not 1 <= recipe.data.objects[0] <= recipe.data.objects[1] <= 5:
        raise InputError(
            f"data.objects must be the fewest and the most, within 1 to 5, not {list(recipe.data.objects)}",
            argument="data.objects",
        )
    stages = [stage for stage in (*STAGES, *BESIDE) if getattr(recipe, stage)]
    if not stages:
        tables = ", ".join(f"no [{stage}]" for stage in (*STAGES, *BESIDE))
        raise InputError(f"the recipe has {tables}: nothing to train", argument="recipe")
    one_of("log", recipe.log, ("csv", "tensorboard"))
    for stage in stages:
        check_train(f"{stage}.train", getattr(recipe, stage).train)
    for stage in set(stages) & set(BESIDE):
        if len(stages) > 1:
            raise InputError(
                f"[{stage}] is trained beside a finished model; give "
                f"{' and '.join(f'[{other}]' for other in stages if other != stage)} a recipe of their own",
                argument=stage,
            )
    if recipe.lora:
        _check_lora(recipe.lora)
    if recipe.control:
        _check_control(recipe.control, recipe.data)
    if recipe.video:
        check_video(recipe.video)
    if recipe.autoencoder:
        _check_autoencoder(recipe.autoencoder)
    if recipe.denoiser:
        loss = recipe.denoiser.loss
        one_of("denoiser.loss.density", loss.density, DENSITIES)
        one_of("denoiser.loss.weighting", loss.weighting, WEIGHTINGS)
        within("denoiser.loss", loss, DENOISER_LOSS_RANGES)
        above_zero("denoiser.loss.shift", loss.shift)
        if loss.labels and not getattr(recipe.denoiser.model, "label_classes", ()):
            raise InputError(
                "denoiser.loss.labels needs denoiser.label_classes, the number of classes of each attribute",
                argument="denoiser.label_classes",
            )


def _check_lora(recipe: LoraRecipe) -> None:
    within("lora", recipe, LORA_RANGES)
    within("lora.loss", recipe.loss, LORA_LOSS_RANGES)
    within("lora.prior", recipe.prior, PRIOR_RANGES)
    above_zero("lora.loss.gamma", recipe.loss.gamma)
    one_of("lora.loss.weighting", recipe.loss.weighting, ("plain", "min_snr"))
    one_of("lora.loss.density", recipe.loss.density, DENSITIES)
    one_of("lora.layout", recipe.layout, LAYOUTS)
    one_of("lora.dtype", recipe.dtype, ("float32", "float16", "bfloat16"))
    one_of("lora.recompute", recipe.recompute, CHOICES)
    if not recipe.targets:
        raise InputError(
            "lora.targets must be attention, all, or patterns of layers; it is empty", argument="lora.targets"
        )
    for name, value, right in (
        ("optimizer", recipe.train.optimizer, "adamw"),
        ("compile", recipe.train.compile, False),
    ):
        if value != right:
            raise InputError(
                f"lora.train.{name} must be {str(right).lower()} here, not {str(value).lower()}",
                argument=f"lora.train.{name}",
            )
    if recipe.prior.path and recipe.prior.prompt:
        raise InputError(
            "lora.prior takes a prompt to draw pictures of, or a path to captioned ones; not both",
            argument="lora.prior",
        )


def _check_control(recipe: ControlRecipe, data: DataRecipe) -> None:
    within("control", recipe, CONTROL_RANGES)
    if data.kind == "folder" and not recipe.pictures:
        raise InputError(
            "a folder of pictures needs control.pictures, a folder of control pictures with the same names",
            argument="control.pictures",
        )
    if data.flip:
        raise InputError(
            "data.flip turns pictures and not their control pictures; leave it out", argument="data.flip"
        )


def _check_autoencoder(recipe: AutoencoderRecipe) -> None:
    loss = recipe.loss
    within("autoencoder.loss", loss, AUTOENCODER_LOSS_RANGES)
    above_zero("autoencoder.loss.equivariance_share", loss.equivariance_share)
    if any(scale < 1 for scale in loss.equivariance_scales):
        raise InputError(
            "autoencoder.loss.equivariance_scales must be whole numbers of at least 1, not "
            f"{list(loss.equivariance_scales)}",
            argument="autoencoder.loss.equivariance_scales",
        )
    if recipe.train.optimizer == "muon":
        raise InputError(
            "autoencoder.train.optimizer must be adamw: muon is for the matrices of transformer blocks, and an "
            "autoencoder has none",
            argument="autoencoder.train.optimizer",
        )


DENOISER_LOSS_RANGES = {"std": (0, math.inf), "labels": (0, math.inf), "drop_prompt": (0, 1)}
LORA_RANGES = {"rank": (1, MAX_RANK), "alpha": (0, math.inf)}
LORA_LOSS_RANGES = {
    "std": (0, math.inf),
    "shift": (0, math.inf),
    "drop_prompt": (0, 1),
    "prior_weight": (0, math.inf),
}
CONTROL_RANGES = {"blocks": (1, math.inf), "outputs": (1, math.inf), "drop_prompt": (0, 1)}
PRIOR_RANGES = {"count": (1, 100_000), "steps": (0, 1000), "guidance": (0, math.inf)}
AUTOENCODER_LOSS_RANGES = {
    **{
        weight: (0, math.inf)
        for weight in ("l1", "gradient", "haar", "spectral", "kl", "equivariance", "adversarial")
    },
    "gradient_scales": (1, math.inf),
    "spectral_block": (1, math.inf),
    "equivariance_share": (0, 1),
    "adversarial_limit": (0, math.inf),
}


def build(kind: Any, values: Any, where: str, **ready: Any) -> Any:
    """Fill the dataclass `kind` from a table, recursively; `ready` fields and values already built are kept."""
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a table, not {values!r}", argument=where)
    known = {f.name: f for f in fields(kind) if f.name not in ready}
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in known:
            raise InputError(
                f"unknown key {_dotted(where, name)!r}; known are {', '.join(known)}",
                argument=_dotted(where, name),
            )
    built = dict(ready)
    for name, f in known.items():
        here, hint = _dotted(where, name), _inner(hints[name])
        if name not in values:
            if f.default is not MISSING or f.default_factory is not MISSING:
                continue
            if not is_dataclass(hint):
                raise InputError(f"{here} is missing", argument=here)
            built[name] = build(hint, {}, here)
        elif is_dataclass(values[name]):
            built[name] = values[name]
        else:
            built[name] = (
                build(hint, values[name], here) if is_dataclass(hint) else _value(hint, values[name], here)
            )
    return kind(**built)


def _inner(hint: Any) -> Any:
    """The type in `X | None`."""
    if isinstance(hint, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def _value(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} must be a list, not {value!r}", argument=where)
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} must be a finite number, not {value}", argument=where)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where} must be {hint.__name__}, not {value!r}", argument=where)
    return value


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
