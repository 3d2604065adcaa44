"""The stages composed: encode → condition → noise → sample → decode. Each can be called alone."""

from __future__ import annotations

import functools
import inspect
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
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
from sfumato.families import DEFAULT_MODEL, PACKAGED, open_model
from sfumato.runtime import autocast, batch_invariant, fast_dtype, pick_device
from sfumato.sampling import SAMPLERS, SeededNoise, Step, sampler_named
from sfumato.sampling.variation import VariedNoise
from sfumato.storage import tensors_hash
from sfumato.tasks import canvas as tasks
from sfumato.tasks.canvas import Canvas, by, nearest_size
from sfumato.tasks.latent import (
    Origin,
    begin,
    cells_to_paint,
    enlarged,
    keeping,
    pixel_upscaler,
    steps_to_run,
)
from sfumato.types import MAX_SIDE, Conditioning, HiRes, Request, Result

MODELS = tuple(PACKAGED)
BATCH = 8  # pictures denoised together; with more, a CPU works outside its caches
__all__ = ["BATCH", "DEFAULT_MODEL", "MODELS", "Model", "load"]


def load(
    model: str | Path = DEFAULT_MODEL,
    device: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    offload: str | None = None,
) -> Model:
    """Open a model: a packaged one by name, a model folder, a checkpoint, or `org/name` of the Hub.

    A checkpoint is a .safetensors file or a diffusers folder, and the options are for it alone. dtype: of its weights,
    by default what pictures are drawn in on this device. vae: another autoencoder. prediction: "epsilon" or "v", over
    what the checkpoint says. variant: of a folder's files, such as "fp16". offload: "none", the default, keeps all
    networks in memory, "model" the one at work, "sequential" of the denoiser a layer; pictures are the same, and with
    the last two nothing is read before it is needed; "auto" is for who plans next (`planning.py`). Raises
    `CheckpointError` that says what is wrong with it.
    """
    place = pick_device(device)
    options = {"vae": vae, "prediction": prediction, "variant": variant, "offload": offload}
    system = open_model(model, place, dtype or drawing_dtype(place), options)
    return Model(system, place, name=str(model))


class Model:
    """A model in memory, ready to draw. Stateless between calls, so that threads may share it.

    Beside what every system has (`config`, `autoencoder`, `denoiser`, `encode`, `decode`, `condition`, `network`,
    `parameterization`, `levels`), one may offer
        inpaint_channels(pixels, mask) -> (1, E, 1, H/f, W/f): a network that was trained to inpaint takes these
            channels after those of the sample, at every call. pixels: (1, 3, 1, H, W) in [-1, 1], 0 where to paint;
            mask: (1, 1, 1, H, W), 1 where to paint. A request without a mask paints everywhere.
        preview(latent) -> pixels (1, 3, 1, h, w) in about [-1, 1]: a quick look, cheaper than decoding.
        clip_layers: up to which layer from the end `condition` can read a text encoder (`Request.clip_skip`).
        told_guidance: the network is told the scale of guidance, by `condition`, and nothing is left to guide.
        dtype: what its weights are in and its networks work in. One without it works under autocast.
        latent_shape(frames, height, width): where `autoencoder` would have to be opened to tell it.
        offloaded(name) -> System: the same with another way to keep its networks, of `memory.OFFLOADS`.
        trace(prompts, request, size, batch, encodes) -> the memory that drawing takes (`planning.py`).
        hashes() -> part to SHA-256, for networks that no longer hold their weights as the files have them.
    """

    def __init__(self, system: Any, device: torch.device, name: str = "", dtype: torch.dtype | None = None):
        self.system, self.device, self.name = system, device, name
        self.dtype = getattr(system, "dtype", None) or dtype or drawing_dtype(device)

    @property
    def preset(self) -> dict[str, Any]:
        """What a request that leaves them open gets: steps, guidance, sampler, schedule, size."""
        preset = self.system.config.preset
        return {name: getattr(preset, name) for name in ("steps", "guidance", "sampler", "schedule", "size")}

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights: by the system if it has `hashes`, whose networks may hold them otherwise."""
        if hasattr(self.system, "hashes"):
            return self.system.hashes()
        return {
            name: tensors_hash(getattr(self.system, name).state_dict())
            for name in ("autoencoder", "denoiser")
        }

    def _precision(self) -> AbstractContextManager[None]:
        return nullcontext() if hasattr(self.system, "dtype") else autocast(self.device, self.dtype)

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
        with self._precision():
            return self.system.encode(pixels).float()

    @torch.inference_mode()
    def decode_pixels(self, latent: Tensor) -> Tensor:
        """Normalised latents (B, C, T, H, W) → pixels (B, 3, T, H·f, W·f) in [-1, 1]."""
        with self._precision():
            return self.system.decode(latent.to(self.device)).float().clamp(-1, 1)

    def decode(self, latent: Tensor) -> list[Image.Image]:
        """Normalised latents (B, C, 1, H, W) → pictures."""
        return [to_image(pixels) for pixels in self.decode_pixels(latent)]

    @torch.inference_mode()
    def condition(
        self, prompts: Request | Sequence[str | None], request: Request | None = None
    ) -> Conditioning:
        """What the network is told of texts, half of them wanted and half not; `request` has the rest that it may read.

        Of a request alone, its prompt is in the first row and its negative in the second.
        """
        if isinstance(prompts, Request):
            request = prompts
            prompts = [request.prompt, request.negative]
        request = self.complete(Request() if request is None else request)
        with self._precision():
            cond = self.system.condition(prompts, request)
        return cond.change(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.float())

    def denoiser(
        self, cond: Conditioning, guidance: float | Request, channels: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """denoise(x, sigma) → x0_hat for (B, C, T, H, W).

        cond holds 2B rows, B wanted ones and then B to stay away from, or 2 rows that serve any B.
        channels: (1, E, T, H, W), more input for the network beside each sample.
        """
        scale = self.complete(guidance).guidance if isinstance(guidance, Request) else guidance
        assert scale is not None
        if getattr(self.system, "told_guidance", False):
            scale = 1.0
        wanted = cond.change(lambda rows: rows[: len(rows) // 2])
        parameterization = self.system.parameterization

        def network(x: Tensor, level: Tensor, given: Conditioning) -> Tensor:
            if (each := len(x) // len(given)) > 1:
                given = given.change(lambda rows: rows.repeat_interleave(each, 0))
            if channels is not None:
                x = torch.cat([x, channels.expand(len(x), *channels.shape[1:])], 1)  # (B, C + E, T, H, W)
            with self._precision():
                return self.system.network(x, level, given).float()

        return cfg_batched(
            parameterization.denoiser(network, cond),
            parameterization.denoiser(network, wanted),
            scale,
            self.system.config.preset.interval,
            getattr(self.system.config.preset, "rescale", 0.0),
        )

    def complete(self, request: Request) -> Request:
        """Validate, fill what is open from the picture and the preset, and check what only the model knows: names,
        sizes and steps. Doing it twice changes nothing."""
        request = tasks.settle(request.validate(), self.system.config.multiple, self.preset["size"])
        request = request.with_defaults(**self.preset).validate()
        assert request.size and request.sampler and request.schedule and request.steps
        self._check_size(request.size)
        sampler_named(request.sampler)
        if request.eta is not None and request.sampler not in eta_samplers():
            raise InputError(
                f"sampler {request.sampler} has no eta; leave it out, or use one of {', '.join(eta_samplers())}",
                argument="eta",
            )
        sigmas_for(request.schedule, request.steps, self.system.levels)
        if request.strength is not None:
            steps_to_run(request.steps, request.strength)
        if request.hires is not None:
            self._check_hires(request, request.hires)
        layers = getattr(self.system, "clip_layers", 1)
        if request.clip_skip is not None and request.clip_skip > layers:
            raise InputError(
                f"clip_skip {request.clip_skip} is more than this model's text encoder allows, {layers}",
                argument="clip_skip",
            )
        return request

    def generate(self, request: Request, on_step: Callable[[Step], None] | None = None) -> Result:
        """Draw the request's pictures. `on_step` hears of every step of every batch and may raise to cancel."""
        request = self.complete(request)
        started = time.perf_counter()
        cond = self.condition(request)
        canvas = tasks.canvas(request)
        origin = None if canvas is None else self._origin(canvas, request)
        images: list[Image.Image] = []
        for start in range(0, request.count, BATCH):
            part = request.part(start, min(BATCH, request.count - start))
            latent = self.sample(cond, part.seeds(), part, on_step, origin)
            if part.hires is not None:
                untouched = canvas.picture if canvas is not None and request.strength == 0 else None
                latent = self._second_pass(latent, part, part.hires, on_step, untouched)
            images += self.decode(latent)
        if canvas is not None:
            images = [canvas.finish(image) for image in images]
        return Result(tuple(images), self.recipe(request, time.perf_counter() - started))

    def generate_pixels(self, prompts: Sequence[str], seeds: Sequence[int], **changes: Any) -> Tensor:
        """One picture for each prompt and seed: pixels (B, 3, H, W) in [-1, 1]. `changes` are fields of a `Request` for
        drawing from noise alone.
        """
        request = self.complete(Request(**changes))
        for name in ("image", "hires", "variation"):
            if getattr(request, name) is not None:
                raise InputError(f"generate_pixels draws from noise alone; leave out {name}", argument=name)
        parts = []
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            cond = self.condition([*batch, *[request.negative] * len(batch)], request)
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
        origin: Origin | None = None,
    ) -> Tensor:
        """Noise, or what `origin` begins with, → normalised latents (B, C, 1, H/f, W/f), picture k from seeds[k].

        `request` must be complete, and hold these pictures alone if it asks for a variation.
        """
        assert (
            request.size
            and request.sampler
            and request.schedule
            and request.steps
            and request.guidance is not None
        )
        width, height = request.size
        shape = self._latent_shape(height, width)
        noise = self._noise(seeds, shape, request)
        initial = noise.initial()
        sigmas = sigmas_for(request.schedule, request.steps, self.system.levels)
        path = self.system.parameterization.path
        if origin is None:
            x = initial * path.prior_scale(float(sigmas[0]))
        else:
            sigmas, x = begin(sigmas, origin, initial, path)
        if len(sigmas) == 1:
            return x
        channels = self._inpaint_channels(origin, height, width)
        denoise = self.denoiser(cond, request.guidance, channels)
        cells = None
        if origin is not None and origin.mask is not None and channels is None:
            cells = cells_to_paint(origin.mask, *shape[-2:])
            denoise = keeping(denoise, origin.latent, cells, initial, path)
        sampler = sampler_named(request.sampler)
        if request.eta is not None:
            sampler = functools.partial(sampler, eta=request.eta)
        x = sampler(denoise, x, sigmas, path=path, noise=noise, on_step=on_step)
        return x if origin is None or cells is None else torch.where(cells, x, origin.latent)

    @torch.inference_mode()
    def preview(self, latent: Tensor) -> Image.Image:
        """The first picture of a latent still forming: by the system's quick look if it has one, else decoded."""
        if getattr(self.system, "preview", None) is None:
            return self.decode(latent[:1])[0]
        return to_image(self.system.preview(latent[:1].to(self.device))[0])

    def _noise(
        self, seeds: Sequence[int], shape: Sequence[int], request: Request
    ) -> SeededNoise | VariedNoise:
        if request.variation is None:
            return SeededNoise(seeds, shape, self.device, torch.float32)
        others = [request.variation.seed + k for k in range(len(seeds))]
        return VariedNoise(seeds, others, request.variation.strength, shape, self.device, torch.float32)

    def _origin(self, canvas: Canvas, request: Request) -> Origin:
        assert request.strength is not None
        latent = self.encode(canvas.picture)
        if canvas.mask is None:
            return Origin(latent, request.strength)
        pixels = to_pixels(canvas.picture)[None].to(self.device)  # (1, 3, 1, H, W)
        mask = torch.from_numpy(np.asarray(canvas.mask) > 0).float()[None, None, None]  # (1, 1, 1, H, W)
        return Origin(latent, request.strength, pixels, mask.to(self.device))

    def _inpaint_channels(self, origin: Origin | None, height: int, width: int) -> Tensor | None:
        if getattr(self.system, "inpaint_channels", None) is None:
            return None
        if origin is None or origin.mask is None or origin.pixels is None:
            pixels = torch.zeros(1, 3, 1, height, width, device=self.device)
            mask = torch.ones(1, 1, 1, height, width, device=self.device)
        else:
            pixels, mask = origin.pixels * (1 - origin.mask), origin.mask
        with self._precision():
            return self.system.inpaint_channels(pixels, mask).float()

    def _second_pass(
        self,
        latent: Tensor,
        request: Request,
        hires: HiRes,
        on_step: Callable[[Step], None] | None,
        untouched: Image.Image | None,
    ) -> Tensor:
        """Latents of the request's size → of the enlarged size, drawn over. untouched: the picture they were encoded
        from, if nothing has been done to them."""
        assert request.size
        width, height = size = enlarged_size(request.size, hires.scale, self.system.config.multiple)
        if pixel_upscaler(hires.upscaler):
            pictures = self.decode(latent) if untouched is None else [untouched] * len(latent)
            latent = self.encode([picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures])
        else:
            shape = self._latent_shape(height, width)
            latent = enlarged(latent, shape[-2], shape[-1], hires.upscaler)
        second = replace(
            request,
            size=size,
            steps=hires.steps or request.steps,
            image=None,  # the first pass has used it, and it is of the first pass's size
            strength=None,
            fit=None,
            hires=None,
        )
        origin = Origin(latent, hires.strength)
        return self.sample(self.condition(second), second.seeds(), second, on_step, origin)

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

    def _latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        owner = self.system if hasattr(self.system, "latent_shape") else self.system.autoencoder
        return owner.latent_shape(1, height, width)

    def _check_size(self, size: tuple[int, int]) -> None:
        multiple = self.system.config.multiple
        nearest = nearest_size(size, multiple)
        if tuple(size) != nearest:
            raise InputError(
                f"size {by(size)} is not a multiple of {multiple} pixels; the nearest legal size is {by(nearest)}",
                argument="size",
            )

    def _check_hires(self, request: Request, hires: HiRes) -> None:
        assert request.size and request.schedule and request.steps
        pixel_upscaler(hires.upscaler)
        size = enlarged_size(request.size, hires.scale, self.system.config.multiple)
        if max(size) > MAX_SIDE:
            raise InputError(
                f"hires.scale {hires.scale:g} makes {by(size)}; at most {MAX_SIDE} pixels on a side are drawn",
                argument="hires.scale",
            )
        steps = hires.steps or request.steps
        sigmas_for(request.schedule, steps, self.system.levels)
        steps_to_run(steps, hires.strength, "hires.strength")


def enlarged_size(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """`size` times `scale`, where that is legal; else an `InputError` names the nearest size that is."""
    wanted = (size[0] * scale, size[1] * scale)
    nearest = nearest_size((round(wanted[0]), round(wanted[1])), multiple)
    if any(abs(a - b) > 1e-6 * b for a, b in zip(wanted, nearest, strict=True)):
        raise InputError(
            f"hires.scale {scale:g} makes {wanted[0]:g}x{wanted[1]:g} of {by(size)}, not a multiple of {multiple} "
            f"pixels; the nearest legal size is {by(nearest)}",
            argument="hires.scale",
        )
    return nearest


def eta_samplers() -> list[str]:
    """The samplers with an option eta."""
    return [name for name, sampler in SAMPLERS.items() if "eta" in inspect.signature(sampler).parameters]


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
