"""How the tensor names of a file become ours, and ours theirs again: finite tables of small invertible rules.

A rule names tensors of two layouts and what lies between them: `Rename`, `Transpose`, `Squeeze`, `Split`,
`SwapHalves`, and their inverses. `Drop` names what a file may hold beside its weights, with the reason for leaving it.
Rules are written as templates such as `input_blocks.{i}.0.{part}` and `expand`ed, by the numbers of an architecture,
into the table of a `KeyMap`, which is read from left to right by `to_ours` and from right to left by `to_theirs`.

Nothing is computed before a tensor is asked for, and a map that does not fit a file exactly is refused by name: no
tensor of a file is left out without a rule that says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from sfumato.checkpoint.report import Report
from sfumato.errors import CheckpointError

if TYPE_CHECKING:  # names and shapes are told without torch, whose import takes longer than that
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    theirs: str
    ours: str

    @property
    def inverse(self) -> Rename:
        return Rename(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors


@dataclass(frozen=True)
class Transpose:
    """A matrix (A, B), which is (B, A) on the other side: open_clip writes x·M where `nn.Linear` computes x·Mᵀ."""

    theirs: str
    ours: str

    @property
    def inverse(self) -> Transpose:
        return Transpose(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if tensors[0].ndim != 2:
            raise ValueError(f"a matrix is expected, not the shape {tuple(tensors[0].shape)}")
        return [tensors[0].T]


@dataclass(frozen=True)
class Squeeze:
    """A 1×1 convolution (A, B, 1, 1), which is a linear layer (A, B) on our side. One that is (A, B) already stays."""

    theirs: str
    ours: str

    @property
    def inverse(self) -> Unsqueeze:
        return Unsqueeze(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        shape = tuple(tensors[0].shape)
        if len(shape) < 2 or any(side != 1 for side in shape[2:]):
            raise ValueError(f"a 1×1 convolution is expected, not the shape {shape}")
        return [tensors[0].reshape(shape[:2])]


@dataclass(frozen=True)
class Unsqueeze:
    """A linear layer (A, B), which is a 1×1 convolution (A, B, 1, 1) on the other side."""

    theirs: str
    ours: str

    @property
    def inverse(self) -> Squeeze:
        return Squeeze(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if tensors[0].ndim != 2:
            raise ValueError(f"a matrix is expected, not the shape {tuple(tensors[0].shape)}")
        return [tensors[0][:, :, None, None]]


@dataclass(frozen=True)
class Split:
    """One tensor of theirs, whose equal parts along the first axis are several of ours (fused q, k, v)."""

    theirs: str
    ours: tuple[str, ...]

    @property
    def inverse(self) -> Concat:
        return Concat(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        parts, shape = len(self.ours), tuple(tensors[0].shape)
        if not shape or shape[0] % parts:
            raise ValueError(f"the shape {shape} does not fall into {parts} equal parts")
        return tensors[0].chunk(parts) if shape[0] else [tensors[0]] * parts


@dataclass(frozen=True)
class Concat:
    """Several equal tensors of theirs, which are one of ours along the first axis."""

    theirs: tuple[str, ...]
    ours: str

    @property
    def inverse(self) -> Split:
        return Split(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1 or not tensors[0].ndim:
            raise ValueError(f"equal shapes and types are expected, not {[tuple(t.shape) for t in tensors]}")
        import torch

        return [torch.cat(list(tensors))]


@dataclass(frozen=True)
class SwapHalves:
    """A tensor whose halves along the first axis stand in the other order on the other side (shift and scale)."""

    theirs: str
    ours: str

    @property
    def inverse(self) -> SwapHalves:
        return SwapHalves(self.ours, self.theirs)

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        shape = tuple(tensors[0].shape)
        if not shape or shape[0] % 2:
            raise ValueError(f"the shape {shape} does not fall into halves")
        import torch

        first, second = tensors[0].chunk(2)
        return [torch.cat([second, first])]


@dataclass(frozen=True)
class Eye:
    """A matrix of ours that changes nothing, where a file has none. It is read from no tensor, and has no inverse.

    ndim: 4 for that of a 1×1 convolution; 1 for the bias beside it, which is 0.
    """

    ours: str
    width: int
    theirs: tuple[str, ...] = ()
    ndim: int = 2

    def apply(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        import torch

        if self.ndim == 1:
            return [torch.zeros(self.width)]
        return [torch.eye(self.width).view(self.width, self.width, *[1] * (self.ndim - 2))]


@dataclass(frozen=True)
class Drop:
    """A name that may stand in a file and is left there; `*` is any run of characters. The reason is for people."""

    theirs: str
    reason: str


Rule = Rename | Transpose | Squeeze | Unsqueeze | Split | Concat | SwapHalves | Eye
Info = tuple["torch.dtype", tuple[int, ...]]


def within(theirs: str, ours: str, rules: Iterable[Any]) -> tuple[Any, ...]:
    """The rules with prefixes before their names: a block's rules at the block's place. `Drop` has no second side."""

    def placed(rule: Any) -> Any:
        changes = {"theirs": _each(rule.theirs, lambda name: theirs + name)}
        if not isinstance(rule, Drop):
            changes["ours"] = _each(rule.ours, lambda name: ours + name)
        return replace(rule, **changes)

    return tuple(placed(rule) for rule in rules)


def expand(rules: Iterable[Any], **choices: Iterable[Any]) -> tuple[Any, ...]:
    """Every rule for every combination of the choices, filled into its `{…}`. Other placeholders stay for later.

    `expand([Rename("blocks.{i}.{p}", "layers.{i}.{p}")], i=range(12), p=("weight", "bias"))` is 24 rules.
    A rule without the placeholder stays one rule.
    """

    def filled(rule: Any, combination: tuple[Any, ...]) -> Any:
        def fill(template: str) -> str:
            for name, value in zip(choices, combination, strict=True):
                template = template.replace("{" + name + "}", str(value))
            return template

        return replace(
            rule,
            **{
                f.name: _each(getattr(rule, f.name), fill)
                for f in fields(rule)
                if f.name in ("theirs", "ours")
            },
        )

    rules = tuple(rules)
    return tuple(
        dict.fromkeys(filled(rule, chosen) for chosen in product(*choices.values()) for rule in rules)
    )


def _each(names: str | tuple[str, ...], change: Callable[[str], str]) -> str | tuple[str, ...]:
    return change(names) if isinstance(names, str) else tuple(change(name) for name in names)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@dataclass(frozen=True)
class KeyMap:
    """A finite table from one layout to another.

    rules: the table; no placeholder is left in it. Where several rules give the same name of ours, the first is the
    canonical one, used when writing, and the others are read as well: spellings that exist. drops: what may stand
    beside the weights.
    """

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()

    def __post_init__(self) -> None:
        names = [name for rule in self.rules for side in (rule.theirs, rule.ours) for name in _tuple(side)]
        open_ = [name for name in (*names, *(drop.theirs for drop in self.drops)) if re.search(r"[{}]", name)]
        if open_:
            raise ValueError(f"the template {open_[0]!r} was not expanded")
        theirs = Counter(name for rule in self.rules for name in _tuple(rule.theirs))
        if theirs and max(theirs.values()) > 1:
            raise ValueError(f"two rules read {theirs.most_common(1)[0][0]!r}")

    def __or__(self, other: KeyMap) -> KeyMap:
        """Both tables: the maps of two parts of one file."""
        return KeyMap(self.rules + other.rules, self.drops + other.drops)

    def within(self, theirs: str, ours: str) -> KeyMap:
        """The same map at another place: prefixes before the names of both sides."""
        return KeyMap(within(theirs, ours, self.rules), within(theirs, ours, self.drops))

    def also(self, *rules: Rule, drops: Iterable[Drop] = ()) -> KeyMap:
        """The map with other spellings that it reads, and never writes."""
        return KeyMap(self.rules + rules, self.drops + tuple(drops))

    @cached_property
    def ours(self) -> tuple[str, ...]:
        """Our names, in the table's order."""
        return tuple(dict.fromkeys(name for rule in self.rules for name in _tuple(rule.ours)))

    @cached_property
    def theirs(self) -> tuple[str, ...]:
        """The canonical names of theirs: exactly those that `to_theirs` writes."""
        return tuple(name for rule in self._canonical for name in _tuple(rule.theirs))

    @cached_property
    def inverse(self) -> KeyMap:
        """The map read from right to left. Drops and other spellings have no inverse."""
        return KeyMap(tuple(rule.inverse for rule in self._canonical if not isinstance(rule, Eye)))

    @cached_property
    def _canonical(self) -> tuple[Rule, ...]:
        """The first rule for each name of ours."""
        first: dict[str, Rule] = {}
        for rule in self.rules:
            for name in _tuple(rule.ours):
                first.setdefault(name, rule)
        return tuple(dict.fromkeys(first.values()))

    def match(self, names: Iterable[str]) -> Report:
        """What the map makes of these names of theirs; nothing is read and nothing refused."""
        names = tuple(names)
        present = frozenset(names)
        known = {name for rule in self.rules for name in _tuple(rule.theirs)}
        exact = {drop.theirs: drop.reason for drop in self.drops if "*" not in drop.theirs}
        patterns = [drop for drop in self.drops if "*" in drop.theirs]
        matched, dropped, unexpected = [], {}, []
        for name in names:
            if name in known:
                matched.append(name)
            elif name in exact:
                dropped[name] = exact[name]
            elif rule := next((drop for drop in patterns if fnmatchcase(name, drop.theirs)), None):
                dropped[name] = rule.reason
            else:
                unexpected.append(name)
        given = Counter(
            name
            for rule in self.rules
            if all(source in present for source in _tuple(rule.theirs))
            for name in _tuple(rule.ours)
        )
        missing = [
            name
            for rule in self._canonical
            if any(ours not in given for ours in _tuple(rule.ours))
            for name in _tuple(rule.theirs)
            if name not in present
        ]
        doubled = [name for name, count in given.items() if count > 1]
        return Report(tuple(matched), dropped, tuple(missing), tuple(unexpected), tuple(doubled))

    def to_ours(self, weights: Mapping[str, Tensor], source: str = "the file") -> View:
        """Our names over `weights`, whose tensors are read and changed when asked for.

        weights: any mapping from names to tensors. `source` names it in errors. `CheckpointError` unless every name
        has its place and every place its name.
        """
        report = self.match(weights)
        report.require(source)
        entries: dict[str, tuple[Rule, int]] = {}
        for rule in self.rules:
            if all(name in weights for name in _tuple(rule.theirs)):
                entries |= {name: (rule, place) for place, name in enumerate(_tuple(rule.ours))}
        return View(weights, {name: entries[name] for name in self.ours}, report)

    def to_theirs(self, weights: Mapping[str, Tensor], source: str = "the model") -> View:
        """Their canonical names over tensors of ours: the inverse of `to_ours`, as strict and as lazy."""
        return self.inverse.to_ours(weights, source)


class View(Mapping[str, "Tensor"]):
    """Names over the tensors of another mapping. A tensor is read, and changed by its rule, when it is asked for.

    `info` gives type and shape from the header alone where the mapping underneath has it.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        entries: Mapping[str, tuple[Rule, int]],
        report: Report | None = None,
    ):
        self.weights = weights
        self.entries = entries
        self.report = report or Report()

    def __getitem__(self, name: str) -> Tensor:
        return self._apply(name, self.weights.__getitem__)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:  # the one of `Mapping` would read the tensor
        return name in self.entries

    def info(self, name: str) -> Info:
        """(dtype, shape) of a tensor without reading it: the rule is applied to a tensor that holds no numbers."""

        import torch

        def empty(source: str) -> Tensor:
            dtype, shape = info(self.weights, source)
            return torch.empty(shape, dtype=dtype, device="meta")

        tensor = self._apply(name, empty)
        return tensor.dtype, tuple(tensor.shape)

    def origin(self, name: str) -> str:
        """The name in the file of a tensor, or of the first that it is made of; its own if that is none."""
        sources = _tuple(self.entries[name][0].theirs)
        return origin(self.weights, sources[0]) if sources else name

    def under(self, prefix: str) -> View:
        """The tensors whose names begin with `prefix`, named without it."""
        cut = {name.removeprefix(prefix): e for name, e in self.entries.items() if name.startswith(prefix)}
        return View(self.weights, cut, self.report)

    def _apply(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        rule, place = self.entries[name]
        sources = _tuple(rule.theirs)
        try:
            return rule.apply([read(source) for source in sources])[place]
        except ValueError as error:
            raise CheckpointError(f"tensor {sources[0]!r} cannot become {name!r}: {error}") from None


class Joined(Mapping[str, "Tensor"]):
    """Several mappings as one, each under a prefix: `Joined(("unet.", unet), ("vae.", vae))`. Nothing is read."""

    def __init__(self, *parts: tuple[str, Mapping[str, Tensor]]):
        self.places = {prefix + name: (weights, name) for prefix, weights in parts for name in weights}
        if len(self.places) != sum(len(weights) for _, weights in parts):
            raise ValueError("two parts have a tensor of the same name")

    def __getitem__(self, name: str) -> Tensor:
        weights, inner = self.places[name]
        return weights[inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def info(self, name: str) -> Info:
        return info(*self.places[name])

    def origin(self, name: str) -> str:
        return origin(*self.places[name])


def origin(weights: Mapping[str, Tensor], name: str) -> str:
    """What a tensor is called in its file: what `weights.origin` says where there is one, else `name`."""
    told: Callable[[str], str] | None = getattr(weights, "origin", None)
    return name if told is None or name not in weights else told(name)


def info(weights: Mapping[str, Tensor], name: str) -> Info:
    """(dtype, shape) of a tensor: from `weights.info` where there is one, so that nothing is read."""
    if hasattr(weights, "info"):
        dtype, shape = weights.info(name)
        return dtype, tuple(shape)
    tensor = weights[name]
    return tensor.dtype, tuple(tensor.shape)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape for all tensors: what detection needs."""
    return {name: info(weights, name)[1] for name in weights}
