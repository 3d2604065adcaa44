"""What training beside a published checkpoint shares, whatever its family: LoRAs and ControlNets for a frozen model."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.families.published.adapters import speller
from sfumato.families.published.networks import Networks, part_hash
from sfumato.families.published.openers import plain_network
from sfumato.families.published.system import PublishedSystem
from sfumato.families.trainee import Read, Trainee
from sfumato.storage import save_tensors
from sfumato.types import Conditioning


def frozen(system: PublishedSystem, what: str) -> Any:
    """The denoiser in plain, frozen layers of the system's own precision, which pass gradients.

    It is read a second time, since layers packed for a CPU pass none. `InputError` for weights that cannot be trained
    beside; `what` would be trained.
    """
    if system.dtype == torch.int8 or system.engine != "torch":
        raise InputError(
            f"{what} is trained beside weights in float32 or bfloat16, by PyTorch (the engine torch)",
            argument="dtype",
        )
    part = system.part
    form = system.kept, system.device
    return plain_network(system.shapes.denoiser, system.parts[part], system.sources[part], *form)


def trainee(
    system: PublishedSystem,
    denoiser: nn.Module,
    encoders: Mapping[str, nn.Module],
    opened: Mapping[str, Any],
    *,
    repeated: Iterable[nn.Module],
    reader: Callable[[Any, Iterable[str]], Read],
    sized: Callable[[Conditioning, int, int], Conditioning] = lambda cond, height, width: cond,
    notes: Mapping[str, str],
) -> Trainee:
    """A system as a model that a LoRA is trained for.

    denoiser: of `frozen`. encoders: the text encoders that are trained too, by part. opened: networks of the system, by
    their names in it, that are there already. reader(system, captions): as of `Trainee`; the other arguments too.
    """
    make: dict[str, Callable[[], Any]] = system.openers(system.parts, keep=None)
    make |= {name: lambda network=network: network for name, network in opened.items()}
    make |= {"denoiser": lambda: denoiser}
    # what is trained stays, whatever else is let go
    own = replace(system, networks=Networks(make, "model"))
    return Trainee(
        system=own,
        kind=system.config.kind,
        networks={system.part: denoiser, **encoders},
        texts=tuple(part.name for part in system.shapes.text),
        repeated=tuple(repeated),
        parameterization=own.parameterization,
        levels=own.levels,
        reader=functools.partial(reader, own),
        sized=sized,
        predict=own.network,
        spell=speller(system.family, system.config.kind, system.shapes),
        identity=functools.partial(_identity, system),
        notes=notes,
    )


def _identity(system: PublishedSystem) -> str:
    hashes = [part_hash(system.parts[name]) for name in sorted(system.parts)]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


class ControlTrainee:
    """What training asks of a ControlNet and its frozen base; as `families.pocket.control.ControlTrainee`.

    system: the base's. base: its denoiser, of `frozen`. network: the fresh ControlNet, which is trained in float32.
    """

    encodes = False

    def __init__(self, system: PublishedSystem, base: Any, network: nn.Module):
        self.system, self.base = system, base
        self.network = network.float().requires_grad_(True)

    def save(self, state: Mapping[str, Tensor], path: Path) -> Path:
        """Write these weights of the network, under diffusers' names, in float16."""
        save_tensors(path, {name: tensor.to(torch.float16) for name, tensor in state.items()})
        return path
