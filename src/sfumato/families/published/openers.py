"""How the networks of a checkpoint are made from their tensors: in which type, and for what runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.autoencoder import temporal
from sfumato.autoencoder.kl import KLConfig
from sfumato.checkpoint.fill import fill, fill_layers
from sfumato.checkpoint.refill import add_products, refill_layers
from sfumato.errors import InputError
from sfumato.families.published.networks import part_hash
from sfumato.memory import OFFLOADS, check_offload
from sfumato.nn import mmdit, spacetime, unet
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.mmdit import MMDiT, MMDiTConfig
from sfumato.nn.mmdit_control import CONTROL_KEPT, MMDiTControl, MMDiTControlConfig
from sfumato.nn.openvino import OpenVINONetwork, plugin, require_nncf
from sfumato.nn.quantized import quantize, require_eight_bits, stand_in, units
from sfumato.nn.spacetime import SpaceTimeConfig, SpaceTimeUNet
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import fast_dtype
from sfumato.text.clip import ClipConfig, ClipTextEncoder
from sfumato.text.t5 import T5Config, T5Encoder
from sfumato.text.vision import ClipVisionConfig, ClipVisionEncoder

NETWORKS: Mapping[
    type, Callable[[Any], nn.Module]
] = {  # a configuration's class to the network of that shape
    UNetConfig: UNet,
    MMDiTConfig: MMDiT,
    ControlNetConfig: ControlNet,
    MMDiTControlConfig: MMDiTControl,
    SpaceTimeConfig: SpaceTimeUNet,
    KLConfig: temporal.build,
    ClipConfig: ClipTextEncoder,
    ClipVisionConfig: ClipVisionEncoder,
    T5Config: T5Encoder,
}
NOT_EIGHT_BITS = {
    UNetConfig: unet.KEPT,
    MMDiTConfig: mmdit.KEPT,
    ControlNetConfig: unet.KEPT,
    MMDiTControlConfig: CONTROL_KEPT,
    SpaceTimeConfig: spacetime.KEPT,
}  # parts of names of layers that stay as they are


def blank(config: Any) -> nn.Module:
    """The network of that shape without numbers, on the meta device."""
    with torch.device("meta"):
        return NETWORKS[type(config)](config)


def autoencoder(
    config: KLConfig, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """The autoencoder with these weights. `where` stands for them in errors."""
    model: Any = blank(config)
    fill_layers(model, tensors, where, dtype, device)
    return model.eval().requires_grad_(False)


def picture_encoder(
    config: ClipVisionConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype,
    device: torch.device,
) -> ClipVisionEncoder:
    """CLIP's picture encoder with these weights. `where` stands for them in errors."""
    model: Any = blank(config)
    fill(model, tensors, where, dtype, device)
    return model.eval().requires_grad_(False)


def denoiser(
    config: Any,
    tensors: Mapping[str, Tensor],
    where: str,
    device: torch.device,
    dtype: torch.dtype,
    engine: str = "torch",
    *,
    keep: int | None = None,
) -> Any:
    """The network that draws with these weights, or a ControlNet, laid out for what runs it. `where` stands for the
    weights in errors.

    keep: bytes of its layers that stay in memory, the others being read whenever they are called, which `offloads` must
    allow; None keeps all.
    """
    eight_bits = dtype == torch.int8

    def network(device: torch.device, dtype: torch.dtype, pack: bool) -> Any:
        made = blank(config)
        fill_layers(made, tensors, where, dtype, device, pack=pack, keep=keep)
        return made.eval().requires_grad_(False)

    if engine != "torch":
        exact = partial(network, torch.device("cpu"), torch.float32, pack=False)
        return OpenVINONetwork(config, exact, part_hash(tensors), dtype, plugin(engine))
    made = network(device, kept_dtype(device, dtype), pack=not eight_bits)
    if eight_bits:
        quantize(made, NOT_EIGHT_BITS[type(config)])
    return made


def renewed(
    network: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    names: Collection[str],
    where: str,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Have a network that `denoiser` made take over the tensors of these names; False where it must be made again."""
    if not names:
        return True
    if isinstance(network, OpenVINONetwork):
        return False  # it is compiled as a whole
    ways: dict[str, Any] = {"pack": True}
    if dtype == torch.int8:
        ways = {"units": units, "twin": partial(stand_in, kept=NOT_EIGHT_BITS[type(config)])}
    else:
        names = frozenset(names) - add_products(network, tensors, names)
    if names:
        refill_layers(
            network, _outline(config), tensors, names, where, kept_dtype(device, dtype), device, **ways
        )
    return True


@lru_cache(maxsize=2)
def _outline(config: Any) -> nn.Module:
    """`blank`, kept for the next change of weights: making SDXL's takes half a second. It is to stay as it is."""
    return blank(config)


def plain_network(
    config: Any, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """The network in ordinary layers, frozen, through which gradients pass."""
    made = blank(config)
    fill_layers(made, tensors, where, dtype, device)
    return made.eval().requires_grad_(False)


def kept_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type of what is not in eight bits: with int8 what the device is fast in, else `dtype` itself."""
    return fast_dtype(device) if dtype == torch.int8 else dtype


def check_engine(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """`InputError` if this machine cannot run a network so, before anything is read."""
    if engine != "torch":
        plugin(engine)
        if dtype == torch.int8:
            require_nncf()
    elif dtype == torch.int8:
        require_eight_bits(torch.empty(0, dtype=kept_dtype(device, dtype), device=device))


def offloads(engine: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Which of `OFFLOADS` a network of this engine and type can be kept in."""
    return tuple(name for name in OFFLOADS if name != "sequential") if _whole(engine, dtype) else OFFLOADS


def require_offload(name: str, engine: str, dtype: torch.dtype) -> None:
    """`InputError` unless the level is known and the network can be kept so."""
    check_offload(name)
    if name not in offloads(engine, dtype):
        raise InputError(
            f"offload {name} reads layers anew at every call, and {_whole(engine, dtype)}; "
            "use model or none, or another dtype or engine",
            argument="offload",
        )


def _whole(engine: str, dtype: torch.dtype) -> str:
    """Why the network must be in memory as a whole; "" where it need not."""
    if engine != "torch":
        return f"{engine} compiles the network as a whole"
    return "int8 rounds the weights once" if dtype == torch.int8 else ""
