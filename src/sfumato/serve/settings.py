"""What a server is started with, checked before anything is opened."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sfumato import checks
from sfumato.errors import InputError
from sfumato.serve.money import Prices

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MOST_BATCH = 64
LEAST_MEMORY = 2**20  # bytes: what is less was meant otherwise
NAMED = ("loras", "controlnets", "annotators")  # fields of a model that are files by name
DAY = 86400.0  # seconds


@dataclass(frozen=True)
class ModelSpec:
    """A model to serve. name: what clients call it. source: what `sfumato.load` opens.

    dtype, vae, refiner, variant, preset, tokenizer, offload: as of `load`. loras, controlnets, annotators: files, and
    folders of networks, by the names that requests call them; a LoRA counts in those requests alone that ask for it.
    """

    name: str
    source: str
    dtype: str | None = None
    vae: str | None = None
    refiner: str | None = None
    variant: str | None = None
    preset: str | None = None
    tokenizer: str | None = None
    offload: str | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    controlnets: Mapping[str, str] = field(default_factory=dict)
    annotators: Mapping[str, str] = field(default_factory=dict)

    def validate(self) -> ModelSpec:
        """Itself, or `InputError` for a name that could not stand in an address."""
        sound = 0 < len(self.name) <= 80 and all(c.isalnum() or c in "._-+" for c in self.name)
        if not sound or not self.name.isascii():
            raise InputError(
                f"a model's name must be of letters, digits and ._-+, not {self.name[:60]!r}; say NAME=MODEL",
                argument="model",
            )
        for name in NAMED:
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(file, str) for file in value.values()):
                raise InputError(f"{name} of {self.name!r} must be files by name", argument=name)
        return self

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    devices: one worker each; None is the faster of this machine. keys: the file of keys; without one everybody on this
    machine may draw, and nobody else. ledger: its URL. queue: jobs that wait at most. batch: pictures that a device
    works on together. deadline, longest: seconds that a job has by default, and at most. drain: seconds that a stop
    waits for what was accepted. keep: seconds that pictures are kept. grace: seconds that a
    client which tries again is waited for. body: bytes of the largest request. lora_size: of
    the largest LoRA that a client may send; 0 where none may. hosts: names that the server is called by, besides its
    address. memory: bytes that a worker may plan with; None is what is free.
    """

    models: tuple[ModelSpec, ...]
    data: Path
    devices: tuple[str | None, ...] = (None,)
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    ledger: str = ""
    prices: Prices = field(default_factory=Prices)
    queue: int = 64
    batch: int = 8
    deadline: float = 600.0
    longest: float = 3600.0
    drain: float = 120.0
    keep: float = 7 * DAY
    grace: float = 10.0
    body: int = 32 * 2**20
    lora_size: int = 2**30
    hosts: tuple[str, ...] = ()
    memory: int | None = None

    def validate(self) -> Settings:
        """Itself, or `InputError` for what cannot be served, or should not be."""
        if not self.models:
            raise InputError("give at least one model to serve", argument="model")
        names = [model.validate().name for model in self.models]
        if len(set(names)) < len(names):
            raise InputError("two models have one name; say NAME=MODEL", argument="model")
        for name in names:
            self.prices.rule(name)
        checks.integer("port", self.port, 0, 65535)
        checks.integer("queue", self.queue, 1, 100_000)
        checks.integer("batch", self.batch, 1, MOST_BATCH)
        checks.number("deadline", self.deadline, 1, self.longest)
        checks.number("longest", self.longest, 1, 7 * 86400)
        checks.number("drain", self.drain, 0, 86400)
        if not 60 <= self.keep <= 3650 * DAY:  # told as it is given
            raise InputError(
                f"keep must be between a minute and 3650 days, not {self.keep / DAY:g} days", argument="keep"
            )
        checks.number("grace", self.grace, 0, 3600)
        checks.integer("body", self.body, 2**16, 2**30)
        checks.integer("lora_size", self.lora_size, 0, 2**31)
        if self.memory is not None and self.memory < LEAST_MEMORY:
            raise InputError(
                f"memory must be 1MiB or more, such as 6GB, not {self.memory:,} bytes", argument="memory"
            )
        if self.keys is None and not is_loopback(self.host):
            raise InputError(
                f"without --keys only this machine is served, and {self.host!r} may be reached from others; give "
                "--keys FILE (`sfumato keys add NAME --keys FILE` makes it), or --host 127.0.0.1",
                argument="host",
            )
        if self.keys is not None and not self.keys.is_file():
            raise InputError(
                f"keys {str(self.keys)!r} does not exist; `sfumato keys add NAME --keys {self.keys}` makes it",
                argument="keys",
            )
        return self

    @property
    def ledger_url(self) -> str:
        return self.ledger or ledger_url(self.data)


def default_data() -> Path:
    """Where a server keeps its ledger and pictures: `sfumato/serve` in $XDG_DATA_HOME, or else in ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sfumato" / "serve"


def ledger_url(data: Path) -> str:
    """The SQLite ledger in a server's folder."""
    return f"sqlite:///{data.absolute() / 'ledger.db'}"


def require_extra() -> None:
    """`InputError` that says what to install, where something is missing that a server needs."""
    for module in ("fastapi", "uvicorn", "sqlalchemy", "prometheus_client", "python_multipart"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"a server needs {module}: pip install 'sfumato[serve]'", argument="serve")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def model_given(text: str, **options: Any) -> ModelSpec:
    """A model from `[NAME=]MODEL`; the name is the file's or folder's by default."""
    name, equals, source = text.partition("=")
    if not equals or os.path.exists(text):
        path = Path(text)
        name, source = (path.stem if path.suffix == ".safetensors" else path.name), text
    return ModelSpec(name, source, **options).validate()


def named_files(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=FILE, or FILE by its own name, to files by name. `InputError` for one name twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or os.path.exists(text):
            name, file = Path(text).stem, text
        if not name or not file or name in found:
            raise InputError(
                f"{option} must be NAME=FILE, each name once, not {text[:60]!r}", argument=option
            )
        found[name] = file
    return found


def read_models(path: str | Path) -> tuple[ModelSpec, ...]:
    """Models from a TOML file of [[model]] tables with the fields of `ModelSpec`, strictly."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"models {str(path)!r} cannot be read: {error.strerror}", argument="models"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"models {str(path)!r} is no TOML: {error}", argument="models") from None
    rows = table.get("model")
    if (
        set(table) != {"model"}
        or not isinstance(rows, list)
        or not all(isinstance(row, dict) for row in rows)
    ):
        raise InputError(
            f"models {str(path)!r} must hold [[model]] tables and nothing else", argument="models"
        )
    known = {item.name for item in fields(ModelSpec)}
    for row in rows:
        if extra := row.keys() - known:
            raise InputError(
                f"a model has no {sorted(extra)[0]!r}; it has {', '.join(sorted(known))}", argument="models"
            )
        if not isinstance(row.get("name"), str) or not isinstance(row.get("source"), str):
            raise InputError("each [[model]] needs a name and a source", argument="models")
        for name in known - {"name", "source", *NAMED}:
            if not isinstance(row.get(name), str | None):
                raise InputError(f"{name} of the model {row['name']!r} must be text", argument="models")
    return tuple(ModelSpec(**row).validate() for row in rows)
