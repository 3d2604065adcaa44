"""Every route of the server, to be walked."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from sfumato.serve.settings import ModelSpec, Settings
from sfumato.serve.web.app import ROOMS
from sfumato.serve.web.guard import PUBLIC, PUBLIC_UNDER


def all_routes() -> list[tuple[str, str]]:
    """Every method and path of the application, with those that the document leaves out."""
    desk = SimpleNamespace(settings=Settings((ModelSpec("pocket", "pocket"),), Path(".")), prices=None)
    found = []
    for room in ROOMS:
        for route in room.routes(desk).routes:
            found += [(method, route.path) for method in sorted(route.methods - {"HEAD"})]
    return found


ROUTES = all_routes()


def filled(path: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)(?::path)?\}", lambda match: values[match[1]], path)


def public(path: str) -> bool:
    return path in PUBLIC or path.startswith(PUBLIC_UNDER)
