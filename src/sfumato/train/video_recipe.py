"""The table [video] of a recipe: clips for a model of pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfumato.autoencoder.causal import CausalConfig, latents_of
from sfumato.errors import InputError
from sfumato.families import DEFAULT_FAMILY
from sfumato.train.fitting import TrainRecipe, check_train, within


@dataclass(frozen=True)
class VideoLoss:
    """What the denoiser of clips is asked for: the flow, of the frames that are not known."""

    mean: float = 0.5  # of the logit of a flow's noise levels; what goes where is decided at the noisier ones
    std: float = 1.0
    drop_prompt: float = 0.1  # share of captions that are emptied, for guidance
    known: tuple[float, ...] = (
        0.5,
        0.3,
        0.2,
    )  # shares of clips of which none, one, two … latents at the beginning are known
    residual: float = 0.02  # weight of the square of what the layers between frames add to a latent
    moving: float = 0.0  # how much more the error counts where a clip is not as in its first frame


@dataclass(frozen=True)
class VideoRecipe:
    """Clips for a model of pictures: what they are, and how a step mixes them."""

    temporal: CausalConfig
    codec: TrainRecipe  # of the layers between frames; a step sees `batch` windows of `short` frames
    loss: VideoLoss
    train: TrainRecipe  # of the denoiser
    base: str = DEFAULT_FAMILY  # a packaged model or a folder; it stays as it is
    init: str = (
        ""  # a model of clips to start from: its layers between frames, its denoiser and its words are kept
    )
    frames: int = 17  # of a clip of the data, 1 + 4k
    fps: float = 8.0  # of the data
    short: int = 9  # frames of the shorter windows, 1 + 4k
    rows: int = 0  # rows of tokens that short windows show, first those that move; 0 is all
    shared: float = 0.6  # share of the noise's variance that all frames of a clip have in common
    mix: tuple[int, ...] = (1, 3, 2)  # microbatches of a step: of pictures, of short windows, of whole clips
    plain: float = 0.0  # share of the scenes in which one thing goes straight ahead and all else stands still
    turned: bool = False  # every clip of a scene also in a mirror, and both backwards
    vocabulary: int = 256  # words that captions of clips have besides, the most frequent
    samples: tuple[str, ...] = ()  # prompts of the sample sheets; by default some captions

    @property
    def first_alone(self) -> bool:
        """Whether no clip is learnt of which nothing is known: its first frame is drawn as a picture then."""
        return not self.loss.known[0]


VIDEO_RANGES = {
    "fps": (1, 1000),
    "rows": (0, math.inf),
    "plain": (0, 1),
    "vocabulary": (0, math.inf),
    "shared": (0, 1),
}
VIDEO_LOSS_RANGES = {
    "std": (0, math.inf),
    "drop_prompt": (0, 1),
    "residual": (0, math.inf),
    "moving": (0, math.inf),
}


def check_video(recipe: VideoRecipe) -> None:
    """`InputError` for what does not go together, or is out of its range."""
    check_train("video.codec", recipe.codec)
    within("video", recipe, VIDEO_RANGES)
    within("video.loss", recipe.loss, VIDEO_LOSS_RANGES)
    for name in ("frames", "short"):
        if latents_of(getattr(recipe, name)) < 2:
            raise InputError(f"video.{name} must be 5 or more", argument=f"video.{name}")
    if recipe.short > recipe.frames:
        raise InputError("video.short must be at most video.frames", argument="video.short")
    if len(recipe.mix) != 3 or min(recipe.mix) < 0 or sum(recipe.mix) != recipe.train.parts:
        raise InputError(
            f"video.mix must be three counts that add up to the {recipe.train.parts} microbatches of a step, not "
            f"{list(recipe.mix)}",
            argument="video.mix",
        )
    known = recipe.loss.known
    if not known or min(known) < 0 or sum(known) <= 0 or len(known) >= latents_of(recipe.short) + 1:
        raise InputError(
            f"video.loss.known must be shares of at most {latents_of(recipe.short)} kinds of clips, not {list(known)}",
            argument="video.loss.known",
        )
    if recipe.first_alone and not recipe.mix[0]:
        raise InputError(
            "video.mix must have pictures where video.loss.known has no clips of which nothing is known: their first "
            "frame is drawn as a picture",
            argument="video.mix",
        )
    if recipe.codec.optimizer == "muon":
        raise InputError(
            "video.codec.optimizer must be adamw: these layers are convolutions", argument="optimizer"
        )
