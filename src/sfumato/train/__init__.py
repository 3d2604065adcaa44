"""Training: recipes, the loop, and one step function for each stage. `run` does a whole recipe."""

from __future__ import annotations

from typing import Any

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sfumato.train.start import run

        return run
    raise AttributeError(f"module 'sfumato.train' has no attribute {name!r}")
