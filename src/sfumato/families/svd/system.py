"""A Stable Video Diffusion put together from a checkpoint: the networks, and what `generate` asks of a model.

A clip is told its first picture twice: CLIP's embedding of it is the context of attention, and its latent, with a
little noise in the pixels, stands beside every frame's. What is stayed away from has zeros for both. Beside these the
network is told three numbers: frames per second less one, how much moves, and how much noise the picture has
(Blattmann et al. 2023, 2311.15127, app. D; diffusers, pipeline_stable_video_diffusion.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters.fold import Touched
from sfumato.autoencoder.model import check_size
from sfumato.autoencoder.safe import encode_safe
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import VE
from sfumato.diffusion.schedules import NoiseLevels
from sfumato.errors import InputError
from sfumato.families.published.checkpoint import Checkpoint, Families
from sfumato.families.published.networks import Networks
from sfumato.families.published.openers import (
    autoencoder,
    check_engine,
    denoiser,
    picture_encoder,
    require_offload,
)
from sfumato.families.published.system import Place, Preset, PublishedSystem, opened, ready
from sfumato.families.svd.family import FAMILY, levels_of
from sfumato.families.svd.shapes import IMAGE_ENCODER, SYSTEMS
from sfumato.families.svd.shapes import System as Kind
from sfumato.sampling.noise import SeededNoise
from sfumato.tasks.canvas import first_picture
from sfumato.tasks.pixels import to_pixels
from sfumato.types import Conditioning, Motion, Request

STEPS, GUIDANCE, FPS = 25, (1.0, 3.0), 7  # diffusers'; guidance of the first frame and of the last
LEVELS = 1000  # of noise, evenly spaced in log sigma, for schedules that ask for a table; ComfyUI's count
# Sabour et al. 2024 (2404.14507), Align Your Steps: the levels of ten steps that the authors published
ALIGNED = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
AUGMENTING = 1  # the draw of a seed's beginning that is the noise in the picture


@dataclass(frozen=True)
class Config:
    """kind: a key of `SYSTEMS`. multiple: what a clip's sides are multiples of."""

    kind: str
    preset: Preset
    multiple: int = 8


@dataclass(frozen=True, kw_only=True)
class System(PublishedSystem):
    """Networks of a Stable Video Diffusion, ready to draw."""

    config: Config
    shapes: Kind

    family = FAMILY
    animates = True
    reads = frozenset(["frames", "fps", "guidance_first", "motion", "motion.augment", "clip"])

    def openers(
        self, parts: Mapping[str, Mapping[str, Tensor]], *, keep: int | None
    ) -> dict[str, Callable[[], Any]]:
        shapes, sources, form = self.shapes, self.sources, (self.kept, self.device)
        [reader] = shapes.text
        weights, where = parts["unet"], sources["unet"]
        of = (self.device, self.dtype, self.engine)
        return {
            reader.name: lambda: picture_encoder(
                reader.config, parts[reader.name], sources[reader.name], *form
            ),
            "denoiser": lambda: denoiser(shapes.unet, weights, where, *of, keep=keep),
            "autoencoder": lambda: autoencoder(shapes.vae, parts["vae"], sources["vae"], *form),
        }

    @property
    def texts(self) -> tuple[str, ...]:
        """What reads the picture in the place of a prompt: CLIP, and the autoencoder too."""
        return (IMAGE_ENCODER, "autoencoder")

    @property
    def text_parts(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.shapes.text)

    def renewers(
        self, parts: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Callable[[Any, Touched], bool]]:
        """None: the family takes no adapters, so no tensor changes."""
        return {}

    @property
    def parameterization(self) -> Parameterization:
        return Parameterization("v", VE, _quarter_log)

    def condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """Two rows, of a request for one clip: its picture, and nothing. `prompts` are not read."""
        if request.image is None:
            raise InputError("there is no image to set in motion; give one", argument="image")
        motion, pixels = (
            request.motion or Motion(),
            to_pixels(first_picture(request))[None],
        )  # (1, 3, 1, H, W)
        noise = SeededNoise(request.seeds()[:1], pixels.shape[1:]).initial(AUGMENTING)
        picture = self.networks[IMAGE_ENCODER](pixels[:, :, 0].to(self.device)).float()[:, None]  # (1, 1, D)
        shown = pixels + motion.augment * noise
        latent = encode_safe(self.autoencoder, shown.to(self.device)).mode()  # not scaled, unlike the sample
        told = torch.tensor(
            [[(request.fps or FPS) - 1, motion.bucket, motion.augment]],
            dtype=torch.float32,
            device=self.device,
        )
        return Conditioning(
            torch.cat([picture, torch.zeros_like(picture)]),
            vector=told.expand(2, -1),
            channels=torch.cat([latent, torch.zeros_like(latent)]),
        )

    def network(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """(B, 4, T, H, W) → the same; in the type of its weights."""
        assert cond.channels is not None and cond.vector is not None
        shown = cond.channels.expand(-1, -1, x.shape[2], -1, -1).to(x.dtype)
        return self.denoiser(torch.cat([x, shown], 1), time, cond.tokens, cond.vector)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        vae = self.shapes.vae
        check_size(vae.factor, height, width)
        return vae.channels, frames, height // vae.factor, width // vae.factor


def _quarter_log(sigma: Tensor) -> Tensor:
    """What the network is told of a noise level: ln(sigma) / 4 (Karras et al. 2022, table 1, c_noise)."""
    return 0.25 * sigma.log()


def noise_levels(low: float, high: float) -> NoiseLevels:
    """Of continuous training, as a table."""
    ends = torch.tensor([low, high], dtype=torch.float64).log().tolist()
    return NoiseLevels(torch.linspace(*ends, LEVELS, dtype=torch.float64).exp(), VE, aligned=ALIGNED)


def open_system(
    path: Place,
    device: torch.device,
    dtype: torch.dtype,
    *,
    systems: Mapping[str, Kind] = SYSTEMS,
    variant: str | None = None,
    parts: Place | Iterable[Place] = (),
    **options: Any,
) -> System:
    """The model at `path`, a single file or a diffusers folder. options: of `build`; the rest as for
    `published.system.opened`.
    """
    families = (replace(FAMILY, systems=systems),)
    found = opened(path, families, variant=variant, parts=parts)
    return build(found, str(path), device, dtype, families, **options)


def build(
    found: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    families: Families,
    *,
    vae: Place | None = None,
    engine: str = "torch",
    offload: str = "none",
) -> System:
    """Networks of an opened checkpoint, with weights in `dtype` on `device`. `name` stands for it in errors.

    dtype: int8 makes the U-Net's products in eight bits, and leaves the rest in what the CPU is fast in. vae: another
    autoencoder of the same latents, a file or a folder; one of pictures decodes each frame alone. offload: see
    `Networks`.
    """
    if engine != "torch":
        raise InputError(f"a model of clips is run by torch, not by {engine}", argument="engine")
    check_engine(engine, device, dtype)
    require_offload(offload, engine, dtype)
    made = ready(found, name, (IMAGE_ENCODER,), vae, families)
    unopened = System(
        config=Config(found.kind, preset_of(found), made.shapes.vae.factor),
        shapes=made.shapes,
        networks=Networks({}),
        levels=noise_levels(*levels_of(found, name)),
        dtype=dtype,
        device=device,
        parts=made.parts,
        sources=made.sources,
        engine=engine,
    )
    return unopened.offloaded(offload)


def usual_preset(found: Checkpoint) -> Preset:
    """How a checkpoint draws of which nothing but the kind is known."""
    return preset_of(found)


def preset_of(found: Checkpoint) -> Preset:
    """How a checkpoint draws when the user says nothing. A folder's U-Net may name another number of frames."""
    frames = found.configs.get("unet", {}).get("num_frames") or SYSTEMS[found.kind].frames
    first, last = GUIDANCE
    return Preset(
        STEPS, last, "euler", "karras", found.system.shape, frames=frames, fps=FPS, guidance_first=first
    )
