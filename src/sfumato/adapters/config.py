"""What stands beside the tensors of a PEFT adapter: `adapter_config.json`, or the same in the header's metadata.

Sources: huggingface/peft src/peft/tuners/lora/config.py; diffusers loaders/lora_base.py (`lora_adapter_metadata`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato import checks
from sfumato.checkpoint.header import strict_json
from sfumato.errors import CheckpointError
from sfumato.storage import read_json

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
NOTE = "lora_adapter_metadata"  # diffusers' key in a header
KINDS = ("LORA",)  # of `peft_type`, whose tensors are read


@dataclass(frozen=True)
class PeftConfig:
    """alphas: prefix of modules, "" for all, to `lora_alpha`. patterns: ending of a module's path to its own alpha."""

    alphas: Mapping[str, float] = field(default_factory=dict)
    patterns: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha(self, module: str) -> float | None:
        """The alpha of a module where the file has none of its own; None leaves the scale at 1."""
        for ending, value in self.patterns.items():
            if module == ending or module.endswith("." + ending):
                return value
        for prefix in sorted(self.alphas, key=len, reverse=True):
            if not prefix or module.startswith(prefix + "."):
                return self.alphas[prefix]
        return None


def adapter_file(path: str | os.PathLike[str]) -> Path:
    """The file itself, or that in a folder written by PEFT or diffusers. `CheckpointError` when there is none."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without {' or '.join(FILES)}; give the LoRA's .safetensors file"
    )


def peft_config(file: Path, metadata: Mapping[str, str]) -> PeftConfig:
    """What the header notes, or else the `adapter_config.json` beside an `adapter_model.safetensors`."""
    if NOTE in metadata:
        try:
            told = strict_json(metadata[NOTE])
        except (ValueError, RecursionError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{file}: the header's {NOTE} is no JSON: {error}") from None
        if not isinstance(told, dict):
            raise CheckpointError(f"{file}: the header's {NOTE} must be an object")
        return _config(told, f"{file}: {NOTE}")
    beside = file.with_name(CONFIG)
    if file.name == FILES[0] and beside.is_file():
        told = read_json(beside)
        if told.get("peft_type", KINDS[0]) not in KINDS:
            raise CheckpointError(f"{beside} is of {told['peft_type']!r}; {' and '.join(KINDS)} is read here")
        if told.get("fan_in_fan_out") is True:
            raise CheckpointError(f"{beside} has fan_in_fan_out, for layers that no model here has")
        return _config(told, str(beside))
    return PeftConfig()


def _config(told: Mapping[str, Any], where: str) -> PeftConfig:
    alphas: dict[str, float] = {}
    patterns: dict[str, float] = {}
    stabilised = False
    for key, value in told.items():
        prefix, _, name = key.rpartition(".")
        if name == "lora_alpha":
            alphas[prefix] = _finite(value, f"{where}: {key}")
        elif name == "alpha_pattern" and isinstance(value, dict):
            patterns |= {str(k): _finite(v, f"{where}: {key}") for k, v in value.items()}
        elif name == "use_rslora":
            stabilised = stabilised or value is True
    return PeftConfig(alphas, patterns, stabilised)


def _finite(value: Any, what: str) -> float:
    if not checks.is_number(value):
        raise CheckpointError(f"{what} is {value!r}, where a number is right")
    return float(value)
