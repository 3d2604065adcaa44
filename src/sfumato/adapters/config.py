"""What stands beside the tensors of a PEFT adapter: `adapter_config.json`, or the same in the header's metadata.

Sources: huggingface/peft src/peft/tuners/lora/config.py; diffusers loaders/lora_base.py (`lora_adapter_metadata`).
"""

from __future__ import annotations

import json
import math
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
# what patterns are made of: what stands for one sign and may repeat; names; ends; groups of alternatives
SIGNS = re.compile(r"(?:(?:\\[.dw]|\[\^?[\w.-]+\]|\.)[*+]?|[\w ^$|)-]|\((?:\?:)?)*+")
REPEATS = 3  # more, or so many ways by alternatives, could be matched for hours
WAYS = 16  # of alternatives count as much as one that repeats
LONGEST = 128  # signs of a path that patterns are held against; names of our models are half as long


@dataclass(frozen=True)
class Component:
    """What is said of one model's modules. patterns: of paths in it, as PEFT matches them, with an alpha each."""

    alpha: float | None = None
    patterns: Mapping[str, tuple[re.Pattern[str], float]] = field(default_factory=dict)
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
        own = (alpha for pattern, alpha in component.patterns.values() if _matches(pattern, path))
        return next(own, component.alpha), component.rank_stabilised

    def unused(self, modules: Iterable[str]) -> dict[str, str]:
        """Patterns that match none of the file's modules, with that as the reason. PEFT passes over them."""
        placed = [self._placed(module) for module in modules]
        return {
            f"alpha_pattern {text}": "matches no module of the file"
            for component in self.components.values()
            for text, (pattern, _) in component.patterns.items()
            if not any(owner is component and _matches(pattern, path) for owner, path in placed)
        }

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
                k: (_pattern(k, f"{where}: {key}"), _finite(v, f"{where}: {key}")) for k, v in value.items()
            }
        elif name == "use_rslora":
            change["rank_stabilised"] = value is True
        elif name == "fan_in_fan_out" and value is True:
            raise CheckpointError(f"{where} has {key}, for layers that no model here has")
        elif name == "init_lora_weights" and str(value).lower().startswith(REBASED):
            raise CheckpointError(
                f"{where} has {key} {value!r}: it was made for a changed base; convert it to a plain LoRA with PEFT"
            )
        if change:
            components[prefix] = replace(components.get(prefix, Component()), **change)
    return PeftConfig(components)


def _pattern(text: str, where: str) -> re.Pattern[str]:
    """PEFT's `(.*\\.)?(text)$`."""
    known = SIGNS.match(text)
    rest = text[known.end() :] if known else text
    if rest:
        sign = rest[: 2 if rest.startswith("\\") else 1]
        raise CheckpointError(f"{where}: {shown(sign)} is not read there in the pattern {shown(text)}")
    ways = math.prod(part.count("|") + 1 for part in text.split("("))
    if ways * WAYS ** sum(map(text.count, "*+")) > WAYS**REPEATS:
        raise CheckpointError(
            f"{where}: {shown(text)} could match in too many ways; up to {REPEATS} of * and + are read, or "
            "fewer beside alternatives"
        )
    try:
        return re.compile(f"{AHEAD}({text})")
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {shown(text)} is no regular expression: {error}") from None


def _matches(pattern: re.Pattern[str], path: str) -> bool:
    return len(path) <= LONGEST and pattern.fullmatch(path) is not None


def _finite(value: Any, what: str) -> float:
    if not checks.is_number(value):
        raise CheckpointError(f"{what} is {value!r}, where a number is right")
    return float(value)
