"""Messages for clients, without the places where things lie on the machine that serves."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import sfumato
from sfumato.serve.settings import ModelSpec

HIDDEN = "…"
ADVICE = re.compile(r"; one is opened with the model, by .*")  # to who opens it
# a path from the root that is at least two names long, and no address of the API's own
PATH = re.compile(
    r"(?<![\w.:/~…])(?:~|[A-Za-z]:)?[/\\](?!(?:v1|sdapi|page)/)[^\s/\\'\"<>|]+[/\\][^\s'\"<>|,;)]*"
)


class Discreet:
    """Takes paths out of a text. named: what to say in place of a file or folder that is known."""

    def __init__(self, named: Mapping[str, str]):
        known = {form: name for path, name in named.items() for form in _forms(path)}
        own = (tempfile.gettempdir(), str(Path.home()), os.getcwd(), str(Path(sfumato.__file__).parent))
        known |= {path: HIDDEN for path in own if len(path) > 1 and path not in known}
        self._known = sorted(known.items(), key=lambda item: -len(item[0]))

    def __call__(self, text: str) -> str:
        for path, name in self._known:
            text = text.replace(path, name)
        return PATH.sub(HIDDEN, ADVICE.sub("", text))


def of_models(specs: Iterable[ModelSpec]) -> Discreet:
    """One that calls the files of models as clients do."""
    named: dict[str, str] = {}
    for spec in specs:
        parts = {
            spec.vae: "vae",
            spec.refiner: "refiner",
            spec.variant: "variant",
            spec.tokenizer: "tokenizer",
        }
        named |= {path: f"{spec.name}'s {part}" for path, part in parts.items() if path}
        named |= {
            path: name
            for files in (spec.loras, spec.controlnets, spec.annotators)
            for name, path in files.items()
        }
        named[spec.source] = spec.name
    return Discreet(named)


def _forms(path: str) -> set[str]:
    """How a path may be spelled in a message; none for a plain name, which is no place."""
    if os.sep not in path and not os.path.exists(path):
        return set()
    found = Path(path).expanduser()
    return {
        form for form in (path, str(found), str(found.absolute()), str(found.resolve())) if os.sep in form
    }
