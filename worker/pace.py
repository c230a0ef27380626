"""How fast steps go, and when they will be done."""

from collections import deque

_WINDOW = 30.0
"""Seconds over which the rate is averaged."""


class Pace:
    """Steps per second over the last half minute."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def is_behind(self, step: int) -> bool:
        """Whether ``step`` was passed before."""
        return bool(self._marks) and step < self._marks[-1][1]

    def tick(self, step: int, now: float) -> None:
        """Note that ``step`` was done at ``now`` (monotonic seconds)."""
        if not self._marks or now - self._marks[-1][0] >= 0.1:
            self._marks.append((now, step))
        while now - self._marks[0][0] > _WINDOW:
            self._marks.popleft()

    def figures(self, step: int, steps: int) -> dict[str, float]:
        """``rate`` in steps per second and ``eta_seconds``, once there is something to go by."""
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        if ended - began < 0.5 or last == first:
            return {}
        rate = (last - first) / (ended - began)
        return {"rate": round(rate, 3), "eta_seconds": round((steps - step) / rate, 1)}
