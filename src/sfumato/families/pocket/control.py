"""ControlNets of a pocket model: one safetensors file each, `control-NAME.safetensors` in the model's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoint.fill import fill
from sfumato.checkpoint.header import strict_json
from sfumato.checkpoint.source import open_weights
from sfumato.errors import CheckpointError, InputError
from sfumato.families.control import require_control
from sfumato.nn.dit import DiT
from sfumato.nn.dit_control import DiTControl, DiTControlConfig
from sfumato.storage import save_tensors, tensors_hash
from sfumato.types import Conditioning

FORMAT = "sfumato control 1"
CARD = "control"  # the one entry of a file's metadata, since the library writes several in no fixed order
HEAD = "control-"
TITLE = "pocket"  # what its models are called
Controller = Callable[[Tensor, Tensor, Conditioning, bool], tuple[Tensor, ...]]


def beside(directory: Path) -> dict[str, Path]:
    """The ControlNets in a model folder, by name."""
    return {file.stem.removeprefix(HEAD): file for file in sorted(directory.glob(f"{HEAD}*.safetensors"))}


def save(control: DiTControl, path: Path) -> Path:
    """Write its weights in bfloat16, with its shape in the file's metadata."""
    said = json.dumps({"format": FORMAT, **asdict(control.config)})
    save_tensors(path, {k: v.to(torch.bfloat16) for k, v in control.state_dict().items()}, {CARD: said})
    return path


def control_title(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str:
    """What the models are called that a ControlNet is for; "" of a file that `save` did not write."""
    try:
        said = strict_json(metadata.get(CARD, "{}"))
    except (ValueError, RecursionError):
        return ""
    return TITLE if isinstance(said, dict) and "format" in said else ""


def open_file(path: Path, base: DiT, device: torch.device) -> DiTControl:
    """The ControlNet in a file that `save` wrote, for this base. `CheckpointError` when it is none, or damaged;
    `InputError` when it is for another shape of model.
    """
    require_control(path, "pocket", TITLE)
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; ControlNets of pocket are .safetensors files, such as {HEAD}depth.safetensors",
            argument="controlnet",
        )
    weights = open_weights(path)
    config = _config(weights.metadata.get(CARD, "{}"), path)
    shape = base.config
    wanted = shape.latent_channels * shape.patch**2, shape.width, shape.heads
    if (config.hint, config.width, config.heads) != wanted or max(
        config.blocks, config.outputs
    ) > shape.depth:
        raise InputError(
            f"{path} is a ControlNet for a model of width {config.width} with {config.hint} numbers a token; this one "
            f"has {shape.width} and {wanted[0]}",
            argument="controlnet",
        )
    with torch.device("meta"):
        made = DiTControl(config)
    fill(made, weights, str(path), torch.float32, device)
    return made.eval().requires_grad_(False)


def _config(text: str, path: Path) -> DiTControlConfig:
    try:
        said: Any = strict_json(text)
        if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
            raise CheckpointError(
                f"{path} is no ControlNet of a model of our own: its metadata does not say {FORMAT!r}"
            )
        return DiTControlConfig(**said)
    except CheckpointError:
        raise
    except (ValueError, TypeError, InputError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say its shape: {error}") from None


def controller(control: DiTControl, base: DiT, hint: Tensor) -> Controller:
    """What it adds at every step, shown this encoded picture (1, C, 1, H, W)."""

    def adds(x: Tensor, time: Tensor, cond: Conditioning, guess: bool) -> tuple[Tensor, ...]:
        return control(base, x, time, cond, hint)

    return adds


@lru_cache(maxsize=32)
def digest(path: Path, changed: int, size: int) -> str:
    """SHA-256 of a file's tensors, read once for each state of it."""
    return tensors_hash(open_weights(path))


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """The same of several, by name."""
    found = {}
    for name, path in files.items():
        state = path.stat()
        found[name] = digest(path, state.st_mtime_ns, state.st_size)
    return found


class ControlTrainee:
    """What training asks of a ControlNet and its frozen base. `encodes`: control pictures are encoded once."""

    encodes = True

    def __init__(self, system: Any, blocks: int, outputs: int):
        self.system, self.base = system, system.denoiser.dit
        self.network = DiTControl.of(self.base, blocks, outputs)

    def hint(self, pixels: Tensor) -> Tensor:
        """Control pictures (B, 3, H, W) in [0, 1] → what the network reads of them."""
        return self.system.encode(2 * pixels[:, :, None] - 1)

    def adds(
        self, network: DiTControl, x: Tensor, time: Tensor, cond: Conditioning, hints: Tensor
    ) -> tuple[Tensor, ...]:
        """What it adds at a step."""
        return network(self.base, x, time, cond, hints)

    def answer(self, x: Tensor, time: Tensor, cond: Conditioning, control: tuple[Tensor, ...]) -> Tensor:
        """What the base answers with that."""
        return self.system.network(x, time, cond, control=control)

    def save(self, state: Mapping[str, Tensor], path: Path) -> Path:
        """Write these weights of the network as a file that `open_file` reads."""
        made = DiTControl(self.network.config)
        made.load_state_dict(dict(state))
        return save(made, path)
