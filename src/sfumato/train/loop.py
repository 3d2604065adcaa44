"""The loop that fits weights: any task, any optimiser, one process or many, killed and continued at any moment.

Everything a step does is a function of (recipe, step, weights): the order of pictures, the noise, the dropped prompts. So a
run that continues from its checkpoint goes on to the bit as if it had never stopped, on the same machine with as many threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfumato.errors import SfumatoError
from sfumato.runtime import autocast, fast_dtype
from sfumato.train.optim import (
    Average,
    make_optimizers,
    optimizer_tensors,
    rate_at,
    restore_optimizers,
    set_rate,
)
from sfumato.train.recipe import TrainRecipe
from sfumato.train.state import Log, newest_state, save_state


@dataclass(frozen=True)
class Event:
    """What a run tells: kind is step, save, sheet, note or done."""

    kind: str
    stage: str
    step: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)  # loss and its terms
    rate: float = 0.0  # pictures per second
    mfu: float = 0.0  # share of the machine's matrix-product peak
    stall: float = 0.0  # share of the time spent waiting for data
    text: str = ""

    @property
    def seconds_left(self) -> float:
        return self.values.get("batch", 0.0) * (self.total - self.step) / self.rate if self.rate else 0.0


OnEvent = Callable[[Event], None]


@dataclass
class Player:
    """One network with its optimisers. `loss(net, step, part)` returns the mean loss of one microbatch and its terms."""

    name: str
    module: nn.Module
    recipe: TrainRecipe
    loss: Callable[[nn.Module, int, int], tuple[Tensor, dict[str, Tensor]]]
    compile: Callable[[nn.Module], None] | None = None  # how to compile it, where the recipe asks
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    net: nn.Module | None = None  # the module as it is called: wrapped for several processes


class Task(Protocol):
    """What the loop needs to know of a stage. The first player's average is the result."""

    stage: str
    recipe: TrainRecipe
    players: list[Player]
    flops: float  # of one picture's forward and backward pass; 0 if unknown

    def sheet(self, average: dict[str, Tensor], step: int) -> str: ...


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> World:
        return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()

    @property
    def leads(self) -> bool:
        return self.rank == 0


def fit(
    task: Task,
    folder: Path,
    identity: str,
    device: torch.device,
    on_event: OnEvent,
    peak: float = 0.0,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Tensor]:
    """Train `task` to its last step, from the newest checkpoint in `folder` if there is one; return the averaged state.

    `peak` is the machine's FLOP/s for the figure of merit that events carry. Only rank 0 writes and speaks.
    """
    recipe, world = task.recipe, World.current()
    parts = recipe.batch // (recipe.microbatch or recipe.batch)
    if parts % world.size:
        raise SfumatoError(
            f"{world.size} processes cannot share {parts} microbatches a step; set {task.stage}.train.microbatch so that they can"
        )
    dtype = fast_dtype(device) if recipe.precision == "auto" else getattr(torch, recipe.precision)
    for player in task.players:
        player.module.to(device).train()
        player.optimizers = make_optimizers(player.module, player.recipe)
    average = Average(task.players[0].module, recipe.ema)
    step = 0
    if found := newest_state(folder / "state", identity):
        step = _restore(task, average, found)
        on_event(Event("note", task.stage, step, recipe.steps, text=f"continues from step {step}"))
    for player in task.players:
        if recipe.compile and player.compile:
            player.compile(player.module)
        player.net = DistributedDataParallel(player.module) if world.size > 1 else player.module
    table = Log(folder / "log.csv", step) if world.leads else None
    clock = _Clock(recipe.batch, task.flops, peak, world.size)
    while step < recipe.steps:
        step += 1
        clock.start()
        values = {}
        for player in task.players:
            values |= _step(player, step, parts, world, device, dtype, clock)
        average.update(task.players[0].module, step)
        if not torch.isfinite(torch.tensor(values["loss"])):
            raise SfumatoError(
                f"the loss of {task.stage} became {values['loss']} at step {step}; lower the rate and run again: "
                "it continues from the last checkpoint"
            )
        clock.stop()
        if table:
            table.add(step, values)
            if log:
                log(step, values)
            on_event(clock.event(task.stage, step, recipe.steps, values))
        last = step == recipe.steps
        if table and (last or step % recipe.save_every == 0):
            save_state(folder / "state", step, _gather(task, average), identity)
            on_event(Event("save", task.stage, step, recipe.steps))
        if table and (last or step % recipe.sheet_every == 0):
            on_event(Event("sheet", task.stage, step, recipe.steps, text=task.sheet(average.state, step)))
    if table:
        table.close()
    if world.size > 1:
        dist.barrier()
    return average.state


def _step(
    player: Player,
    step: int,
    parts: int,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    clock: _Clock,
) -> dict[str, float]:
    """One optimiser step of one player over this process's share of the microbatches."""
    net = player.net
    assert net is not None
    share = parts // world.size
    sums: dict[str, Tensor] = {}
    set_rate(player.optimizers, rate_at(step, player.recipe))
    for optimizer in player.optimizers:
        optimizer.zero_grad(set_to_none=True)
    for i in range(share):
        part = world.rank * share + i
        quiet = net.no_sync() if isinstance(net, DistributedDataParallel) and i + 1 < share else nullcontext()
        with quiet:
            with autocast(device, dtype):
                loss, terms = player.loss(net, step, part)
            (loss / share).backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float() / share
    norm = nn.utils.clip_grad_norm_(player.module.parameters(), player.recipe.clip)
    before = time.perf_counter()
    for optimizer in player.optimizers:
        optimizer.step()
    clock.optimizer += time.perf_counter() - before
    names = list(sums)
    stacked = torch.stack([sums[name] for name in names])
    if world.size > 1:
        dist.all_reduce(stacked)
        stacked = stacked / world.size
    values = dict(zip(names, stacked.tolist(), strict=True))
    prefix = "" if "loss" in values else f"{player.name}_"
    return values | {
        f"{prefix}grad_norm": float(norm),
        f"{prefix}rate": player.optimizers[0].param_groups[0]["lr"],
    }


class _Clock:
    """Pictures per second over the last steps, and what share of them was waiting."""

    def __init__(self, batch: int, flops: float, peak: float, world: int):
        self.batch, self.flops, self.peak, self.world = batch, flops, peak, world
        self.mean = 0.0
        self.optimizer = 0.0
        self.waited = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        took = time.perf_counter() - self.began
        self.mean = took if not self.mean else 0.95 * self.mean + 0.05 * took

    def event(self, stage: str, step: int, total: int, values: dict[str, float]) -> Event:
        rate = self.batch / self.mean
        mfu = rate * self.flops / (self.peak * self.world) if self.peak else 0.0
        return Event("step", stage, step, total, values | {"batch": float(self.batch)}, rate, mfu)


def _gather(task: Task, average: Average) -> dict[str, Tensor]:
    tensors = {f"average/{name}": value for name, value in average.state.items()}
    for player in task.players:
        tensors |= {
            f"weights/{player.name}/{name}": value for name, value in player.module.state_dict().items()
        }
        tensors |= {
            f"optimizer/{player.name}/{name}": value
            for name, value in optimizer_tensors(player.optimizers).items()
        }
    return {name: value.clone() for name, value in tensors.items()}


def _restore(task: Task, average: Average, found: tuple[int, dict[str, Tensor]]) -> int:
    step, tensors = found

    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

    for name, value in under("average/").items():
        average.state[name].copy_(value)
    for player in task.players:
        player.module.load_state_dict(under(f"weights/{player.name}/"), strict=True)
        restore_optimizers(player.optimizers, under(f"optimizer/{player.name}/"))
    return step


def seeded(device: torch.device | str, *key: Any) -> torch.Generator:
    """A generator whose draws are a function of `key` alone."""
    import hashlib

    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
