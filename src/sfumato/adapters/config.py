"""What stands beside the tensors of a PEFT adapter: `adapter_config.json`, or the same in the header's metadata.

Sources: huggingface/peft src/peft/tuners/lora/config.py; diffusers loaders/lora_base.py (`lora_adapter_metadata`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sfumato import checks
from sfumato.checkpoint.header import shown, strict_json
from sfumato.errors import CheckpointError
from sfumato.storage import read_json

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
NOTE = "lora_adapter_metadata"  # diffusers' key in a header
KINDS = ("LORA",)  # of `peft_type`, whose tensors are read
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of `init_lora_weights` that change W
AHEAD = r"(?:.*\.)?"  # of the path, before what a pattern tells: PEFT's `get_pattern_key`
STEEP = re.compile(r"\)[*+{]|([*+{].*){3}|([?|].*){9}")  # patterns that could be matched for hours


@dataclass(frozen=True)
class Component:
    """What is said of one model's modules. patterns: of paths in it, as PEFT matches them, to an alpha of their own."""

    alpha: float | None = None
    patterns: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    rank_stabilised: bool = False


@dataclass(frozen=True)
class PeftConfig:
    """components: by the prefix of their modules' names, "" for all that have no other."""

    components: Mapping[str, Component] = field(default_factory=dict)

    def scaling(self, module: str) -> tuple[float | None, bool]:
        """(the alpha of a module where the file has none of its own, whether it goes over √rank).

        None leaves the scale at 1.
        """
        component, path = self._placed(module)
        own = (alpha for pattern, alpha in component.patterns.items() if pattern.fullmatch(path))
        return next(own, component.alpha), component.rank_stabilised

    def require_used(self, file: Path, modules: Iterable[str]) -> None:
        """`CheckpointError` for a pattern that matches none of the file's modules."""
        placed = [self._placed(module) for module in modules]
        for component in self.components.values():
            paths = [path for owner, path in placed if owner is component]
            for pattern in component.patterns:
                if not any(map(pattern.fullmatch, paths)):
                    told = shown(pattern.pattern.removeprefix(AHEAD)[1:-1])
                    raise CheckpointError(f"{file}: {told} of alpha_pattern matches no module of the file")

    def _placed(self, module: str) -> tuple[Component, str]:
        """Whose module it is, and its path there."""
        module = module.removeprefix("base_model.model.")
        for prefix in sorted(self.components, key=len, reverse=True):
            if not prefix or module.startswith(prefix + "."):
                return self.components[prefix], module[len(prefix) + 1 :] if prefix else module
        return Component(), module


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
        return _config(told, str(beside))
    return PeftConfig()


def _config(told: Mapping[str, Any], where: str) -> PeftConfig:
    components: dict[str, Component] = {}
    for key, value in told.items():
        prefix, _, name = key.rpartition(".")
        change: dict[str, Any] = {}
        if name == "lora_alpha":
            change["alpha"] = _finite(value, f"{where}: {key}")
        elif name == "alpha_pattern" and isinstance(value, dict):
            change["patterns"] = {
                _pattern(k, f"{where}: {key}"): _finite(v, f"{where}: {key}") for k, v in value.items()
            }
        elif name == "use_rslora":
            change["rank_stabilised"] = value is True
        elif name == "fan_in_fan_out" and value is True:
            raise CheckpointError(f"{where} has {key}, for layers that no model here has")
        elif name == "init_lora_weights" and str(value).lower().startswith(REBASED):
            raise CheckpointError(
                f"{where} has {key} {value!r}: what it was made for is another base, changed when it was begun; "
                "convert it to a plain LoRA with PEFT"
            )
        if change:
            components[prefix] = replace(components.get(prefix, Component()), **change)
    return PeftConfig(components)


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """PEFT's `(.*\\.)?(text)$`."""
    if STEEP.search(text):
        raise CheckpointError(f"{where}: {shown(text)} is too wide a pattern")
    try:
        return re.compile(f"{AHEAD}({text})")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {shown(text)} is no regular expression: {error}") from None


def _finite(value: Any, what: str) -> float:
    if not checks.is_number(value):
        raise CheckpointError(f"{what} is {value!r}, where a number is right")
    return float(value)
