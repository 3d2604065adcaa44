"""What drawing with a checkpoint takes in memory, told from its headers: its code runs on tensors without numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.autoencoder.banded import encode_banded
from sfumato.autoencoder.framed import decode_framed, repeated_flops
from sfumato.autoencoder.kl import AutoencoderKL, posterior_of
from sfumato.autoencoder.memory import clip_bytes, peak_bytes
from sfumato.autoencoder.model import PIXEL_CHANNELS
from sfumato.checkpoint.cast import copy_bytes, copy_into
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.rules import info
from sfumato.diffusion.guidance import cfg_batched
from sfumato.families.published.controls import Controller
from sfumato.families.published.networks import Networks
from sfumato.families.published.openers import require_offload
from sfumato.families.published.system import PublishedSystem
from sfumato.flops import attention_flops
from sfumato.memory import Stage, Tracer, Whole, tracing
from sfumato.nn.attention import attention, attention_bytes
from sfumato.nn.spatial import same_halves
from sfumato.types import Conditioning, Request

# Holes that freed blocks leave in the C library's memory, as a share of what a pass holds. Not traced but measured, 0.5
# to 2 (benchmarks/memory.py); who offloads leaves none (`memory.leave_no_holes`).
HOLES = 1


def _encoded(model: AutoencoderKL, pixels: Tensor, *, dtype: torch.dtype | None, **more: Any) -> Any:
    B, _, T, H, W = pixels.shape
    count = peak_bytes(model.config, "encode", H, W, dtype or model.dtype, pictures=B * T)
    shape = B, 2 * model.config.channels, T, H // model.factor, W // model.factor
    return count, 0, lambda: posterior_of(torch.empty(shape, device=pixels.device))


def _decoded(model: AutoencoderKL, latent: Tensor, *, dtype: torch.dtype | None, **more: Any) -> Any:
    B, _, T, H, W = latent.shape
    height, width = H * model.factor, W * model.factor
    pixels = B * PIXEL_CHANNELS * T * height * width * 4
    count = clip_bytes(model.config, T, height, width, dtype or model.dtype) + pixels
    shape = B, PIXEL_CHANNELS, T, height, width
    return count, B * repeated_flops(model, T, H, W), lambda: torch.empty(shape, device=latent.device)


WHOLE: dict[Callable[..., Any], Whole] = {  # taken as one operation each
    attention: lambda q, *more: (
        attention_bytes(q, *more),
        attention_flops(q, *more),
        lambda: torch.empty_like(q),
    ),
    copy_into: lambda out, tensor: (copy_bytes(out, tensor), 0, None),
    finite: lambda tensor: (0, 0, lambda: True),
    same_halves: lambda *rows: (0, 0, lambda: False),
    encode_banded: _encoded,
    decode_framed: _decoded,
}


class Numberless(Mapping[str, Tensor]):
    """The tensors of a part as the header tells them, made anew at each asking. Under `tracing` they hold nothing."""

    def __init__(self, part: Mapping[str, Tensor]):
        self.forms = {name: info(part, name) for name in part}

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self.forms[name]
        return torch.empty(shape, dtype=dtype, device="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)


def trace(
    system: PublishedSystem,
    request: Request,
    size: tuple[int, int],
    batch: int,
    *,
    encodes: bool,
    offload: str,
    keep: int = 0,
) -> tuple[Stage, ...]:
    """The stages of drawing `batch` pictures of a complete request, at `size`, its largest; `encodes`: from a picture.

    keep: bytes of the denoiser's layers that "sequential" keeps in memory.

    The prompts are read and the U-Net is called as they are when drawing. The sampler's own latents are not counted.
    """
    require_offload(offload, system.engine, system.dtype)
    system = replace(system, engine="torch")  # of another engine the work is the same, its memory not known
    parts = {name: Numberless(part) for name, part in system.drawn_from.items()}
    cpu, keeps, streams = system.device.type == "cpu", offload == "none", offload == "sequential"
    window = max(getattr(part.weights, "window", 0) for part in system.parts.values()) if cpu else 0
    scale = 1.0 if system.told_guidance else request.guidance or 1.0
    halves: Whole = lambda *rows: (0, 0, lambda: scale != 1)  # noqa: E731
    with tracing({**WHOLE, same_halves: halves}) as tracer:
        networks, weights, loading = {}, {}, []
        for name, opener in system.openers(parts, keep=keep if streams else None).items():
            before = tracer.now
            networks[name], most = tracer.worst(opener)
            weights[name] = tracer.now - before
            loading.append(Stage("load", before if keeps else 0, most + window))
        controls, together = {}, 0
        names = sorted({control.name for control in request.controls or ()})
        for name, show in system.control_openers(names, Numberless, keep=0 if streams else None).items():
            before = tracer.now
            controls[name], most = tracer.worst(show)
            together += tracer.now - before
            loading.append(Stage("load", before if keeps else weights["denoiser"], most + window))
        weights["denoiser"] += together  # they work with it, however the others are kept
        ghost: Any = replace(
            system, networks=Networks({name: lambda n=name: networks[n] for name in networks})
        )
        marks = [tracer.flops]
        cond, text = tracer.worst(lambda: ghost.condition([request.prompt, request.negative], request))
        if (
            "autoencoder" in system.texts
        ):  # told from a picture, whose encoding was taken as one without a count
            networks["autoencoder"].encode(torch.empty(1, 3, 1, size[1], size[0], device=system.device))
        marks.append(tracer.flops)
        denoise = _denoise_bytes(ghost, tracer, cond, request, scale, size, batch, controls)
        marks.append(tracer.flops)
        decode = _decode_bytes(ghost, tracer, size, batch, request.frames or 1)
        frames = request.frames or 1
        drawn = torch.empty(batch, *ghost.latent_shape(frames, size[1], size[0]), device=system.device)
        networks["autoencoder"].decode(drawn)
        marks.append(tracer.flops)
        encodes = encodes or (bool(controls) and system.controls_encoded)
        if encodes:
            networks["autoencoder"].encode(torch.empty(batch, 3, 1, size[1], size[0], device=system.device))
        marks.append(tracer.flops)
    counted = (after - before for before, after in itertools.pairwise(marks))
    flops = dict(zip(("text", "denoise", "decode", "encode"), counted, strict=True))
    if cpu and keeps:
        denoise += HOLES * denoise
    load = max(loading, key=lambda stage: stage.bytes)
    resident = {name: sum(weights.values()) if keeps else own for name, own in weights.items()}
    stages = [
        Stage("load", resident[max(weights, key=weights.__getitem__)], 0),
        Stage("text", max(resident[name] for name in system.texts), text, flops["text"]),
        Stage(
            "denoise",
            resident["denoiser"],
            denoise + (window if streams else 0),
            flops["denoise"],
        ),
        Stage(
            "decode",
            resident["autoencoder"],
            decode,
            flops["decode"],
        ),
    ]
    held = min(stages[0].weights, load.bytes)
    stages[0] = Stage("load", held, load.bytes - held)
    if encodes:
        encode = _autoencoder_bytes(system, "encode", size, batch * (request.frames or 1))
        stages.insert(2, Stage("encode", resident["autoencoder"], encode, flops["encode"]))
    added = system.added if cpu else 0  # LoRAs stay as their files' pages
    return tuple(replace(stage, weights=stage.weights + added) for stage in stages)


def _decode_bytes(
    ghost: PublishedSystem, tracer: Tracer, size: tuple[int, int], batch: int, frames: int
) -> int:
    """Of decoding latents of that size: of clips by running it, of pictures by the account of its bands."""
    if not ghost.shapes.vae.temporal:
        return _autoencoder_bytes(ghost, "decode", size, batch * frames)
    latent = torch.empty(batch, *ghost.latent_shape(frames, size[1], size[0]), device=ghost.device)
    pixels = batch * frames * PIXEL_CHANNELS * size[0] * size[1] * 4  # they are clamped, or moved
    return tracer.worst(lambda: ghost.decode(latent))[1] + pixels


def _autoencoder_bytes(
    system: PublishedSystem, task: Literal["decode", "encode"], size: tuple[int, int], batch: int
) -> int:
    """Of a pass in bands, and its pixels once more: they are clamped, or moved."""
    width, height = size
    config = system.shapes.vae
    wide = torch.float32 if system.kept == torch.float16 and config.force_upcast else system.kept
    pixels = batch * PIXEL_CHANNELS * height * width * 4
    return peak_bytes(config, task, height, width, wide, pictures=batch) + pixels


def _denoise_bytes(
    ghost: Any,
    tracer: Tracer,
    cond: Conditioning,
    request: Request,
    scale: float,
    size: tuple[int, int],
    batch: int,
    controls: Mapping[str, Callable[[Tensor], Controller]],
) -> int:
    """Of one step, guided by `scale`, on latents of that size."""
    width, height = size
    shape = ghost.latent_shape(request.frames or 1, height, width)
    told = cond.change(lambda rows: rows.repeat_interleave(batch, 0))
    wanted = told.change(lambda rows: rows[: len(rows) // 2])

    shown = [
        show(torch.empty(ghost.shown_shape(name, height, width), device=ghost.device))
        for name, show in controls.items()
    ]

    def network(x: Tensor, level: Tensor, given: Conditioning) -> Tensor:
        if ghost.inpaint_channels is not None:
            more_channels = ghost.shapes.denoiser.in_channels - shape[0]
            x = torch.cat([x, x.new_empty(len(x), more_channels, *x.shape[2:])], 1)
        control: tuple[Tensor, ...] = ()
        for adds in shown:
            added = adds(x, level, given, False)
            control = tuple(a + b for a, b in zip(control, added, strict=True)) if control else added
        more = {"control": control} if control else {}
        return ghost.network(x, level, given, **more).float()

    kind = ghost.parameterization
    preset = ghost.config.preset
    denoise = cfg_batched(
        kind.denoiser(network, told), kind.denoiser(network, wanted), scale, preset.interval, preset.rescale
    )
    x = torch.empty(batch, *shape, device=ghost.device)
    return tracer.worst(lambda: denoise(x, 1.0))[1]
