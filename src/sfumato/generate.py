"""The stages composed: encode → condition → noise → sample → decode. Each can be called alone."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.diffusion.guidance import cfg_batched
from sfumato.diffusion.schedules import sigmas_for
from sfumato.errors import InputError
from sfumato.families import DEFAULT_MODEL, PACKAGED, family_of, model_folder
from sfumato.runtime import autocast, batch_invariant, fast_dtype, pick_device
from sfumato.sampling import SeededNoise, Step, sampler_named
from sfumato.storage import tensors_hash
from sfumato.types import Conditioning, Request, Result

MODELS = tuple(PACKAGED)
BATCH = 8  # pictures denoised together; with more, a CPU works outside its caches
__all__ = ["BATCH", "DEFAULT_MODEL", "MODELS", "Model", "load"]


def load(model: str | Path = DEFAULT_MODEL, device: str | None = None) -> Model:
    """Open a packaged model by name, or a model folder. Raises `CheckpointError` that says what is wrong with it."""
    place = pick_device(device)
    directory = model_folder(PACKAGED.get(str(model), Path(model)))
    system = family_of(directory).open_folder(directory, place)
    return Model(system, place, name=str(model))


class Model:
    """A model in memory, ready to draw. Stateless between calls, so that threads may share it."""

    def __init__(self, system: Any, device: torch.device, name: str = "", dtype: torch.dtype | None = None):
        self.system, self.device, self.name = system, device, name
        self.dtype = drawing_dtype(device) if dtype is None else dtype

    @property
    def preset(self) -> dict[str, Any]:
        """What a request that leaves them open gets: steps, guidance, sampler, schedule, size."""
        preset = self.system.config.preset
        return {name: getattr(preset, name) for name in ("steps", "guidance", "sampler", "schedule", "size")}

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights."""
        return {
            name: tensors_hash(getattr(self.system, name).state_dict())
            for name in ("autoencoder", "denoiser")
        }

    @torch.inference_mode()
    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pictures of one size → normalised latents (B, C, 1, H/f, W/f)."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not images:
            raise InputError("give at least one picture to encode", argument="images")
        if len({image.size for image in images}) > 1:
            raise InputError("the pictures to encode together must have one size", argument="images")
        self._check_size(images[0].size)
        pixels = torch.stack([to_pixels(image) for image in images]).to(self.device)
        with autocast(self.device, self.dtype):
            return self.system.autoencoder.encode_normalized(pixels).float()

    @torch.inference_mode()
    def decode_pixels(self, latent: Tensor) -> Tensor:
        """Normalised latents (B, C, T, H, W) → pixels (B, 3, T, H·f, W·f) in [-1, 1]."""
        with autocast(self.device, self.dtype):
            return self.system.autoencoder.decode_normalized(latent.to(self.device)).float().clamp(-1, 1)

    def decode(self, latent: Tensor) -> list[Image.Image]:
        """Normalised latents (B, C, 1, H, W) → pictures."""
        return [to_image(pixels) for pixels in self.decode_pixels(latent)]

    @torch.inference_mode()
    def condition(self, prompts: Request | Sequence[str]) -> Conditioning:
        """Text features of prompts; of a request, its prompt in the first row and its negative in the second."""
        texts = [prompts.prompt, prompts.negative] if isinstance(prompts, Request) else list(prompts)
        with autocast(self.device, self.dtype):
            cond = self.system.condition(texts)
        return Conditioning(cond.tokens.float(), cond.mask)

    def denoiser(self, cond: Conditioning, guidance: float | Request) -> Callable[[Tensor, Tensor], Tensor]:
        """denoise(x, sigma) → x0_hat for (B, C, T, H, W).

        cond holds 2B rows, B wanted ones and then B to stay away from, or 2 rows that serve any B.
        """
        scale = self.complete(guidance).guidance if isinstance(guidance, Request) else guidance
        assert scale is not None
        half = len(cond.tokens) // 2
        wanted = Conditioning(cond.tokens[:half], cond.mask[:half])
        parameterization = self.system.parameterization

        def network(x: Tensor, level: Tensor, given: Conditioning) -> Tensor:
            rows = len(x) // len(given.tokens)
            if rows > 1:
                given = Conditioning(
                    given.tokens.repeat_interleave(rows, 0), given.mask.repeat_interleave(rows, 0)
                )
            with autocast(self.device, self.dtype):
                return self.system.network(x, level, given).float()

        return cfg_batched(
            parameterization.denoiser(network, cond),
            parameterization.denoiser(network, wanted),
            scale,
            self.system.config.preset.interval,
        )

    def complete(self, request: Request) -> Request:
        """Validate, fill what is open from the preset, and check what only the model knows: names and size."""
        request = request.validate().with_defaults(**self.preset)
        assert request.size and request.sampler and request.schedule and request.steps
        self._check_size(request.size)
        sampler_named(request.sampler)
        sigmas_for(request.schedule, request.steps, self.system.levels)
        return request

    def generate(self, request: Request, on_step: Callable[[Step], None] | None = None) -> Result:
        """Draw the request's pictures. `on_step` hears of every step of every batch and may raise to cancel."""
        request = self.complete(request)
        started = time.perf_counter()
        cond = self.condition(request)
        seeds = request.seeds()
        images: list[Image.Image] = []
        for start in range(0, len(seeds), BATCH):
            latent = self.sample(cond, seeds[start : start + BATCH], request, on_step)
            images += self.decode(latent)
        return Result(tuple(images), self.recipe(request, time.perf_counter() - started))

    def generate_pixels(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> Tensor:
        """One picture for each prompt and seed: pixels (B, 3, H, W) in [-1, 1]. `changes` are fields of a `Request`."""
        request = self.complete(Request(**changes))
        parts = []
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            cond = self.condition([*batch, *[request.negative] * len(batch)])
            parts.append(
                self.decode_pixels(self.sample(cond, seeds[start : start + BATCH], request))[:, :, 0]
            )
        return torch.cat(parts)

    @torch.inference_mode()
    def sample(
        self,
        cond: Conditioning,
        seeds: Sequence[int],
        request: Request,
        on_step: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Noise → normalised latents (B, C, 1, H/f, W/f), picture k from seeds[k]. `request` must be complete."""
        assert (
            request.size
            and request.sampler
            and request.schedule
            and request.steps
            and request.guidance is not None
        )
        width, height = request.size
        shape = self.system.autoencoder.latent_shape(1, height, width)
        noise = SeededNoise(seeds, shape, self.device, torch.float32)
        sigmas = sigmas_for(request.schedule, request.steps, self.system.levels)
        path = self.system.parameterization.path
        x = noise.initial() * path.prior_scale(float(sigmas[0]))
        denoise = self.denoiser(cond, request.guidance)
        return sampler_named(request.sampler)(denoise, x, sigmas, path=path, noise=noise, on_step=on_step)

    def preview(self, latent: Tensor) -> Image.Image:
        """The first picture of a latent that is still forming."""
        return self.decode(latent[:1])[0]

    def recipe(self, request: Request, seconds: float) -> dict[str, Any]:
        """Everything needed to draw the same pictures again."""
        return {
            "sfumato": sfumato.__version__,
            "model": self.name,
            "weights": self.hashes,
            "request": request.to_dict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds": round(seconds, 3),
        }

    def _check_size(self, size: tuple[int, int]) -> None:
        multiple = self.system.config.multiple
        nearest = tuple(max(1, round(side / multiple)) * multiple for side in size)
        if tuple(size) != nearest:
            raise InputError(
                f"size {size[0]}x{size[1]} is not a multiple of {multiple} pixels; the nearest legal size is "
                f"{nearest[0]}x{nearest[1]}",
                argument="size",
            )


def drawing_dtype(device: torch.device) -> torch.dtype:
    """What the hardware is fast in, but on a CPU only where a picture does not depend on its batch. Elsewhere float32,
    in which picture k of a batch is the picture made alone but for a few values that fall to the other side of .5.
    """
    fast = fast_dtype(device)
    return fast if device.type != "cpu" or batch_invariant(fast) else torch.float32


def to_pixels(image: Image.Image) -> Tensor:
    """A picture → float32 (3, 1, H, W) in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1)[:, None] / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, 1, H, W) in [-1, 1] → a picture."""
    array = (pixels[:, 0].float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())
