"""The stages composed: encode → condition → noise → sample → decode. Each can be called alone."""

from __future__ import annotations

import functools
import inspect
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.adapters.fold import Adapters
from sfumato.adapters.lora import Report
from sfumato.diffusion.guidance import cfg_batched
from sfumato.diffusion.schedules import sigmas_for
from sfumato.errors import InputError
from sfumato.families import DEFAULT_MODEL, PACKAGED, open_model
from sfumato.runtime import autocast, batch_invariant, fast_dtype, pick_device
from sfumato.sampling import SAMPLERS, SeededNoise, Step, sampler_named
from sfumato.sampling.reuse import Reuse
from sfumato.sampling.step import continued
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
    steps_before,
    steps_to_run,
)
from sfumato.text.syntax import rule_named
from sfumato.text.weighting import weighting_named
from sfumato.types import MAX_SIDE, Conditioning, HiRes, Request, Result

MODELS = tuple(PACKAGED)
REFINE_AT = (
    0.8  # of the noise levels; SDXL's refiner was trained on the last fifth (Podell et al. 2023, sec. 2.5)
)
BATCH = 8  # pictures denoised together; with more, a CPU works outside its caches
__all__ = ["BATCH", "DEFAULT_MODEL", "MODELS", "Model", "load"]


def load(
    model: str | Path = DEFAULT_MODEL,
    device: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    engine: str | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    embeddings: Sequence[str | Path] | Mapping[str, str | Path] = (),
    parts: str | Path | Sequence[str | Path] | None = None,
    refiner: str | Path | None = None,
    offload: str | None = None,
    loras: Sequence[str | Path] | Mapping[str, str | Path] = (),
) -> Model:
    """Open a model: a packaged one by name, a model folder, a checkpoint, or `org/name` of the Hub.

    A checkpoint is a .safetensors file or a diffusers folder, and the options are for it alone. dtype: of its weights,
    by default what pictures are drawn in on this device; int8 makes a U-Net's products in eight bits, on CPUs that can.
    engine: "openvino" or "openvino:GPU" has OpenVINO run the U-Net, where it is installed. vae: another autoencoder.
    prediction: "epsilon" or "v", over what the checkpoint says. variant: of a folder's files, such as "fp16".
    embeddings: files of textual inversions, called in prompts by the files' names or by those given here. parts:
    checkpoints with what a U-Net alone lacks. refiner: a second model that draws the last part of the noise levels
    (`Request.refine_at`). offload: "none", the default, keeps all networks in memory, "model" the one at work of each
    model, "sequential" of its denoiser a layer; pictures are the same, and with the last two nothing is read before it
    is needed; "auto" is for who plans next (`planning.py`). loras: files to attach at weight 1, by their names or by
    those given here; `Model.attach` says more of them. Raises `CheckpointError` that says what is wrong.
    """
    place = pick_device(device)
    dtype = dtype or drawing_dtype(place)
    both = {"engine": engine, "embeddings": embeddings or None, "offload": offload}
    options = {"vae": vae, "prediction": prediction, "variant": variant, "parts": parts, **both}
    system = open_model(model, place, dtype, options)
    second = None
    if refiner is not None:
        second = Model(open_model(refiner, place, dtype, both), place, name=str(refiner))
    opened = Model(system, place, name=str(model), dtype=dtype, refiner=second)
    for name, file in loras.items() if isinstance(loras, Mapping) else [(None, file) for file in loras]:
        opened.attach(file, name=name)
    return opened


class Model:
    """A model in memory, ready to draw. Stateless between calls, so that threads may share it.

    Beside what every system has (`config`, `autoencoder`, `denoiser`, `encode`, `decode`, `condition`, `network`,
    `parameterization`, `levels`), one may offer
        inpaint_channels(pixels, mask) -> (1, E, 1, H/f, W/f): a network that was trained to inpaint takes these
            channels after those of the sample, at every call. pixels: (1, 3, 1, H, W) in [-1, 1], 0 where to paint;
            mask: (1, 1, 1, H, W), 1 where to paint. A request without a mask paints everywhere.
        preview(latent) -> pixels (1, 3, 1, h, w) in about [-1, 1]: a quick look, cheaper than decoding.
        split(x, time, cond, deep) -> (answer, deep): the network in two parts, the deep one taken from `deep` if it is
            not None. `reuse_order`: of the forecast that suits it, 0 unless said (`sampling.reuse.Reuse`).
        clip_layers: up to which layer from the end `condition` can read a text encoder (`Request.clip_skip`).
        told_guidance: the network is told the scale of guidance, by `condition`, and nothing is left to guide.
        dtype: what its weights are in and its networks work in. One without it works under autocast.
        engine: what runs its denoiser, if it is not PyTorch.
        latent_shape(frames, height, width): where `autoencoder` would have to be opened to tell it.
        offloads: the ways to keep its networks, of `memory.OFFLOADS`; offloaded(name) -> System: the same in another.
        trace(request, size, batch, encodes, offload) -> the memory that drawing takes (`planning.py`).
        hashes() -> part to SHA-256, for networks that no longer hold their weights as the files have them.
        embeddings: textual inversions by name, with the hashes of their files.
        reads: what of a request `condition` reads that not every system does, of "prompt_rules", "weighting" and the
            fields of `micro` as "micro.crop".
        adapters: the LoRAs opened for it (`adapters.fold.Adapters`).
        latent_space: two models with equal ones can draw on each other's latents.

    refiner: another model, which takes over where `Request.refine_at` says. One without a `latent_space` has none.
    """

    def __init__(
        self,
        system: Any,
        device: torch.device,
        name: str = "",
        dtype: torch.dtype | None = None,
        refiner: Model | None = None,
    ):
        self.system, self.device, self.name, self.refiner = system, device, name, refiner
        if refiner is not None:
            ours, theirs = (getattr(model.system, "latent_space", None) for model in (self, refiner))
            if ours is None or ours != theirs:
                raise InputError(
                    f"the refiner {refiner.name!r} does not draw in the latents of {name!r}; give one of the same "
                    "family, such as SDXL's for SDXL",
                    argument="refiner",
                )
        self.dtype = getattr(system, "dtype", None) or dtype or drawing_dtype(device)
        if self.dtype == torch.int8 and not hasattr(system, "dtype"):
            raise InputError(f"int8 is for checkpoints; draw with {name!r} in fp32 or bf16", argument="dtype")

    @property
    def preset(self) -> dict[str, Any]:
        """What a request that leaves them open gets: steps, guidance, sampler, schedule, size."""
        preset = self.system.config.preset
        return {name: getattr(preset, name) for name in ("steps", "guidance", "sampler", "schedule", "size")}

    def attach(
        self,
        lora: str | Path,
        weight: float = 1.0,
        *,
        name: str | None = None,
        blocks: Mapping[str, float] | None = None,
        partial: bool = False,
    ) -> Report:
        """Draw with a LoRA from now on, folded into the weights; the report says what of it is used.

        weight, blocks: as of `LoraUse`; a request may ask for others (`Request.loras`), and attaching again changes
        them. name: what requests call it, the file's name by default. partial: leave what does not fit instead of
        refusing the file. Errors of `adapters.lora.read_lora`; `InputError` where the model takes none.
        """
        return self._adapters("attach").attach(lora, weight, name=name, blocks=blocks or {}, partial=partial)

    def detach(self, name: str | None = None) -> None:
        """Take a LoRA off, or all: the weights are then the base's to the bit."""
        self._adapters("detach").detach(name)

    def _adapters(self, argument: str) -> Adapters:
        found = getattr(self.system, "adapters", None)
        if found is None:
            raise InputError(f"{self.name!r} takes no LoRAs", argument=argument)
        return found

    def _with_loras(self, request: Request) -> AbstractContextManager[None]:
        """While inside, the networks are those of the request's LoRAs."""
        found = getattr(self.system, "adapters", None)
        return nullcontext() if found is None else found.using(request.loras)

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights: by the system if it has `hashes`, whose networks may hold them otherwise."""
        if hasattr(self.system, "hashes"):
            return self.system.hashes()
        return {
            name: tensors_hash(getattr(self.system, name).state_dict())
            for name in ("autoencoder", "denoiser")
        }

    @property
    def embeddings(self) -> dict[str, str]:
        """The textual inversions that prompts may call, by name, with the hashes of their files."""
        return getattr(self.system, "embeddings", {})

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
        return self._condition(prompts, self.complete(Request() if request is None else request))

    def _condition(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        with self._precision(), self._with_loras(request):
            cond = self.system.condition(prompts, request)
        return cond.change(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.float())

    def denoiser(
        self, cond: Conditioning, guidance: float | Request, channels: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """denoise(x, sigma) → x0_hat for (B, C, T, H, W).

        cond holds 2B rows, B wanted ones and then B to stay away from, or 2 rows that serve any B.
        guidance: its scale, or a request, whose `guidance_interval` and `reuse` count too. With `reuse` the answer
        depends on the calls before: take a new denoiser for each run of a sampler.
        channels: (1, E, T, H, W), more input for the network beside each sample.
        """
        request = self.complete(guidance) if isinstance(guidance, Request) else Request(guidance=guidance)
        scale = request.guidance
        assert scale is not None
        if getattr(self.system, "told_guidance", False):
            scale = 1.0
        wanted = cond.change(lambda rows: rows[: len(rows) // 2])
        with self._with_loras(request):
            parameterization = self.system.parameterization

        answer = self.system.network
        if request.reuse is not None and request.reuse > 1:
            answer = Reuse(self.system.split, request.reuse, getattr(self.system, "reuse_order", 0))

        def network(x: Tensor, level: Tensor, given: Conditioning) -> Tensor:
            if (each := len(x) // len(given)) > 1:
                given = given.change(lambda rows: rows.repeat_interleave(each, 0))
            if channels is not None:
                x = torch.cat([x, channels.expand(len(x), *channels.shape[1:])], 1)  # (B, C + E, T, H, W)
            with self._precision(), self._with_loras(request):
                return answer(x, level, given).float()

        return cfg_batched(
            parameterization.denoiser(network, cond),
            parameterization.denoiser(network, wanted),
            scale,
            request.guidance_interval or self.system.config.preset.interval,
            getattr(self.system.config.preset, "rescale", 0.0),
        )

    def complete(self, request: Request) -> Request:
        """Validate, fill what is open from the picture and the preset, and check what only the model knows: names,
        sizes and steps. Doing it twice changes nothing."""
        request = tasks.settle(request.validate(), self.system.config.multiple, self.preset["size"])
        wanted = self._settle_loras(request)
        request = request.with_defaults(**self.preset | wanted).validate()
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
        if (request.reuse or 1) > 1 and getattr(self.system, "split", None) is None:
            raise InputError(
                "this model's network keeps no deep features to reuse; leave out reuse", argument="reuse"
            )
        layers = getattr(self.system, "clip_layers", 1)
        if request.clip_skip is not None and request.clip_skip > layers:
            raise InputError(
                f"clip_skip {request.clip_skip} is more than this model's text encoder allows, {layers}",
                argument="clip_skip",
            )
        self._check_read(request)
        if self.refiner is None and request.refine_at is not None:
            raise InputError("refine_at needs a refiner; open the model with one", argument="refine_at")
        if self.refiner is not None and request.refine_at is None:
            request = replace(request, refine_at=REFINE_AT)
        return request

    def _settle_loras(self, request: Request) -> dict[str, Any]:
        """What the LoRAs of a request make of what it leaves open, and which they are, if any."""
        if getattr(self.system, "adapters", None) is None and not request.loras:
            return {}
        for name, text in (("prompt", request.prompt), ("negative", request.negative or "")):
            if "<lora:" in text:
                raise InputError(
                    f"a LoRA is given by --lora FILE:WEIGHT or Request.loras, not in the {name} as <lora:…>",
                    argument=name,
                )
        adapters = self._adapters("loras")
        uses = adapters.settled(request.loras)
        return adapters.preset(uses) | ({"loras": uses} if uses else {})

    def generate(self, request: Request, on_step: Callable[[Step], None] | None = None) -> Result:
        """Draw the request's pictures. `on_step` hears of every step of every batch and may raise to cancel."""
        request = self.complete(request)
        with self._with_loras(request):
            return self._generate(request, on_step)

    def _generate(self, request: Request, on_step: Callable[[Step], None] | None) -> Result:
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
        for name in ("image", "hires", "variation", "refine_at"):
            if getattr(request, name) is not None:
                raise InputError(
                    f"generate_pixels draws from noise alone and by one model; leave out {name}",
                    argument=name,
                )
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

        `request` must be complete, and hold these pictures alone if it asks for a variation. A refiner that takes over
        is told the request's prompts, and its sampler begins anew: one that remembers earlier answers of the network
        has none, as in diffusers. Noise is drawn on as if there had been no change.
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
        sampler = sampler_named(request.sampler)
        if request.eta is not None:
            sampler = functools.partial(sampler, eta=request.eta)
        cells = None
        for model, told, first, last in self._legs(cond, request, sigmas):
            channels = model._inpaint_channels(origin, height, width)
            denoise = model.denoiser(told, replace(request, refine_at=None), channels)
            cells = None
            if origin is not None and origin.mask is not None and channels is None:
                cells = cells_to_paint(origin.mask, *shape[-2:])
                denoise = keeping(denoise, origin.latent, cells, initial, path)
            more, hear = continued(noise, on_step, first, len(sigmas) - 1)
            x = sampler(denoise, x, sigmas[first : last + 1], path=path, noise=more, on_step=hear)
        return x if origin is None or cells is None else torch.where(cells, x, origin.latent)

    def _legs(
        self, cond: Conditioning, request: Request, sigmas: Tensor
    ) -> list[tuple[Model, Conditioning, int, int]]:
        """Who draws which steps: the model, what it is told, its first step, and the step after its last.

        A request with a second pass is refined in that pass alone, which draws over what the first had refined.
        """
        steps = len(sigmas) - 1
        drawn_over = request.hires is not None and request.hires.strength > 0
        if self.refiner is None or request.refine_at is None or drawn_over:
            return [(self, cond, 0, steps)]
        change = steps_before(sigmas, self.system.levels, request.refine_at)
        legs = [(self, cond, 0, change)] if change else []
        if change < steps:
            told = self.refiner._condition([request.prompt, request.negative], request)
            legs.append((self.refiner, told, change, steps))
        return legs

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
            **({"embeddings": self.embeddings} if self.embeddings else {}),
            **({"loras": self._adapters("loras").digests(request.loras)} if request.loras else {}),
            **({"refiner": _named(self.refiner)} if self.refiner is not None else {}),
            "request": request.to_dict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "engine": getattr(self.system, "engine", "torch"),
            "device": self.device.type,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "seconds": round(seconds, 3),
        }

    def _check_read(self, request: Request) -> None:
        """`InputError` for what this model would not be told, and for rules of prompts that do not exist."""
        models = [self] if self.refiner is None else [self, self.refiner]
        for name in request.for_some():
            if not any(name in getattr(model.system, "reads", ()) for model in models):
                raise InputError(f"this model knows nothing of {name}; leave it out", argument=name)
        if request.prompt_rules is not None:
            rule_named(request.prompt_rules)
        if request.weighting is not None:
            weighting_named(request.weighting)

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


def _named(model: Model) -> dict[str, Any]:
    return {"model": model.name, "weights": model.hashes}


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
