"""A Ray cluster: joined by its address, or started on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from sfumato.errors import InputError, SfumatoError

LOCAL = "local"
STORE = 128 * 2**20  # bytes of the object store of a cluster started here: what goes through it are pictures


def require() -> ModuleType:
    """Ray. `InputError` that says what to install where it is missing."""
    try:
        import ray
        import ray.data
        import ray.serve
    except ImportError as error:
        raise InputError(
            f"--ray needs {error.name or 'ray'}: pip install 'sfumato[cluster]'", argument="ray"
        ) from None
    return ray


def join(address: str, processors: int | None = None) -> ModuleType:
    """Ray, connected. address: of a cluster, auto for one that runs here, or `LOCAL` to start one with `processors`.

    `SfumatoError` when there is none at the address.
    """
    ray = require()
    if ray.is_initialized():
        return ray
    where: dict[str, Any] = {"address": address}
    if address == LOCAL:
        where = {"num_cpus": processors, "object_store_memory": STORE, "include_dashboard": False}
    try:
        ray.init(**where, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SfumatoError(
            f"there is no Ray cluster at {address!r}: {str(error).splitlines()[0][:160]}"
        ) from None
    return ray


def absolute(value: Any) -> Any:
    """A path that is there, or several, so that a process in another folder finds them; anything else as it is."""
    if isinstance(value, dict):
        return {name: absolute(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(absolute(each) for each in value)
    if isinstance(value, Path):
        return value.absolute()
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value
