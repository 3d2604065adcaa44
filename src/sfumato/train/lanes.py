"""Microbatches of a step: made ahead of time, and worked on side by side where a CPU has cores for it."""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from sfumato.runtime import workers

T = TypeVar("T")


class Lanes:
    """One network several times over, with the same weights and gradients of its own each.

    A small network's products are too short for many threads to share: they wait for one another at the end of every
    one. Lanes meet once a step. Which lane does a part depends on its place alone, so that sums are always the same.
    """

    def __init__(self, network: nn.Module, count: int = 1):
        self.networks = [network, *(_twin(network) for _ in range(count - 1))]
        self._kinds: set[Hashable] = set()
        self._gate = threading.Condition()
        self._busy, self._alone = 0, False  # lanes inside, and whether it is one that wants no other
        self._pool = None
        if count > 1:
            self._pool = workers("lane", count, max(1, torch.get_num_threads() // count))

    @property
    def count(self) -> int:
        return len(self.networks)

    def compile(self) -> None:
        """Compile the networks when they are first called."""
        # in C++ from end to end, a call lets the other lanes' Python run meanwhile
        options = {"cpp_wrapper": True} if self._pool else None
        for network in self.networks:
            network.compile(dynamic=False, options=options)

    def run(self, work: Callable[[nn.Module, int], T], parts: range) -> list[T]:
        """work(network, part) of every part, in their order. Gradients are added up in the first network."""
        if self._pool is None:
            return [work(self.networks[0], part) for part in parts]
        shares = dealt(parts, self.count)
        futures = [
            self._pool.submit(lambda net=network, mine=share: [(part, work(net, part)) for part in mine])
            for network, share in zip(self.networks, shares, strict=True)
        ]
        wait(futures)  # also for those beside one that failed, which work on the same weights
        try:
            answers = {part: answer for future in futures for part, answer in future.result()}
            self._gather()
        finally:
            for network in self.networks[1:]:
                network.zero_grad(set_to_none=True)
        return [answers[part] for part in parts]

    @contextmanager
    def turn(self, kind: Hashable) -> Iterator[None]:
        """Within it a lane calls its network: alone with a new kind of batch, for which torch may have to compile."""
        with self._gate:
            self._gate.wait_for(lambda: not (self._alone if kind in self._kinds else self._busy))
            self._alone = kind not in self._kinds
            self._busy += 1
        try:
            yield
        finally:
            with self._gate:
                self._kinds.add(kind)
                self._busy -= 1
                self._alone = False
                self._gate.notify_all()

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _gather(self) -> None:
        first, *others = ([p for p in network.parameters() if p.requires_grad] for network in self.networks)
        for other in others:
            pairs = [(a, b) for a, b in zip(first, other, strict=True) if b.grad is not None]
            for a, b in pairs:
                if a.grad is None:
                    a.grad = torch.zeros_like(b.grad)
            if pairs:
                torch._foreach_add_([a.grad for a, _ in pairs], [b.grad for _, b in pairs])


def dealt(parts: Sequence[int], count: int) -> list[list[int]]:
    """Parts to lanes, there and back again: where each takes a little longer than the last, all lanes get the same."""
    lanes: list[list[int]] = [[] for _ in range(count)]
    for place, part in enumerate(parts):
        lane = place % (2 * count)
        lanes[min(lane, 2 * count - 1 - lane)].append(part)
    return lanes


def lane_count(device: torch.device, parts: int) -> int:
    """Lanes for `parts` microbatches a step: as many as both they and the CPU's threads divide into."""
    return math.gcd(parts, torch.get_num_threads()) if device.type == "cpu" else 1


def _twin(network: nn.Module) -> nn.Module:
    """A copy that looks at the same weights."""
    twin = copy.deepcopy(network)
    for own, theirs in ((twin.parameters(), network.parameters()), (twin.buffers(), network.buffers())):
        for a, b in zip(own, theirs, strict=True):
            a.data = b.data
    return twin


@contextmanager
def short_turns(seconds: float = 2e-4) -> Iterator[None]:
    """Within it Python's threads take turns that short. At the usual 5 ms, every one of a network's many short calls
    could wait that long for the captions that a feed writes beside it.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(seconds, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Feed:
    """Makes the microbatches to come in a thread while the network works on these."""

    def __init__(self, make: Callable[[int, int], Any], parts: range, last_step: int, ahead: int = 1):
        """make(step, part) is a microbatch; `ahead` of them are made beforehand."""
        self.make, self.parts, self.last_step, self.ahead = make, parts, last_step, ahead
        self._thread = workers("feed", 1, threads=1)
        self._made: dict[tuple[int, int], Future[Any]] = {}
        self._next: tuple[int, int] | None = None  # the first that is not begun: step, and place in `parts`
        self._gate = threading.Lock()

    def take(self, step: int, part: int) -> Any:
        """The microbatch `part` of `step`, once; those that will be asked for after it are begun."""
        with self._gate:
            size = len(self.parts)
            later, place = divmod(self.parts.index(part) + self.ahead, size)
            begun, at = self._next or (step, 0)
            while (begun, at) <= (step + later, place) and begun <= self.last_step:
                key = (begun, self.parts[at])
                self._made[key] = self._thread.submit(self.make, *key)
                begun, at = (begun, at + 1) if at + 1 < size else (begun + 1, 0)
            self._next = begun, at
            made = self._made.pop((step, part))
        return made.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
