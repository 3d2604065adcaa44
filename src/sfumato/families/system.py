"""What the rooms above ask of a model, whatever its family: what each has, and what one may offer beside.

A family's system takes `DrawingSystem` as its base and says what it offers by having an attribute of that name. What
stands here is the answer of a model that offers nothing, so that nobody has to ask whether an attribute is there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.schedules import NoiseLevels
from sfumato.errors import InputError
from sfumato.storage import tensors_hash
from sfumato.types import Conditioning, Request

if TYPE_CHECKING:
    from sfumato.adapters.fold import Adapters
    from sfumato.memory import Stage
    from sfumato.sampling.reuse import Split

NOTHING: Mapping[str, Any] = MappingProxyType({})


class DrawingSystem:
    """The networks of one model, put together.

    config: with `multiple`, what a picture's sides are multiples of in pixels, and `preset`, what a request leaves
    open: steps, guidance, sampler, schedule, size and interval (of sigma, where guidance acts). levels: the noise
    levels it was trained on. autoencoder, denoiser: the networks.
    """

    config: Any
    levels: NoiseLevels
    autoencoder: Any
    denoiser: Any

    dtype: torch.dtype | None = None
    """What its weights are in and its networks work in; None works under autocast, in what the model is opened for."""
    engine: str = "torch"
    """What runs its denoiser."""
    without: tuple[str, ...] = ()
    """Text encoders that were left out."""
    text_dtype: torch.dtype | None = None
    """What the largest text encoder is kept in, where that was asked for."""

    # --- the stages ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def parameterization(self) -> Parameterization:
        """What the network's answer means, and on which path."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H·f, W·f) in [-1, 1] → latents (B, C, T, H, W) of about mean 0 and deviation 1."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """The way back."""

    @abstractmethod
    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """2B texts, B wanted and then B to stay away from, as the network reads them."""

    def check_texts(self, texts: Sequence[str], request: Request) -> None:
        """`InputError` for a text that `condition` would not read, as one that is too long: told without a network."""

    @abstractmethod
    def network(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """One call of the denoiser: (B, C, T, H, W) → the same. time: () or (B,).

        It takes `skip_layers=(7, 8)` if there are `layers`, and `control=…` if there are `controls`.
        """

    @abstractmethod
    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of so many frames of so many pixels. `InputError` for what it cannot draw."""

    @property
    def called(self) -> str:
        """Its denoiser in messages."""
        return "denoiser"

    def answers(self, moves: bool) -> Any:
        """The network that `network` calls for pictures, or for clips, by whose layers errors are named."""
        return self.denoiser

    @property
    def built_from(self) -> Any:
        """What decides the shapes of its networks: equal ones take equally long."""
        return self.config

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights, as its files have them."""
        return {name: tensors_hash(getattr(self, name).state_dict()) for name in ("autoencoder", "denoiser")}

    # --- what of a request it knows --------------------------------------------------------------------------------

    @property
    def reads(self) -> frozenset[str]:
        """What of a request `condition` reads that not every system does: of "prompt_rules", "weighting",
        "text_length", the fields of `micro` as "micro.crop", and for clips "frames", "fps", "guidance_first", "motion"
        and "clip".
        """
        return frozenset()

    @property
    def read_as(self) -> Mapping[str, str]:
        """What its files may leave open and drawing depends on, as it was taken, by option of `load`."""
        return NOTHING

    @property
    def clip_layers(self) -> int:
        """Up to which layer from the end `condition` can read a text encoder (`Request.clip_skip`)."""
        return 1

    @property
    def told_guidance(self) -> bool:
        """The network is told the scale of guidance, by `condition`, and nothing is left to guide."""
        return False

    @property
    def rescale(self) -> float:
        """How far a guided answer takes the deviation of the wanted one, 0 to 1 (`guidance.cfg_batched`)."""
        return 0.0

    @property
    def layers(self) -> int:
        """How many layers its network has of which some may be left out; 0: none may."""
        return 0

    def picture_tokens(self, height: int, width: int) -> int | None:
        """Tokens that its network makes of a picture in pixels, for schedules that ask."""
        return None

    @property
    def inpaint_channels(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Of a network that was trained to inpaint: (pixels, mask) → the channels (1, E, 1, H/f, W/f) that it reads
        after those of the sample, at every call. pixels: (1, 3, 1, H, W) in [-1, 1], 0 where to paint; mask:
        (1, 1, 1, H, W), 1 where to paint. A request without a mask paints everywhere.
        """
        return None

    @property
    def split(self) -> Split | None:
        """The network in two parts: (x, time, cond, deep) → (answer, deep), the deep part taken from `deep` unless it
        is None (`sampling.reuse`).
        """
        return None

    @property
    def reuse_order(self) -> int:
        """Of the forecast of the deep part that suits it."""
        return 0

    # --- clips -----------------------------------------------------------------------------------------------------

    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """`decode` of a clip, piece after piece along T: one, of a model whose frames depend on all others."""
        yield self.decode(latent)

    @property
    def animates(self) -> bool:
        """It draws a clip from a picture, which a request must have, and reads no prompt."""
        return False

    @property
    def only_clips(self) -> bool:
        """It draws clips and no pictures."""
        return self.animates

    @property
    def clip_preset(self) -> Mapping[str, Any]:
        """What a request for a clip gets that leaves it open: frames, fps and perhaps guidance_first. Empty: it draws
        no clips.
        """
        return NOTHING

    def clip_hashes(self) -> dict[str, str]:
        """SHA-256 of the parts that draw nothing but clips."""
        return {}

    @property
    def shared_noise(self) -> float:
        """Share of the noise's variance that the frames of a clip have in common, 0 to 1, as in training."""
        return 0.0

    @property
    def traces_pictures(self) -> bool:
        """Whether `trace_pictures` tells what drawing pictures takes, of a model that is small and does not `trace`."""
        return False

    def trace_pictures(
        self, request: Request, size: tuple[int, int], batch: int, *, encodes: bool
    ) -> tuple[Stage, ...]:
        """The memory that each stage of drawing takes, all in memory, of a model that `traces_pictures`."""
        raise InputError("this model does not tell what drawing a picture takes", argument="model")

    @property
    def traces_clips(self) -> bool:
        """Whether `trace_clip` tells what drawing a clip takes, of a model that `traces` no pictures."""
        return False

    def trace_clip(self, request: Request) -> tuple[Stage, ...]:
        """The memory that each stage of drawing a clip takes, of a model that `traces_clips` (`planning.py`)."""
        raise InputError("this model does not tell what drawing a clip takes", argument="model")

    @property
    def window(self) -> tuple[int, int] | None:
        """(latents of a clip that it draws together, how many of them are known where a film goes on). A longer clip is
        drawn in such pieces, and `Conditioning.channels` says what is known. None: it draws clips whole.
        """
        return None

    @property
    def first_alone(self) -> bool:
        """Whether it draws the first latent of a clip of which nothing is known by itself, as a picture."""
        return False

    def frames_of(self, latents: int) -> int:
        """How many frames so many latents of a clip are."""
        return latents

    # --- what is added to it ---------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Adapters | None:
        """The LoRAs opened for it; None: it takes none."""
        return None

    @property
    def embeddings(self) -> Mapping[str, str]:
        """Textual inversions by the names that call them, with the hashes of their files."""
        return NOTHING

    @property
    def latent_space(self) -> tuple[float, ...] | None:
        """Two models with equal ones can draw on each other's latents; None: nothing is known of it."""
        return None

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of its ControlNets."""
        return ()

    @property
    def masked_controls(self) -> frozenset[str]:
        """Names of those whose `controller` takes `mask=` too, (1, 1, H, W) with 1 where to paint, or None for
        everywhere.
        """
        return frozenset()

    def control_hashes(self) -> dict[str, str]:
        """SHA-256 of the weights of each ControlNet, by name."""
        return {}

    def with_controls(self, files: Mapping[str, Any]) -> Any:
        """The same system with the ControlNets in these files, by name, besides its own."""
        raise InputError("this model takes no ControlNets", argument="controlnets")

    def controller(self, name: str, pixels: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        """(x, time, cond, guess) → the tensors that a ControlNet adds, shown a picture (1, 3, H, W) in [0, 1]."""
        raise InputError("this model takes no ControlNets", argument="controls")

    # --- memory and looks ------------------------------------------------------------------------------------------

    @property
    def traces(self) -> bool:
        """Whether `trace` tells what drawing takes, and `offloaded` can keep its networks in another way."""
        return False

    def trace(
        self,
        request: Request,
        size: tuple[int, int],
        batch: int,
        *,
        encodes: bool,
        offload: str,
        keep: int = 0,
    ) -> tuple[Stage, ...]:
        """The memory and FLOPs of each stage of drawing, of a system that `traces` (`planning.py`). keep: as of
        `offloaded`.
        """
        raise InputError("this model does not tell what drawing takes", argument="model")

    @property
    def offload(self) -> str:
        """How its networks are kept, of `memory.OFFLOADS`."""
        return "none"

    @property
    def offloads(self) -> tuple[str, ...]:
        """The ways to keep its networks that it can."""
        return ("none",)

    def offloaded(self, offload: str, keep: int = 0) -> Any:
        """The same system with its networks kept in another way. `InputError` unless it is one of `offloads`.

        keep: bytes of the denoiser's layers that "sequential" keeps in memory all the same.
        """
        raise InputError(f"this model is kept in memory whole, without offload {offload}", argument="offload")

    def pixel_twin(self) -> Any:
        """A system with the same trunk on pixels, on the CPU, with fresh weights from the global generator."""
        raise InputError("this model has no twin in pixel space; leave out --pixels", argument="pixels")

    def preview(self, latent: Tensor) -> Tensor | None:
        """(1, C, T, H, W) → pixels (1, 3, T, h, w) in about [-1, 1], a quick look; None: decoding is as quick."""
        return None
