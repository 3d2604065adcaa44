"""How the networks of a Stable Diffusion are made from their tensors: in which type, and for what runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.adapters.fold import Touched
from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.checkpoint.fill import fill_layers, refill, refill_layers
from sfumato.errors import InputError
from sfumato.families.clip import load_encoder
from sfumato.families.sd.condition import Reader, TextStack, plan_of
from sfumato.families.sd.folder import tokenizer_folder
from sfumato.families.sd.networks import part_hash
from sfumato.memory import OFFLOADS, check_offload
from sfumato.nn.openvino import PRECISIONS, OpenVINOUNet, plugin
from sfumato.nn.packed import packed
from sfumato.nn.quantized import quantize, require_eight_bits, stand_in, units
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import fast_dtype
from sfumato.text.clip_tokens import ClipTokenizer, bundled, open_folder

if TYPE_CHECKING:
    from sfumato.families.sd.system import System


def openers(
    system: System, parts: Mapping[str, Mapping[str, Tensor]], *, stream: bool
) -> dict[str, Callable[[], Any]]:
    """How each network of a system is made from the tensors of its part, in the order in which drawing needs them.

    stream: the U-Net's layers are read whenever they are called.
    """
    shapes, sources, form = system.shapes, system.sources, (system.kept, system.device)

    def text() -> TextStack:
        encoders = tuple(
            load_encoder(part.config, parts[part.name], system.kept, sources[part.name], system.device)
            for part in shapes.text
        )
        return TextStack(plan_of(system.config.kind), encoders, system.tokenizers, system.inversions)

    def unet() -> UNet | OpenVINOUNet:
        where, of = sources["unet"], (system.device, system.dtype, system.engine)
        return denoiser(shapes.unet, parts["unet"], where, *of, stream=stream)

    def autoencoder() -> AutoencoderKL:
        with torch.device("meta"):
            model = AutoencoderKL(shapes.vae)
        fill_layers(model, parts["vae"], sources["vae"], *form)
        return model.eval().requires_grad_(False)

    return {"text": text, "denoiser": unet, "autoencoder": autoencoder}


def renewers(
    system: System, parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Callable[[Any, Touched], bool]]:
    """How each network takes over tensors of its parts that have changed; False where it must be opened again."""
    shapes, sources = system.shapes, system.sources

    def text(stack: TextStack, touched: Touched) -> bool:
        for part, encoder in zip(shapes.text, stack.encoders, strict=True):
            refill(encoder, parts[part.name], touched.get(part.name, ()), sources[part.name])
        return True

    def unet(network: UNet | OpenVINOUNet, touched: Touched) -> bool:
        if "unet" not in touched:
            return True
        if not isinstance(network, UNet):
            return False  # it is compiled as a whole
        eight_bits, form = system.dtype == torch.int8, (system.kept, system.device)
        with torch.device("meta"):
            blank = UNet(shapes.unet)
        ways: dict[str, Any] = (
            {"units": units, "twin": stand_in} if eight_bits else {"twin": lambda _, layer: packed(layer)}
        )
        refill_layers(network, blank, parts["unet"], touched["unet"], sources["unet"], *form, **ways)
        return True

    return {"text": text, "denoiser": unet, "autoencoder": lambda network, touched: "vae" not in touched}


def denoiser(
    config: UNetConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    device: torch.device,
    dtype: torch.dtype,
    engine: str = "torch",
    *,
    stream: bool = False,
) -> UNet | OpenVINOUNet:
    """The U-Net with these weights, laid out for what runs it. `where` stands for the weights in errors.

    stream: its layers are read whenever they are called, which `offloads` must allow.
    """
    eight_bits = dtype == torch.int8

    def network(device: torch.device, dtype: torch.dtype, pack: bool) -> UNet:
        with torch.device("meta"):
            unet = UNet(config)
        fill_layers(unet, tensors, where, dtype, device, pack=pack, stream=stream)
        return unet.eval().requires_grad_(False)

    if engine != "torch":
        exact = partial(network, torch.device("cpu"), torch.float32, pack=False)
        return OpenVINOUNet(config, exact, part_hash(tensors), dtype, plugin(engine))
    unet = network(device, kept_dtype(device, dtype), pack=not eight_bits)
    if eight_bits:
        quantize(unet)
    return unet


def kept_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type of what is not in eight bits: with int8 what the device is fast in, else `dtype` itself."""
    return fast_dtype(device) if dtype == torch.int8 else dtype


def check_engine(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """`InputError` if this machine cannot run a U-Net so, before anything is read."""
    if engine != "torch":
        plugin(engine)
        if dtype not in PRECISIONS:
            raise InputError(
                f"{engine} computes in fp32, bf16 or fp16; int8 is of the engine torch", argument="dtype"
            )
    elif dtype == torch.int8:
        require_eight_bits(torch.empty(0, dtype=kept_dtype(device, dtype), device=device))


def offloads(engine: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Which of `OFFLOADS` a U-Net of this engine and type can be kept in."""
    return tuple(name for name in OFFLOADS if name != "sequential") if _whole(engine, dtype) else OFFLOADS


def require_offload(name: str, engine: str, dtype: torch.dtype) -> None:
    """`InputError` unless the level is known and the U-Net can be kept so."""
    check_offload(name)
    if name not in offloads(engine, dtype):
        raise InputError(
            f"offload {name} reads layers anew at every call, and {_whole(engine, dtype)}; "
            "use model or none, or another dtype or engine",
            argument="offload",
        )


def _whole(engine: str, dtype: torch.dtype) -> str:
    """Why the U-Net must be in memory as a whole; "" where it need not."""
    if engine != "torch":
        return f"{engine} compiles the network as a whole"
    return "int8 rounds the weights once" if dtype == torch.int8 else ""


def tokenizer_of(folder: Path | None, reader: Reader) -> ClipTokenizer:
    """The folder's own for this text encoder, or else the bundled one."""
    place = None if folder is None else folder / tokenizer_folder(reader.part)
    if place is None or not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return bundled(reader.pad)
    return open_folder(place)
