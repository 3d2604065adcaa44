"""Several drawings at once on one device: their calls of a network become one call with more rows.

Every drawing runs its sampler in a thread of its own, as if it were alone. Where a sampler asks the network, `Together`
holds the thread until all drawings that are in a sampler have asked too, stacks those calls that fit, and gives each
its rows. So drawings share steps whatever their samplers, seeds, prompts and numbers of steps are, and a new one joins
between two steps of the others. A network answers each row by itself; what batching does to the picture is rounding.

All work on the device, these calls among it, is done by one thread (`Bench`), in the order in which it was asked.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfumato.types import Conditioning

T = TypeVar("T")
Precision = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Spent:
    """Seconds of a device: in calls of the network, of which a drawing is given its share, and in all other work."""

    network: float = 0.0
    other: float = 0.0


class Bench:
    """One thread that does all the work of a device, and the seconds that it spent for whom.

    One thread and not many, because PyTorch keeps a team of helpers for each thread that asks it for work on a CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._spent: dict[int, Spent] = {}
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], T]) -> T:
        """Have `call` done, in inference mode, and wait for its answer. Its seconds are the asking thread's."""
        if threading.current_thread() is self._thread:
            return call()
        answer: Future[T] = Future()
        whose = threading.get_ident()

        def work() -> None:
            started = time.perf_counter()
            try:
                with torch.inference_mode():
                    found = call()
                self.settle()
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result(found)
            finally:
                self.spend(whose, other=time.perf_counter() - started)

        self._work.put(work)
        return answer.result()

    def later(self, call: Callable[[], None]) -> None:
        """Have `call` done; it accounts for its seconds itself and lets no exception out."""
        self._work.put(call)

    def settle(self) -> None:
        """Wait for what a GPU still does, so that seconds are those of who asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def spend(self, whose: int, network: float = 0.0, other: float = 0.0) -> None:
        before = self._spent.get(whose, Spent())
        self._spent[whose] = Spent(before.network + network, before.other + other)

    def spent(self) -> Spent:
        """What was spent for this thread since it last asked."""
        return self._spent.pop(threading.get_ident(), Spent())

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


@dataclass
class _Call:
    """One drawing's call of a network: that of `owner`, which is told apart by its identity."""

    owner: Any
    precision: Precision
    x: Tensor  # (B, C, T, H, W)
    time: Tensor  # (B,)
    cond: Conditioning  # of B rows
    more: dict[str, Any]
    whose: int
    answer: Future[Tensor] = field(default_factory=Future)


class Together:
    """Where the samplers of one device meet. rows: of a call of the network, at most."""

    def __init__(self, bench: Bench, rows: int):
        self.bench, self.rows = bench, rows
        self.calls = self.called_rows = 0  # of networks, and what they were given
        self._lock = threading.Lock()
        self._drawing: set[int] = set()  # threads within a sampler
        self._waiting: list[_Call] = []
        self._due = False  # a round is on its way to the bench

    def __call__(
        self,
        owner: Any,
        precision: Precision,
        x: Tensor,
        time: Tensor,
        cond: Conditioning,
        more: dict[str, Any],
    ) -> Tensor:
        """`owner.network(x, time, cond, **more)`, together with whatever other drawings ask of it."""
        call = _Call(owner, precision, x, time, cond, more, threading.get_ident())
        with self._lock:
            self._drawing.add(call.whose)
            self._waiting.append(call)
            self._check()
        return call.answer.result()

    def leave(self) -> None:
        """This thread's sampler is done, or given up: nobody is to wait for it. It comes back by calling."""
        with self._lock:
            self._drawing.discard(threading.get_ident())
            self._check()

    def _check(self) -> None:
        if not self._due and self._waiting and len(self._waiting) == len(self._drawing):
            self._due = True
            self.bench.later(self._round)

    def _round(self) -> None:
        with self._lock:
            calls, self._waiting, self._due = self._waiting, [], False
        groups: dict[Any, list[_Call]] = {}
        for call in calls:
            groups.setdefault(_form(call), []).append(call)
        for group in groups.values():
            for pack in _packs(group, self.rows):
                self._answer(pack)

    def _answer(self, pack: Sequence[_Call]) -> None:
        try:
            answers = self._called(pack)
        except BaseException as error:
            if len(pack) == 1:
                pack[0].answer.set_exception(error)
                return
            for call in pack:  # whose fault it is shows alone
                self._answer([call])
            return
        for call, answer in zip(pack, answers, strict=True):
            call.answer.set_result(answer)

    def _called(self, pack: Sequence[_Call]) -> Sequence[Tensor]:
        first, started = pack[0], time.perf_counter()
        rows = [len(call.x) for call in pack]
        try:
            with torch.inference_mode(), first.precision():
                if len(pack) == 1:
                    return [first.owner.network(first.x, first.time, first.cond, **first.more)]
                answer = first.owner.network(
                    torch.cat([call.x for call in pack]),
                    torch.cat([call.time.expand(len(call.x)) for call in pack]),
                    _joined([call.cond for call in pack]),
                    **{name: _stacked([call.more[name] for call in pack]) for name in first.more},
                )
                return answer.split(rows)
        finally:
            self.bench.settle()
            self.calls, self.called_rows = self.calls + 1, self.called_rows + sum(rows)
            seconds = time.perf_counter() - started
            for call, count in zip(pack, rows, strict=True):
                self.bench.spend(call.whose, seconds * count / sum(rows))


def _form(call: _Call) -> Any:
    """What two calls must have in common to be made together: all shapes. A text is not made longer to fit another: a
    mask would hide what was added, but sums over more numbers are rounded otherwise.
    """
    told = (getattr(call.cond, part.name) for part in fields(Conditioning))
    texts = tuple(None if tensor is None else (tensor.shape[1:], tensor.dtype) for tensor in told)
    more = tuple((name, _form_of(call.more[name])) for name in sorted(call.more))
    return id(call.owner), call.x.shape[1:], call.x.dtype, texts, more


def _form_of(value: Any) -> Any:
    """Of what a network is told beside: shapes of tensors, and anything else as it is."""
    if isinstance(value, tuple) and value and all(isinstance(each, Tensor) for each in value):
        return tuple((each.shape[1:], each.dtype) for each in value)
    return value


def _packs(calls: list[_Call], rows: int) -> list[list[_Call]]:
    """The calls, in order, in packs of at most so many rows, or of one call."""
    packs: list[list[_Call]] = []
    room = 0
    for call in calls:
        if not packs or len(call.x) > room:
            packs.append([])
            room = rows
        packs[-1].append(call)
        room -= len(call.x)
    return packs


def _joined(conds: Sequence[Conditioning]) -> Conditioning:
    """Rows under each other, of conditions of one form."""

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(cond, name) for cond in conds]
        return None if tensors[0] is None else torch.cat(tensors)

    return Conditioning(**{part.name: stacked(part.name) for part in fields(Conditioning)})  # type: ignore[arg-type]


def _stacked(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, tuple) and first and all(isinstance(each, Tensor) for each in first):
        return tuple(torch.cat(parts) for parts in zip(*values, strict=True))
    return first
