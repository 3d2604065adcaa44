"""What an adapter adds to one tensor of a network, whatever format it was written in.

Every kind answers `full(shape)`: ΔW in float32, at weight 1. `folded` adds any number of them to a tensor.

Sources of the formulas: LoRA (Hu et al. 2021, 2106.09685, eq. 3), LoHa (FedPara, Hyeon-Woo et al. 2021, 2108.06098,
prop. 1 and 3), LoKr (Edalati et al. 2022, 2212.10650, sec. 3), DoRA (Liu et al. 2024, 2402.09353, eq. 5), and LyCORIS
(2309.14859) for their forms in files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sfumato.checkpoint.cast import cast
from sfumato.nn.products import products_are_fast
from sfumato.nn.tiles import add_product_to_matrix

Shape = Sequence[int]


@dataclass(frozen=True, eq=False)
class LowRank:
    """scale · up·down. up: (O, r, …), down: (r, I, …) of a matrix or a kernel (r, I, h, w); kernels of `up` are 1×1.

    mid: (r, r, h, w), a kernel between the two, which then have 1×1 ones (LoCon's Tucker form).
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        inner = self.mid.shape[2:] if self.mid is not None else self.down.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *inner)

    def full(self, shape: Shape) -> Tensor:
        if self.mid is None:
            product = _wide(self.up).flatten(1) @ _wide(self.down).flatten(1)
        else:
            product = _tucker(_wide(self.mid), _wide(self.up).flatten(1).T, _wide(self.down).flatten(1))
        return product.mul_(self.scale).reshape(tuple(shape))

    def norm(self) -> float:
        """‖ΔW‖, without ΔW: the trace of (upᵀup)(down downᵀ), for which float64 has room."""
        if self.mid is not None:
            return float(self.full(self.shape).norm())
        up, down = self.up.flatten(1).double(), self.down.flatten(1).double()
        return abs(self.scale) * math.sqrt(max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0))

    def bound(self) -> float:
        """What no number of ΔW exceeds; of a product without `mid`. Of types of small range that is enough to know."""
        up, down = (
            top if (top := torch.finfo(f.dtype).max) < 2**16 else float(f.abs().max())
            for f in (self.up, self.down)
        )
        return abs(self.scale) * self.rank * up * down


@dataclass(frozen=True, eq=False)
class Factor:
    """A matrix or kernel that is written whole, as a product a·b, or with a core: a (r, O), b (r, I)."""

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.whole is not None:
            return tuple(self.whole.shape)
        assert self.a is not None and self.b is not None
        if self.core is not None:
            return (self.a.shape[1], self.b.shape[1], *self.core.shape[2:])
        return (self.a.shape[0], self.b.shape[1])

    def full(self) -> Tensor:
        if self.whole is not None:
            return _wide(self.whole)
        assert self.a is not None and self.b is not None
        if self.core is not None:
            return _tucker(_wide(self.core), _wide(self.a), _wide(self.b))
        return _wide(self.a) @ _wide(self.b)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """scale · first ⊙ second (LoHa)."""

    first: Factor
    second: Factor
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return self.first.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    def full(self, shape: Shape) -> Tensor:
        return self.first.full().mul_(self.second.full()).mul_(self.scale).reshape(tuple(shape))


@dataclass(frozen=True, eq=False)
class Kronecker:
    """scale · first ⊗ second (LoKr). A matrix beside a kernel stands for a 1×1 kernel."""

    first: Factor
    second: Factor
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        return self.second.rank or self.first.rank

    @property
    def shape(self) -> tuple[int, ...]:
        one, two = self.first.shape, self.second.shape
        one, two = one + (1,) * (len(two) - len(one)), two + (1,) * (len(one) - len(two))
        return tuple(a * b for a, b in zip(one, two, strict=True))

    def full(self, shape: Shape) -> Tensor:
        one, two = self.first.full(), self.second.full()
        sides = max(one.ndim, two.ndim)
        outer = [(*one.shape, *[1] * sides)[d] for d in range(sides)]
        inner = [(*two.shape, *[1] * sides)[d] for d in range(sides)]
        one = one.reshape([n for side in outer for n in (side, 1)])
        two = two.reshape([n for side in inner for n in (1, side)])
        return (one * two).mul_(self.scale).reshape(tuple(shape))  # kron, which fails on some kernels of 1×1


@dataclass(frozen=True, eq=False)
class Difference:
    """scale · the difference itself: of a weight, a norm or a bias."""

    tensor: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def full(self, shape: Shape) -> Tensor:
        return _wide(self.tensor).mul(self.scale).reshape(tuple(shape))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a change to a layer that is laid out otherwise there: of its `of` equal parts, those numbered `rows`."""

    inner: Hadamard | Kronecker | Difference | LowRank
    rows: tuple[int, ...]
    of: int

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        height, *rest = self.inner.shape
        return (height // self.of * len(self.rows), *rest)

    def full(self, shape: Shape) -> Tensor:
        height, *rest = shape
        whole = self.inner.full((height // len(self.rows) * self.of, *rest))
        return _rows_of(whole, self.rows, self.of)


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA: the direction of W + ΔW with a magnitude of its own, magnitude · (W + ΔW) / ‖W + ΔW‖.

    magnitude: one number for each output (the norm is over a row) or, of LyCORIS' first form, for each input.
    outputs: which of the two.
    """

    inner: LowRank | Hadamard | Kronecker | Difference | Rows
    magnitude: Tensor
    outputs: bool

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    def over(self, base: Tensor) -> Tensor:
        """What it adds to `base` (float32) at weight 1."""
        moved = base + self.inner.full(base.shape)
        axis = 0 if self.outputs else 1
        others = [d for d in range(base.ndim) if d != axis]
        norm = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        wanted = _wide(self.magnitude).reshape([-1 if d == axis else 1 for d in range(base.ndim)])
        return moved.mul_(wanted / norm.clamp_(min=torch.finfo(torch.float32).tiny)).sub_(base)


Delta = LowRank | Hadamard | Kronecker | Difference | Rows | Decomposed
Change = tuple[float, Delta]  # with its weight


def rows_of(delta: Delta, rows: tuple[int, ...], of: int) -> Delta:
    """The change to some of a layer's rows: of its `of` equal parts, those numbered `rows`, in their order.

    `ValueError` where no rows can be told from the rest: DoRA over inputs has one norm for all.
    """
    if of == 1:
        return delta
    if delta.shape[0] % of:
        raise ValueError(f"{delta.shape[0]} rows do not fall into {of} equal parts")
    if isinstance(delta, Decomposed):
        if not delta.outputs and len(rows) != of:
            raise ValueError(f"DoRA over the inputs of a layer that is {of} here")
        inner = rows_of(delta.inner, rows, of)
        assert not isinstance(inner, Decomposed)
        magnitude = _rows_of(delta.magnitude.flatten(), rows, of) if delta.outputs else delta.magnitude
        return Decomposed(inner, magnitude, delta.outputs)
    assert not isinstance(delta, Rows)
    if isinstance(delta, LowRank):
        return replace(delta, up=_rows_of(delta.up, rows, of))
    return Rows(delta, rows, of)


def product(changes: Sequence[Change]) -> tuple[Tensor, Tensor] | None:
    """(up (O, r), down (r, I)) in float32, whose product Σ weight · ΔW is, kernels as rows; None if it is none."""
    ups, downs = [], []
    for weight, delta in changes:
        if not isinstance(delta, LowRank) or delta.mid is not None:
            return None
        ups.append(delta.up.to(torch.float32, copy=True).flatten(1).mul_(weight * delta.scale))
        downs.append(_wide(delta.down).flatten(1))
    return (ups[0], downs[0]) if len(ups) == 1 else (torch.cat(ups, 1), torch.cat(downs))


def folded(base: Tensor, changes: Sequence[Change], dtype: torch.dtype = torch.float32) -> Tensor:
    """base + Σ weight · ΔW, added in float32 and rounded once to `dtype`, on `base`'s device. `base` stays as it is.

    In bfloat16 it is the base rounded to that, so that it is the same whether a layer in memory takes ΔW or the file's.
    Each ΔW is that to `base` itself, so the order of several does not matter, save for rounding. Products are added as
    one, of factors rounded to bfloat16 where that is asked for and multiplied natively.
    """
    out = cast(base, dtype)
    if out.ndim > 1 and (factors := product(changes)) is not None:
        matrix, (up, down) = out.view(len(out), -1), (factor.to(out.device) for factor in factors)
        if products_are_fast(out):
            torch.addmm(matrix, up.to(dtype), down.to(dtype), out=matrix)
        else:
            add_product_to_matrix(matrix, up, down)
        return out
    total = out.to(torch.float32, copy=True)
    for weight, delta in changes:
        total.add_(change_of(delta, out), alpha=weight)
    return total.to(dtype)


def change_of(delta: Delta, base: Tensor) -> Tensor:
    """ΔW at weight 1 on `base`, in float32 on its device."""
    delta = _on(delta, base.device)
    return delta.over(_wide(base)) if isinstance(delta, Decomposed) else delta.full(base.shape)


def _on(delta: Delta, device: torch.device) -> Delta:
    """The same with its tensors on `device`."""
    if device.type == "cpu":
        return delta
    moved = {}
    for f in fields(delta):
        value = getattr(delta, f.name)
        if isinstance(value, Tensor):
            moved[f.name] = value.to(device)
        elif isinstance(value, Factor):
            parts = {g.name: getattr(value, g.name) for g in fields(value)}
            moved[f.name] = Factor(**{k: v if v is None else v.to(device) for k, v in parts.items()})
        elif isinstance(value, LowRank | Hadamard | Kronecker | Difference | Rows):
            moved[f.name] = _on(value, device)
    return replace(delta, **moved)


def _rows_of(tensor: Tensor, rows: tuple[int, ...], of: int) -> Tensor:
    parts = tensor.chunk(of)
    return parts[rows[0]] if len(rows) == 1 else torch.cat([parts[k] for k in rows])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core (r, s, h, w), a (r, O), b (s, I) → (O, I, h, w)."""
    return torch.einsum("rshw,ro,si->oihw", core, a, b).contiguous()
