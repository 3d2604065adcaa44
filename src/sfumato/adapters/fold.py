"""LoRAs folded into a model's weights: attached, weighted anew and taken off without touching the model's files.

A network reads its tensors through a `Folded` mapping, which adds ΔW in float32 before anything is rounded, packed or
put into eight bits. So an attached LoRA costs no time when drawing. When weights change, `Adapters` has those layers
made anew whose tensors change, from the base again: what is taken off leaves the base to the bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import checks
from sfumato.adapters.delta import Change, Delta, LowRank, folded, product
from sfumato.adapters.lora import Lora, Report, Shapes, read_lora
from sfumato.adapters.names import Names
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.rules import info, origin, shapes
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.types import LoraUse, Request

LARGEST = 2.0**100  # of ΔW that may be added unseen: beside it no number of bfloat16 becomes infinite
INSIDE = "a drawing cannot change its LoRAs before it is done"
Touched = Mapping[str, frozenset[str]]  # part → tensors


@dataclass(frozen=True)
class Wish:
    """What a LoRA wants of a request that leaves things open. why: what it is taken for and by what."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Added:
    """What is added to a part. key: of the changes, "" where there are none. owners: whose they are."""

    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    key: str = ""
    owners: Mapping[Delta, str] = field(default_factory=dict)


class Folded(Mapping[str, Tensor]):
    """The tensors of a part with what is added to them: a changed one in float32, the others as they are.

    now: what is added. before: what is so in networks in memory while these are brought up to date.
    """

    def __init__(self, base: Mapping[str, Tensor]):
        self.base = base
        self.now = self.before = Added()

    def __getitem__(self, name: str) -> Tensor:
        changes = self.now.changes.get(name)
        return folded(self.base[name], changes) if changes else self.base[name]

    def cast(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """The tensor for who wants it in `dtype`: rounded as it is folded to bfloat16, which has float32's range; other
        types are the caller's to make.
        """
        changes = self.now.changes.get(name)
        if changes and dtype == torch.bfloat16:
            return folded(self.base[name], changes, dtype)
        return self[name]

    def apart(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(up, down) in float32, whose product is all that is added to the matrix `base[name]`: for who adds it
        later, to numbers in float32 or bfloat16. None where nothing is, where it is no product, or so large that it
        must be looked at.
        """
        changes = self.now.changes.get(name, ())
        if not changes or (factors := product(changes)) is None:
            return None
        largest = sum(abs(weight) * delta.bound() for weight, delta in changes if isinstance(delta, LowRank))
        return factors if largest < LARGEST else None

    def bare(self, name: str) -> bool:
        """Whether networks in memory have this tensor as the base does."""
        return name not in self.before.changes

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __contains__(self, name: object) -> bool:  # the one of `Mapping` would fold the tensor
        return name in self.base

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype, shape = info(self.base, name)
        return (torch.float32 if name in self.now.changes else dtype), shape

    def origin(self, name: str) -> str:
        """As of `View`."""
        return origin(self.base, name)

    def added(self, name: str) -> str:
        """What is added to a tensor, for an error that the base has no part in; "" if it has, or nothing is."""
        changes = self.now.changes.get(name, ()) if finite(self.base[name]) else ()
        return " and ".join(f"{self.now.owners[delta]} at weight {weight:g}" for weight, delta in changes)


class Adapters:
    """The LoRAs opened for one system, those folded into its networks now, and who is drawing with them.

    names: what the family calls its modules. parts: the base's tensors. refresh: makes anew those layers of networks in
    memory that hold the tensors told, from `self.parts`; if it fails, it leaves no network half changed. check: looks
    at a file first and raises an error that says whose it is, should it be another family's. presets: what a LoRA
    wants of a request that leaves things open, such as few steps. Threads may share it: drawings with the same LoRAs
    and weights go side by side, one with others waits for them.
    """

    def __init__(
        self,
        names: Callable[[], Names],
        parts: Mapping[str, Mapping[str, Tensor]],
        refresh: Callable[[Touched], None],
        check: Callable[[Path], None] = lambda path: None,
        presets: Callable[[Lora], Wish] = lambda lora: Wish(),
    ):
        self._names, self.base, self.refresh = names, parts, refresh
        self._check, self._presets = check, presets
        self.parts = {name: Folded(tensors) for name, tensors in parts.items()}
        self.opened: dict[str, Lora] = {}
        self.standing: tuple[LoraUse, ...] = ()  # what a request that names none gets
        self._now: tuple[LoraUse, ...] = ()
        self._loras: tuple[Lora, ...] = ()  # theirs
        self._turn = threading.Condition()
        self._users: dict[int, int] = {}  # thread → how many times it is drawing

    def moved(self, refresh: Callable[[Touched], None]) -> Adapters:
        """The same LoRAs for other networks of the same base, which are yet to be opened."""
        other = Adapters(self._names, self.base, refresh, self._check, self._presets)
        other.opened, other.standing = dict(self.opened), self.standing
        with other.using(other.standing):
            return other

    @property
    def shapes(self) -> Shapes:
        return {name: shapes(part) for name, part in self.base.items()}

    @property
    def size(self) -> int:
        """Bytes of the files that are open: the most memory that they take beside the networks."""
        return sum(lora.size for lora in self.opened.values())

    @property
    def now(self) -> tuple[LoraUse, ...]:
        """What is folded into the networks now."""
        return self._now

    # --- which ------------------------------------------------------------------------------------------------------

    def attach(
        self,
        path: str | os.PathLike[str],
        weight: float = 1.0,
        *,
        name: str | None = None,
        blocks: Mapping[str, float] | Sequence[tuple[str, float]] = (),
        partial: bool = False,
    ) -> Report:
        """Open a LoRA and draw with it from now on, at this weight; the report says what of it is used.

        name: what requests call it, the file's own by default; of a name that is taken the file is replaced. blocks:
        factors of the weight for parts of the networks, such as {"down.1": 0.5, "text": 0}. partial: use what fits and
        leave the rest. Errors of `read_lora`; `InputError` for a weight or block that does not exist.
        """
        use = LoraUse(name or "lora", weight, tuple(dict(blocks).items())).validate()
        self._check_blocks(use)
        lora = self._read(path, name, partial)
        with self._alone():
            kept = tuple(other for other in self.standing if other.name != lora.name)
            self._stand({**self.opened, lora.name: lora}, (*kept, replace(use, name=lora.name)))
        return lora.report

    def detach(self, name: str | None = None) -> None:
        """Draw without this LoRA from now on, or without any. `InputError` if there is none of the name."""
        self._require([] if name is None else [name])
        with self._alone():
            kept = tuple(use for use in self.standing if name is not None and use.name != name)
            self._stand({} if name is None else {k: v for k, v in self.opened.items() if k != name}, kept)

    def open(self, path: str | os.PathLike[str], name: str) -> Report:
        """Open a LoRA for requests that name it, and no others; whoever draws goes on. Errors of `attach`."""
        lora = self._read(path, name, partial=False)
        with self._turn:
            self.opened = {**self.opened, name: lora}
        return lora.report

    def close(self, name: str) -> None:
        """Forget a LoRA that no request names any more, and that is not attached."""
        with self._turn:
            self.opened = {other: lora for other, lora in self.opened.items() if other != name}

    @property
    def fitting(self) -> bool:
        """Whether there are LoRAs for the model at all."""
        try:
            self._names()
        except InputError:
            return False
        return True

    def _read(self, path: str | os.PathLike[str], name: str | None, partial: bool) -> Lora:
        self._check(Path(path))
        return read_lora(path, self._names(), self.shapes, name=name, partial=partial)

    def _stand(self, opened: dict[str, Lora], standing: tuple[LoraUse, ...]) -> None:
        """What is open and attached from now on, if the networks take it."""
        self._switch(standing, tuple(opened[use.name] for use in standing))
        self.opened, self.standing = opened, standing

    def settled(self, uses: Sequence[LoraUse] | None) -> tuple[LoraUse, ...]:
        """What a request's `loras` means here: None is what is attached. `InputError` for names and blocks unknown."""
        if uses is None:
            return self.standing
        self._require([use.name for use in uses])
        for use in uses:
            self._check_blocks(use)
        return tuple(uses)

    def preset(self, uses: Sequence[LoraUse]) -> dict[str, Any]:
        """What the LoRAs want of a request that leaves things open; the last one that wants something has its way."""
        wanted: dict[str, Any] = {}
        for wish in self.wishes(uses).values():
            wanted |= wish.fields
        return wanted

    def wishes(self, uses: Sequence[LoraUse]) -> dict[str, Wish]:
        """Of the LoRAs that want something, by name, what and why."""
        used = (self.opened[use.name] for use in uses if use.weight > 0 and use.name in self.opened)
        wanted = ((lora.name, self._presets(lora)) for lora in used)
        return {name: wish for name, wish in wanted if wish.fields}

    def notes(self, request: Request) -> list[str]:
        """What is to be said of LoRAs that decide what the request leaves open, told by a word in their names."""
        uses, notes = self.settled(request.loras), []
        left = {key: value for key, value in self.preset(uses).items() if getattr(request, key) is None}
        wishes = self.wishes(uses)
        for name, wish in reversed(wishes.items()):  # the last one has its way
            own = {key: left.pop(key) for key in wish.fields if key in left}
            others = {
                other: {k: w.fields[k] for k in own if w.fields.get(k, own[k]) != own[k]}
                for other, w in wishes.items()
            }
            against = "".join(
                f", though {other} wants {_told(fields)}" for other, fields in others.items() if fields
            )
            if own:
                by = ", ".join(f"`{key}`" for key in own)
                notes.append(
                    f"LoRA {name} is taken for {wish.why}: drawn with {_told(own)}{against}; say others by {by}"
                )
        return notes

    def digests(self, uses: Sequence[LoraUse]) -> dict[str, str]:
        """Name to SHA-256 of the LoRA's numbers."""
        return {use.name: self.opened[use.name].digest for use in uses}

    def _require(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.opened:
                known = f"; open are {', '.join(self.opened)}" if self.opened else "; none is open"
                raise InputError(
                    f"the LoRA {checks.shown(name)} is not open{known}",
                    argument="loras",
                )

    def _check_blocks(self, use: LoraUse) -> None:
        names = self._names()
        for block, _ in use.blocks:
            starts = names.places(block)
            paths = (f"{part}.{tensor}" for part, tensors in self.base.items() for tensor in tensors)
            if not any(_within(path, start) for path in paths for start in starts):
                example = next(
                    (f", such as {one}.1" for one in ("down", "blocks") if one in names.blocks), ""
                )
                raise InputError(
                    f"{names.family} has no block {checks.shown(block)}; there are {', '.join(names.blocks)} and "
                    f"what lies in them{example}",
                    argument="loras",
                )

    def idle(self, use: LoraUse) -> list[str]:
        """The blocks of a use, of an open LoRA, in which that changes nothing."""
        deltas = self.opened[use.name].deltas
        paths = [f"{part}.{tensor}" for part, tensors in deltas.items() for tensor in tensors]
        starts = {block: self._names().places(block) for block, _ in use.blocks}
        return [b for b, own in starts.items() if not any(_within(path, s) for path in paths for s in own)]

    # --- folded -----------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, uses: Sequence[LoraUse] | None) -> Iterator[None]:
        """While inside, the networks are those with these LoRAs, whoever else draws.

        None is what is attached; or, inside of another `using`, what that one asked for, as anything else is an error.
        """
        me = threading.get_ident()
        with self._turn:
            inside = me in self._users
            uses = (self._now if inside else self.standing) if uses is None else tuple(uses)
            if inside:
                if uses != self._now:
                    raise SfumatoError(INSIDE)
            else:
                self._require([use.name for use in uses])
                loras = tuple(self.opened[use.name] for use in uses)
                self._turn.wait_for(lambda: (uses, loras) == (self._now, self._loras) or not self._users)
                self._switch(uses, loras)
            self._users[me] = self._users.get(me, 0) + 1
        try:
            yield
        finally:
            with self._turn:
                self._users[me] -= 1
                if not self._users[me]:
                    del self._users[me]
                self._turn.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While inside, nobody draws."""
        with self._turn:
            if threading.get_ident() in self._users:
                raise SfumatoError(INSIDE)
            self._turn.wait_for(lambda: not self._users)
            yield

    def _changes(
        self, uses: Sequence[LoraUse], loras: Sequence[Lora]
    ) -> dict[str, dict[str, tuple[Change, ...]]]:
        """Of each part, the tensors that change, and by what."""
        found: dict[str, dict[str, tuple[Change, ...]]] = {name: {} for name in self.parts}
        for use, lora in zip(uses, loras, strict=True):
            names = self._names()
            factors = [(start, factor) for block, factor in use.blocks for start in names.places(block)]
            factors.sort(key=lambda item: len(item[0]))  # the closest last: it counts
            for part, deltas in lora.deltas.items():
                for tensor, delta in deltas.items():
                    own = [factor for start, factor in factors if _within(f"{part}.{tensor}", start)]
                    if weight := use.weight * (own[-1] if own else 1.0):
                        found[part][tensor] = (*found[part].get(tensor, ()), (weight, delta))
        return found

    def _switch(self, uses: tuple[LoraUse, ...], loras: tuple[Lora, ...]) -> None:
        if (uses, loras) == (self._now, self._loras):
            return
        key = "|".join(
            f"{lora.digest} {u.weight!r} {u.blocks!r}" for u, lora in zip(uses, loras, strict=True)
        )
        touched: dict[str, frozenset[str]] = {}
        for name, changes in self._changes(uses, loras).items():
            part = self.parts[name]
            before = part.before.changes
            differs = {t for t in {*before, *changes} if before.get(t) != changes.get(t)}
            if differs:
                touched[name] = frozenset(differs)
            owners = {delta: lora.name for lora in loras for delta in lora.deltas.get(name, {}).values()}
            part.now = Added(changes, key if changes else "", owners)
        try:
            if touched:
                self.refresh(touched)
        except BaseException as error:
            for part in self.parts.values():
                part.now = part.before
            if isinstance(error, CheckpointError) and uses:
                error.argument = "loras"
            raise
        for part in self.parts.values():
            part.before = part.now
        self._now, self._loras = uses, loras


def _within(path: str, start: str) -> bool:
    return path == start or path.startswith(start + ".")


def _told(fields: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in fields.items()
    )
