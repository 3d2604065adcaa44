"""How fast this machine is at a model's stages, measured once and kept; and what an hour of it costs.

The file is `sfumato/machine.json` in $XDG_CONFIG_HOME, or else in ~/.config. Times are kept by processor, threads and
version of PyTorch, for each network by the shapes of its parts, not by its weights.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import platform
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato import checks
from sfumato.errors import InputError
from sfumato.storage import read_json, write_json

if TYPE_CHECKING:
    from sfumato.generate import Model

SLOPES = (0.7, 1.4)  # of ln seconds over ln FLOPs: what is believed beyond the points that were measured
Point = tuple[float, float]  # FLOPs of a call, seconds


@dataclass(frozen=True)
class Price:
    """What the user says that work costs. per_hour: of the machine. per_megapixel_step: of each million pixels drawn,
    times the calls of the network. watts: what the machine draws at work, where it does not tell itself.
    """

    per_hour: float = 0.0
    per_megapixel_step: float = 0.0
    currency: str = "USD"
    watts: float | None = None

    def validate(self) -> Price:
        """Itself, or `InputError` for what is no price."""
        checks.number("per-hour", self.per_hour, 0.0, 1e6)
        checks.number("per-megapixel-step", self.per_megapixel_step, 0.0, 1e6)
        if self.watts is not None:
            checks.number("watts", self.watts, 0.0, 1e6)
        if not re.fullmatch(r"[A-Za-z]{3}", self.currency):
            raise InputError(
                f"currency must be three letters such as USD, not {checks.shown(self.currency)}",
                argument="currency",
            )
        return replace(self, currency=self.currency.upper())

    def money(self, seconds: float, megapixel_steps: float) -> float | None:
        """In its currency; None where no price was set."""
        if not (self.per_hour or self.per_megapixel_step):
            return None
        return self.per_hour * seconds / 3600 + self.per_megapixel_step * megapixel_steps


@dataclass(frozen=True)
class Machine:
    """What is known of this machine. times: machine, network, dtype and engine → stage → points, FLOPs rising."""

    times: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    price: Price = field(default_factory=Price)

    def seconds(self, model: Model, stage: str, flops: float) -> tuple[float, bool] | None:
        """(seconds of one call of so many FLOPs, whether that network was measured here); None where none was.

        Between points by a power of the FLOPs, beyond them on by the last two. For a network that was not measured, the
        rate of the nearest call of that stage, in that type, of another network on this machine.
        """
        points = self.times.get(key_of(model), {}).get(stage)
        if points:
            return _along(points, flops), True
        here, kind = machine_key(model.device), kind_key(model)
        others = [
            point
            for key, stages in self.times.items()
            if key.startswith(here) and key.endswith(kind)
            for point in stages.get(stage, [])
        ]
        if not others or flops <= 0:
            return None
        near = min(others, key=lambda point: abs(math.log(point[0] / flops)))
        return near[1] * flops / near[0], False

    def learned(self, model: Model, times: dict[str, list[Point]]) -> Machine:
        """The same with these points in the place of a model's old ones."""
        return replace(
            self, times={**self.times, key_of(model): {s: sorted(points) for s, points in times.items()}}
        )


def machine_file() -> Path:
    """Where it is kept."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "sfumato" / "machine.json"


def read_machine(path: Path | None = None) -> Machine:
    """What is kept of this machine; nothing where there is no file. `InputError` for a file that is none of ours."""
    path = path or machine_file()
    if not path.exists():
        return Machine()
    try:
        said = read_json(path)
        price = Price(**said.get("price", {})).validate()
        times = {
            str(key): {
                str(stage): [(float(f), float(s)) for f, s in points] for stage, points in stages.items()
            }
            for key, stages in said["times"].items()
        }
        if any(
            not (f > 0 and s > 0)
            for stages in times.values()
            for points in stages.values()
            for f, s in points
        ):
            raise ValueError("a time or a count is not above 0")
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise InputError(
            f"{path} is damaged ({error}); remove it and measure again: sfumato cost --calibrate"
        ) from None
    return Machine(times, price)


def write_machine(machine: Machine, path: Path | None = None) -> Path:
    """Keep it, whole or not at all."""
    path = path or machine_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": "sfumato machine 1", "price": asdict(machine.price), "times": machine.times})
    return path


def with_price(machine: Machine, **given: Any) -> Machine:
    """The machine with those of the price's values that are given, not None."""
    known = {f.name for f in fields(Price)}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    return replace(machine, price=replace(machine.price, **values).validate())


def key_of(model: Model) -> str:
    """A model on this machine: the processor, the shapes of its networks, its type and engine."""
    shapes = repr(model.system.built_from)
    network = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", shapes).encode()).hexdigest()[:16]
    return f"{machine_key(model.device)} | {network} | {kind_key(model)}"


def kind_key(model: Model) -> str:
    """Its type and engine."""
    return f"{str(model.dtype).removeprefix('torch.')} {model.system.engine}"


def machine_key(device: torch.device) -> str:
    """The processor or GPU, the threads, and the version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} | torch {torch.__version__}"
    return f"{processor_name()} | {torch.get_num_threads()} threads | torch {torch.__version__}"


def processor_name() -> str:
    """The CPU's model and the instructions that PyTorch uses of it."""
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    name = told[1].strip() if told else platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def _along(points: list[Point], flops: float) -> float:
    """Seconds of a call of so many FLOPs, from points in rising order."""
    if len(points) == 1:
        return points[0][1] * flops / points[0][0]
    pairs = list(itertools.pairwise(points))
    (f0, s0), (f1, s1) = next((pair for pair in pairs if flops <= pair[1][0]), pairs[-1])
    slope = math.log(s1 / s0) / math.log(f1 / f0) if f1 > f0 else 1.0
    if not f0 <= flops <= f1:
        slope = min(max(slope, SLOPES[0]), SLOPES[1])
    start = (f0, s0) if flops < f1 else (f1, s1)
    return start[1] * (flops / start[0]) ** slope
