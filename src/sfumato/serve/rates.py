"""How often somebody may ask: a bucket for each that fills by the minute."""

from __future__ import annotations

import time


class Rates:
    """Buckets by name. Both answer 0, or the seconds after which there is room again."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}  # name → (left, when)

    def look(self, name: str, per_minute: int | None, now: float | None = None) -> float:
        """Whether `take` would take one."""
        if per_minute is None:
            return 0.0
        left = self._left(name, per_minute, time.monotonic() if now is None else now)
        return 0.0 if left >= 1 else (1 - left) * 60 / per_minute if per_minute else 60.0

    def take(self, name: str, per_minute: int | None, now: float | None = None) -> float:
        """Take one of `per_minute`, which is also how many may come at once; None is no limit."""
        now = time.monotonic() if now is None else now
        wait = self.look(name, per_minute, now)
        if per_minute is not None:
            self._buckets[name] = (self._left(name, per_minute, now) - (wait == 0), now)
        return wait

    def _left(self, name: str, per_minute: int, now: float) -> float:
        left, since = self._buckets.get(name, (float(per_minute), now))
        return min(float(per_minute), left + (now - since) * per_minute / 60)
