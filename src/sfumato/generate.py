"""The stages composed: encode → condition → noise → sample → decode. Each can be called alone."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato import checks
from sfumato.adapters.fold import Adapters
from sfumato.adapters.lora import Report
from sfumato.drawing.clips import draw_clips
from sfumato.drawing.denoise import denoiser
from sfumato.drawing.request import check_size, complete, enlarged_size, eta_samplers
from sfumato.drawing.sample import origin_of, sample, second_pass
from sfumato.drawing.script import Script, script
from sfumato.errors import InputError
from sfumato.families import DEFAULT_MODEL, PACKAGED, located, open_model
from sfumato.families.system import DrawingSystem
from sfumato.runtime import Clock, autocast, check_dtype, drawing_dtype, kernels, pick_device
from sfumato.sampling import Step
from sfumato.sampling.noise import GENERATOR
from sfumato.tasks import canvas as tasks
from sfumato.tasks.annotators import Annotator, open_annotator
from sfumato.tasks.hints import cropped
from sfumato.tasks.latent import Origin
from sfumato.tasks.pixels import to_image, to_pixels
from sfumato.types import Conditioning, Request, Result

MODELS = tuple(PACKAGED)
BATCH = 8  # pictures denoised together; with more, a CPU works outside its caches
__all__ = [
    "BATCH",
    "DEFAULT_MODEL",
    "MODELS",
    "Model",
    "drawing_dtype",
    "enlarged_size",
    "eta_samplers",
    "load",
    "to_image",
    "to_pixels",
]


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
    preset: str | None = None,
    loras: Sequence[str | Path] | Mapping[str, str | Path] = (),
    without: Sequence[str] = (),
    text_dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    controlnets: Mapping[str, str | Path] | None = None,
    annotators: Mapping[str, str | Path] | None = None,
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
    is needed; "auto" is for who plans next (`planning.py`). preset: how a distilled model is drawn that does not say
    it, "lcm", "turbo" or "lightning", or "plain" against what it says. loras: files to attach at weight 1, by their
    names or by those given here; `Model.attach` says more of them. without: text encoders to leave out, such as "t5".
    text_dtype: what the largest of them is kept in. tokenizer: its file, where the checkpoint has none.
    controlnets: files, folders or Hub ids of ControlNets by the names that `Request.controls` calls them; for models of
    our own too. annotators: folders or Hub ids of networks that make control pictures of plain ones, by the names that
    `Control.prepare` calls them. Raises `CheckpointError` that says what is wrong.
    """
    place = pick_device(device)
    check_dtype("dtype", dtype)
    check_dtype("text_dtype", text_dtype)
    dtype = dtype or drawing_dtype(place)
    both = {"engine": engine, "embeddings": embeddings or None, "offload": offload}
    options: dict[str, Any] = {
        "vae": vae,
        "prediction": prediction,
        "preset": preset,
        "variant": variant,
        "parts": parts,
        **both,
    }
    options |= {"without": tuple(without) or None, "text_dtype": text_dtype, "tokenizer": tokenizer}
    system = open_model(model, place, dtype, options)
    if controlnets:
        system = system.with_controls({kind: located(file) for kind, file in controlnets.items()})
    second = None
    if refiner is not None:
        second = Model(open_model(refiner, place, dtype, both), place, name=str(refiner))
    makers = {name: open_annotator(located(folder)) for name, folder in (annotators or {}).items()}
    opened = Model(system, place, name=str(model), dtype=dtype, refiner=second, annotators=makers)
    for name, file in loras.items() if isinstance(loras, Mapping) else [(None, file) for file in loras]:
        opened.attach(file, name=name)
    return opened


class Model:
    """A model in memory, ready to draw. Stateless between calls, so that threads may share it.

    system: its networks, and what they offer (`families.system.DrawingSystem`). name: what it was opened by. dtype: of
    pictures drawn by a system without one of its own.
    refiner: another model, which takes over where `Request.refine_at` says. One without a `latent_space` has none.
    annotators: networks that make control pictures of plain ones, by the names that `Control.prepare` calls them.
    """

    def __init__(
        self,
        system: DrawingSystem,
        device: torch.device,
        name: str = "",
        dtype: torch.dtype | None = None,
        refiner: Model | None = None,
        annotators: Mapping[str, Annotator] | None = None,
    ):
        self.system, self.device, self.name, self.refiner = system, device, name, refiner
        self.annotators = dict(annotators or {})
        self.counted: dict[Any, dict[str, int]] = {}  # FLOPs, by what decides them (receipts/work.py)
        if refiner is not None:
            ours, theirs = (model.system.latent_space for model in (self, refiner))
            if ours is None or ours != theirs:
                raise InputError(
                    f"the refiner {refiner.name!r} does not draw in the latents of {name!r}; give one that was "
                    "trained on the same latents",
                    argument="refiner",
                )
        self.dtype = system.dtype or dtype or drawing_dtype(device)
        if self.dtype == torch.int8 and system.dtype is None:
            raise InputError(f"int8 is for checkpoints; draw with {name!r} in fp32 or bf16", argument="dtype")

    @property
    def preset(self) -> dict[str, Any]:
        """What a request that leaves them open gets: steps, guidance, sampler, schedule, size; of a model of clips also
        frames, fps and the guidance of the first frame."""
        preset = self.system.config.preset
        known = {name: getattr(preset, name) for name in ("steps", "guidance", "sampler", "schedule", "size")}
        return known | (self.clip_preset if self.system.only_clips else {})

    @property
    def clip_preset(self) -> dict[str, Any]:
        """What a request for a clip gets besides where it leaves that open: frames, fps and perhaps guidance_first;
        empty of a model that draws none.
        """
        return dict(self.system.clip_preset)

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
        if (found := self.system.adapters) is None:
            raise InputError(f"{checks.shown(self.name)} takes no LoRAs", argument=argument)
        return found

    def with_loras(self, request: Request) -> AbstractContextManager[None]:
        """While inside, the networks are those of the request's LoRAs."""
        found = self.system.adapters
        return nullcontext() if found is None else found.using(request.loras)

    def lora_digests(self, request: Request) -> dict[str, str]:
        """The LoRAs that a complete request draws with, with the hashes of their files."""
        return self._adapters("loras").digests(request.loras) if request.loras else {}

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights, as its files have them."""
        return self.system.hashes()

    @functools.cached_property
    def clip_hashes(self) -> dict[str, str]:
        """The same of the parts that draw nothing but clips, of a model that has such."""
        return self.system.clip_hashes()

    @property
    def embeddings(self) -> dict[str, str]:
        """The textual inversions that prompts may call, by name, with the hashes of their files."""
        return dict(self.system.embeddings)

    @property
    def without(self) -> tuple[str, ...]:
        """The text encoders that were left out."""
        return self.system.without

    @property
    def text_dtype(self) -> str | None:
        """What the largest text encoder is kept in, where that was asked for."""
        dtype = self.system.text_dtype
        return None if dtype is None else str(dtype).removeprefix("torch.")

    def precision(self) -> AbstractContextManager[None]:
        """Its networks' arithmetic: by the system's own types, or else under autocast."""
        return nullcontext() if self.system.dtype else autocast(self.device, self.dtype)

    @torch.inference_mode()
    def encode(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pictures of one size → normalised latents (B, C, 1, H/f, W/f)."""
        images = [images] if isinstance(images, Image.Image) else list(images)
        if not images:
            raise InputError("give at least one picture to encode", argument="images")
        if len({image.size for image in images}) > 1:
            raise InputError("the pictures to encode together must have one size", argument="images")
        check_size(images[0].size, self.system.config.multiple)
        return self.encode_pixels(torch.stack([to_pixels(image) for image in images]))

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H·f, W·f) in [-1, 1] → normalised latents (B, C, T, H, W)."""
        with self.precision():
            return self.system.encode(pixels.to(self.device)).float()

    @torch.inference_mode()
    def decode_pixels(self, latent: Tensor) -> Tensor:
        """Normalised latents (B, C, T, H, W) → pixels (B, 3, T, H·f, W·f) in [-1, 1]."""
        with self.precision():
            return self.system.decode(latent.to(self.device)).float().clamp(-1, 1)

    @torch.inference_mode()
    def decode_pieces(self, latent: Tensor) -> Iterator[Tensor]:
        """`decode_pixels` of a clip, piece after piece along T, of which only one need be in memory."""
        pieces = self.system.decode_pieces(latent.to(self.device))
        while True:
            with self.precision():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece.float().clamp(-1, 1)

    def decode(self, latent: Tensor) -> list[Image.Image]:
        """Normalised latents (B, C, 1, H, W) → pictures."""
        return [to_image(pixels) for pixels in self.decode_pixels(latent)]

    @torch.inference_mode()
    def condition(
        self, prompts: Request | Sequence[str | None], request: Request | None = None, *, done: int = 0
    ) -> Conditioning | Script:
        """What the network is told of texts, half of them wanted and half not; `request` has the rest that it may read.

        Of a request alone, its prompt is in the first row and its negative in the second. Where its prompts change over
        the steps, or are several joined by AND, a `Script` holds such rows for each (`text.editing`); texts on their
        own are read as they stand. done: steps of a pass before this one, which those of the prompts count on from.
        """
        if isinstance(prompts, Request):
            return script(self, self.complete(prompts), done)
        return self.told(prompts, self.complete(Request() if request is None else request))

    def told(self, prompts: Sequence[str | None], request: Request) -> Conditioning:
        """`condition`, of a request that is complete already, if by another model."""
        with self.precision(), self.with_loras(request):
            cond = self.system.condition(prompts, request)
        return cond.change(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.float())

    def denoiser(
        self, cond: Conditioning | Script, guidance: float | Request, channels: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """denoise(x, sigma) → x0_hat for (B, C, T, H, W).

        cond holds 2B rows, B wanted ones and then B to stay away from, or 2 rows that serve any B; or a script.
        guidance: its scale, or a request, whose `guidance_interval` and `reuse` count too, as do the steps and schedule
        that a script is for. With `reuse` the answer depends on the calls before: take a new denoiser for each run of a
        sampler.
        channels: (1, E, T, H, W), more input for the network beside each sample.
        """
        if not isinstance(guidance, Request) and not isinstance(cond, Conditioning):
            raise InputError(
                "prompts that change over the steps, or are several, need the request; give it in place of guidance",
                argument="guidance",
            )
        request = self.complete(guidance) if isinstance(guidance, Request) else Request(guidance=guidance)
        with self.with_loras(request):
            return denoiser(self, cond, request, channels)

    def complete(self, request: Request) -> Request:
        """Validate, fill what is open from the picture and the preset, and check what only the model knows: names,
        sizes and steps. Doing it twice changes nothing."""
        return complete(self, request)

    def generate(self, request: Request, on_step: Callable[[Step], None] | None = None) -> Result:
        """Draw the request's pictures, or its clips. `on_step` hears of every step of every batch and may raise to
        cancel.
        """
        request = self.complete(request)
        with self.with_loras(request):
            return self._generate(request, on_step)

    def _generate(self, request: Request, on_step: Callable[[Step], None] | None) -> Result:
        clock = Clock(self.device)
        if request.moves:
            clips = draw_clips(self, request, on_step, clock)
            return Result((), self.recipe(request, clock.seconds), clips)
        cond = self.condition(request)
        clock.lap("text")
        canvas = tasks.canvas(request)
        origin = None if canvas is None else origin_of(self, canvas, request)
        clock.lap("encode", origin is not None)
        images: list[Image.Image] = []
        shown = request
        if canvas is not None and request.inpaint is not None and request.inpaint.padding is not None:
            shown = cropped(request, canvas.box, canvas.original.size, self.system.config.multiple)
        for start in range(0, request.count, BATCH):
            part = shown.part(start, min(BATCH, request.count - start))
            latent = self.sample(cond, part.seeds(), part, on_step, origin)
            if part.hires is not None:
                untouched = canvas.picture if canvas is not None and request.strength == 0 else None
                latent = second_pass(self, latent, part, part.hires, on_step, untouched)
            clock.lap("denoise")
            images += self.decode(latent)
            clock.lap("decode")
        if canvas is not None:
            images = [canvas.finish(image) for image in images]
        return Result(tuple(images), self.recipe(request, clock.seconds))

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
        cond: Conditioning | Script,
        seeds: Sequence[int],
        request: Request,
        on_step: Callable[[Step], None] | None = None,
        origin: Origin | None = None,
        done: int = 0,
    ) -> Tensor:
        """Noise, or what `origin` begins with, → normalised latents (B, C, T, H/f, W/f), picture k from seeds[k].

        `request` must be complete, and hold these pictures alone if it asks for a variation. A refiner that takes over
        is told the request's prompts, and its sampler begins anew: one that remembers earlier answers of the network
        has none, as in diffusers. Noise is drawn on as if there had been no change. done: as of `condition`.
        """
        return sample(self, cond, seeds, request, on_step, origin, done)

    @torch.inference_mode()
    def preview(self, latent: Tensor) -> Image.Image:
        """The first picture of a latent still forming: by the system's quick look if it has one, else decoded."""
        look = self.system.preview(latent[:1].to(self.device))
        return self.decode(latent[:1])[0] if look is None else to_image(look[0])

    def named(self) -> dict[str, Any]:
        """Its name and the hashes of its weights."""
        return {"model": self.name, "weights": self.hashes}

    def recipe(self, request: Request, seconds: Mapping[str, float]) -> dict[str, Any]:
        """Everything needed to draw the same pictures again. seconds: by stage."""
        return {
            "sfumato": sfumato.__version__,
            "model": self.name,
            "weights": self.hashes | (self.clip_hashes if request.moves else {}),
            **({"embeddings": self.embeddings} if self.embeddings else {}),
            **self._controls_drawn(request),
            **({"loras": self.lora_digests(request)} if request.loras else {}),
            **({"without": list(self.without)} if self.without else {}),
            **({"text_dtype": self.text_dtype} if self.text_dtype else {}),
            **({} if self.refiner is None else {"refiner": self.refiner.named()}),
            **({"read_as": dict(self.system.read_as)} if self.system.read_as else {}),
            "request": request.to_dict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "engine": self.system.engine,
            "device": self.device.type,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernels": kernels(self.device),
            "noise": dict(GENERATOR),
            **({} if torch.are_deterministic_algorithms_enabled() else _took(seconds)),
        }

    def _controls_drawn(self, request: Request) -> dict[str, Any]:
        """The ControlNets that a request names and what makes their pictures, by hashes of weights, for the recipe."""
        names = {control.name for control in request.controls or ()}
        if not names:
            return {}
        drawn = {"controlnets": {k: v for k, v in self.system.control_hashes().items() if k in names}}
        made = {control.prepare for control in request.controls or ()}
        by = {name: each.digest for name, each in self.annotators.items() if name in made}
        return drawn | ({"annotators": by} if by else {})

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, T, H/f, W/f) of so many frames of so many pixels."""
        return self.system.latent_shape(frames, height, width)


def _took(seconds: Mapping[str, float]) -> dict[str, Any]:
    stages = {name: round(value, 4) for name, value in seconds.items()}
    return {"seconds": round(sum(seconds.values()), 3), "stages": stages}
