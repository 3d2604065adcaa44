"""How often somebody may ask: a bucket for each that fills by the minute."""

from __future__ import annotations

import time


class Rates:
    """Buckets by name. `take` answers 0, or the seconds after which there is room again."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # name → (left, when)

    def take(self, name: str, per_minute: int | None, now: float | None = None) -> float:
        """Take one of `per_minute`, which is also how many may come at once; None is no limit."""
        if per_minute is None:
            return 0.0
        now = time.monotonic() if now is None else now
        left, since = self._buckets.get(name, (float(per_minute), now))
        left = min(float(per_minute), left + (now - since) * per_minute / 60)
        if left < 1:
            self._buckets[name] = (left, now)
            return (1 - left) * 60 / per_minute if per_minute else 60.0
        self._buckets[name] = (left - 1, now)
        return 0.0
