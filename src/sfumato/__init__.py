"""Sfumato: a complete latent diffusion system, small enough to read.

Importing it costs nothing until a name is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "load": "sfumato.generate",
    "Model": "sfumato.generate",
    "LoraUse": "sfumato.types",
    "Request": "sfumato.types",
    "Result": "sfumato.types",
    "Conditioning": "sfumato.types",
    "SfumatoError": "sfumato.errors",
    "InputError": "sfumato.errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if _HOMES[name] == f"sfumato.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
