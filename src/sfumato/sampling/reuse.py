"""Deep features kept from one call of a network to the next, between which they hardly change.

An approximation that needs no training: DeepCache (Ma et al. 2023, 2312.00858) for U-Nets, Δ-DiT (Chen et al. 2024,
2406.01125) for transformers. Which calls are whole follows from their number alone and not from what is drawn, so that
a picture does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sfumato.errors import InputError

# (x, time, cond, deep) -> (answer, deep): a network in two parts; `deep`, when given, is taken and not computed
Split = Callable[[Tensor, Tensor, Any, Tensor | None], tuple[Tensor, Tensor]]


class Reuse:
    """net(x, time, cond) → answer, for one run of a sampler: of its calls every `every`-th is whole.

    The others take the deep features of those before, extrapolated to their time by a polynomial of degree `order` (of
    a lower one while they are few): 0 keeps the last as they are (DeepCache), 1 or 2 forecasts (TaylorSeer, Liu et al.
    2025, 2503.06923). A call with fewer rows than before goes on with the first rows, which is what guidance leaves
    where it rests (`cfg_batched`); one with more rows is whole.
    """

    def __init__(self, split: Split, every: int, order: int = 0):
        if every < 1 or order < 0:
            raise InputError(
                f"every must be at least 1 and order 0, not {every} and {order}", argument="every"
            )
        self.split, self.every, self.order = split, every, order
        self._past: list[tuple[float, Tensor]] = []  # (time, deep features) of whole calls, the latest first
        self._since = 0  # calls since the last whole one

    def __call__(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        now = float(time.flatten()[0])  # a sampler tells all rows one time
        self._since += 1
        fits = bool(self._past) and len(x) <= len(self._past[0][1])
        if fits and self._since < self.every:
            deep = extrapolated([(then, features[: len(x)]) for then, features in self._past], now)
            return self.split(x, time, cond, deep)[0]
        answer, deep = self.split(x, time, cond, None)
        past = [(then, features) for then, features in self._past if fits and then != now]
        self._past = [(now, deep), *past][: self.order + 1]
        self._since = 0
        return answer


def extrapolated(points: list[tuple[float, Tensor]], time: float) -> Tensor:
    """The value at `time` of the polynomial of least degree through `points`, whose times all differ (Lagrange)."""
    if len(points) == 1:
        return points[0][1]
    total: Tensor | None = None
    for then, value in points:
        weight = 1.0
        for other, _ in points:
            if other != then:
                weight *= (time - other) / (then - other)
        total = weight * value if total is None else total + weight * value
    assert total is not None
    return total
