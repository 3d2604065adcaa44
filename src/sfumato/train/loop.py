"""The loop that fits weights: any task, any optimiser, one process or many, killed and continued at any moment.

Everything a step does is a function of (recipe, step, weights): the order of pictures, the noise, the dropped
prompts. So a run that continues from its checkpoint goes on to the bit as if it had never stopped, on the same
machine with as many threads.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfumato.errors import InputError, SfumatoError
from sfumato.runtime import autocast, fast_dtype
from sfumato.train.lanes import Feed, Lanes, lane_count, short_turns
from sfumato.train.optim import (
    Average,
    make_optimizers,
    optimizer_tensors,
    rate_at,
    restore_optimizers,
    set_rate,
)
from sfumato.train.recipe import TrainRecipe
from sfumato.train.state import Log, clear_leftovers, logged, newest_state, save_state


@dataclass(frozen=True)
class Event:
    """What a run tells. kind: step, prepare (rendering, encoding), save, sheet, note or done."""

    kind: str
    stage: str
    step: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)  # loss and its terms
    rate: float = 0.0  # pictures per second
    mfu: float = 0.0  # share of the machine's matrix-product peak
    stall: float = 0.0  # share of the time spent waiting for data
    optimizer: float = 0.0  # share of the time spent in optimisers and averaging
    seconds_left: float = 0.0
    text: str = ""


OnEvent = Callable[[Event], None]
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass
class Player:
    """One network with its optimisers.

    batch(step, part) is one microbatch; loss(net, batch, step, part) is its mean loss and the terms to log. Both
    are functions of their arguments alone, so that batches may be made ahead of time. partial: it may have parameters
    that no loss asks for, which several processes must not wait for.
    """

    name: str
    module: nn.Module
    recipe: TrainRecipe
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any, int, int], Loss]
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    apart: bool = False
    partial: bool = False
    lanes: Lanes | None = None  # the module as it is called: compiled, or wrapped for several processes


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

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


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

    identity: a hash of what decides the run; a checkpoint of another one is refused. peak: the machine's FLOP/s, for
    the utilisation that events carry. Only rank 0 writes and speaks. Raises `SfumatoError` when the loss or a gradient
    is not finite.
    """
    recipe, world = task.recipe, World.current()
    if recipe.parts % world.size:
        raise InputError(
            f"{world.size} processes cannot share {recipe.parts} microbatches a step; "
            f"set {task.stage}.train.microbatch to a divisor of {recipe.batch // world.size}",
            argument=f"{task.stage}.train.microbatch",
        )
    share = recipe.parts // world.size
    dtype = fast_dtype(device) if recipe.precision == "auto" else getattr(torch, recipe.precision)
    for player in task.players:
        player.module.to(device).train()
        player.optimizers = make_optimizers(player.module, player.recipe)
    average = Average(task.players[0].module, recipe.ema)
    step = 0
    if world.leads:
        clear_leftovers(folder / "state")
    world.wait()
    if found := newest_state(
        folder / "state", identity, lambda text: on_event(Event("note", task.stage, text=text))
    ):
        step = _restore(task, average, found)
        going = f"continues from step {step}" if step < recipe.steps else f"finished, after {step:,} steps"
        on_event(Event("note", task.stage, step, recipe.steps, text=going))
    elif world.leads and (lost := logged(folder / "log.csv")):
        anew = f"begins at step 0: a run here was stopped at step {lost:,} and left no checkpoint"
        on_event(Event("note", task.stage, 0, recipe.steps, text=anew))
    clock = Clock(recipe.batch, task.flops, peak * world.size)
    with ExitStack() as open_things:
        feeds = []
        for player in task.players:
            player.lanes = open_things.enter_context(closing(open_lanes(player, device, world)))
            parts = range(world.rank * share, (world.rank + 1) * share)
            feed = Feed(player.batch, parts, recipe.steps, player.lanes.count)
            feeds.append(open_things.enter_context(closing(feed)))
        table = open_things.enter_context(closing(Log(folder / "log.csv", step))) if world.leads else None
        open_things.enter_context(short_turns())
        while step < recipe.steps:
            step += 1
            clock.start()
            values: dict[str, float] = {}
            for player, feed in zip(task.players, feeds, strict=True):
                values |= optimizer_step(player, feed, step, world, device, dtype, clock)
            with clock.counting("optimizer"):
                average.update(task.players[0].module, step)
            _require_finite(values, task.stage, step)
            clock.stop()
            last = step == recipe.steps
            if not table:
                continue
            table.add(step, values)
            if log:
                log(step, values)
            on_event(clock.event(task.stage, step, recipe.steps, values))
            if last or step % recipe.save_every == 0:
                save_state(folder / "state", step, _gather(task, average), identity)
                on_event(Event("save", task.stage, step, recipe.steps))
            if last or step % recipe.sheet_every == 0:
                on_event(Event("sheet", task.stage, step, recipe.steps, text=task.sheet(average.state, step)))
    world.wait()
    return average.state


def _require_finite(values: dict[str, float], stage: str, step: int) -> None:
    """`SfumatoError` when the loss or a gradient is not: the weights are spoilt too then, and must not be saved."""
    for name in ("loss", *(name for name in values if name.endswith("grad_norm"))):
        if not math.isfinite(values[name]):
            raise SfumatoError(
                f"the {name} of {stage} became {values[name]} at step {step}; lower "
                f"{stage}.train.lr and begin a new run (the last checkpoint of this one is intact)"
            )


def open_lanes(player: Player, device: torch.device, world: World) -> Lanes:
    """The player's module as a step calls it."""
    if world.size > 1:
        if player.recipe.compile:
            player.module.compile(dynamic=False)
        return Lanes(DistributedDataParallel(player.module, find_unused_parameters=player.partial))
    lanes = Lanes(player.module, lane_count(device, player.recipe.parts) if player.apart else 1)
    if player.recipe.compile:
        lanes.compile()
    return lanes


def optimizer_step(
    player: Player,
    feed: Feed,
    step: int,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
) -> dict[str, float]:
    """One optimiser step of one player over this process's microbatches; the mean terms of all processes."""
    lanes = player.lanes
    assert lanes is not None
    set_rate(player.optimizers, rate_at(step, player.recipe))
    for optimizer in player.optimizers:
        optimizer.zero_grad(set_to_none=True)

    def backward(net: nn.Module, part: int) -> tuple[dict[str, Tensor], float]:
        """Leave the gradients of a microbatch; its terms, and the seconds it was waited for."""
        began = time.perf_counter()
        batch = feed.take(step, part)
        waited = time.perf_counter() - began
        more = part != feed.parts[-1]  # gradients travel once a step, with the last part
        quiet = net.no_sync() if more and isinstance(net, DistributedDataParallel) else nullcontext()
        with lanes.turn(shapes(batch)), quiet:
            with autocast(device, dtype):
                loss, terms = player.loss(net, batch, step, part)
            (loss / len(feed.parts)).backward()
        return {name: value.detach().float() for name, value in terms.items()}, waited

    answers = lanes.run(backward, feed.parts)
    clock.add("data", sum(waited for _, waited in answers) / lanes.count)
    sums = {name: torch.stack([terms[name] for terms, _ in answers]).mean() for name in answers[0][0]}
    norm = nn.utils.clip_grad_norm_(player.module.parameters(), player.recipe.clip)
    with clock.counting("optimizer"):
        for optimizer in player.optimizers:
            optimizer.step()
    stacked = torch.stack([value.to(device) for value in sums.values()])
    if world.size > 1:
        dist.all_reduce(stacked)
        stacked = stacked / world.size
    values = dict(zip(sums, stacked.tolist(), strict=True))
    prefix = "" if "loss" in values else f"{player.name}_"
    return values | {
        f"{prefix}grad_norm": float(norm),
        f"{prefix}learning_rate": float(player.optimizers[0].param_groups[0]["lr"]),
    }


def shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    """Of a microbatch's tensors: what decides which code runs."""
    tensors = [batch] if isinstance(batch, Tensor) else vars(batch).values()
    return tuple(tuple(value.shape) for value in tensors if isinstance(value, Tensor))


class Clock:
    """Where the time of recent steps went. now: seconds of the latest one: data, optimizer, and step, the whole."""

    def __init__(self, batch: int, flops: float, peak: float):
        self.batch, self.flops, self.peak = batch, flops, peak
        self._means: dict[str, float] = {}
        self.now: dict[str, float] = {}

    def start(self) -> None:
        self._began = time.perf_counter()
        self.now = {"data": 0.0, "optimizer": 0.0}

    def counting(self, what: str) -> _Counting:
        """A context whose time is added to `what` (data or optimizer) of the current step."""
        return _Counting(self, what)

    def add(self, what: str, seconds: float) -> None:
        self.now[what] += seconds

    def stop(self) -> None:
        self.now["step"] = time.perf_counter() - self._began
        for name, value in self.now.items():
            self._means[name] = value + 0.95 * (self._means.get(name, value) - value)

    def event(self, stage: str, step: int, total: int, values: dict[str, float]) -> Event:
        seconds = self._means["step"]
        rate = self.batch / seconds
        return Event(
            "step",
            stage,
            step,
            total,
            values,
            rate=rate,
            mfu=rate * self.flops / self.peak if self.peak else 0.0,
            stall=self._means["data"] / seconds,
            optimizer=self._means["optimizer"] / seconds,
            seconds_left=seconds * (total - step),
        )


class _Counting:
    def __init__(self, clock: Clock, what: str):
        self.clock, self.what = clock, what

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.add(self.what, time.perf_counter() - self.began)


def _gather(task: Task, average: Average) -> dict[str, Tensor]:
    tensors = {f"average/{name}": value for name, value in average.state.items()}
    for player in task.players:
        weights, moments = player.module.state_dict(), optimizer_tensors(player.optimizers)
        tensors |= {f"weights/{player.name}/{name}": value for name, value in weights.items()}
        tensors |= {f"optimizer/{player.name}/{name}": value for name, value in moments.items()}
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
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
