"""When waiting jobs start: the line in front of them is played through many times, with durations like the last ones.

Pure arithmetic on what ``waiting.py`` read; knows no SQL. The same facts give the same answer.
"""

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random
from typing import Final

from shared.wire import EtaView

RUNS: Final = 100
FEWEST: Final = 5
"""Attempts that must be known before anything is told."""


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """A live worker that serves the queue."""

    elapsed: float | None
    """Seconds that its attempt has run; None: it is idle."""
    remaining: float | None
    """Seconds that its attempt says it still needs."""
    usual: float | None
    """Seconds that attempts like this one take."""


@dataclass(frozen=True, kw_only=True)
class QueueFacts:
    """What is known of a queue."""

    workers: Sequence[WorkerFacts]
    shapes: Sequence[float]
    """How long each of the last attempts took, relative to what attempts of its tenant take on average."""
    head: Sequence[float]
    """Seconds that each of the first jobs in line should take, in their order."""


class Forecast:
    """Start times in one queue.

    The first places are played through worker by worker. From there on the line moves as fast as all workers together
    work, with the spread of a sum. In each run all durations share an error, for their average is known only so well.
    """

    def __init__(self, queue: QueueFacts) -> None:
        self._queue = queue
        self._random = Random(0)
        self._spread = statistics.pstdev(queue.shapes) if queue.shapes else 0.0
        self._runs = [self._play() for _ in range(RUNS)] if self._is_possible else []

    @property
    def _is_possible(self) -> bool:
        return bool(self._queue.workers) and len(self._queue.shapes) >= FEWEST

    def at(self, place: int, work: float, *, not_before: float = 0.0) -> EtaView | None:
        """When the job starts that has ``place`` in line, behind ``work`` seconds; None if that cannot be told.

        Args:
            not_before: seconds for which it backs off.
        """
        if not self._runs:
            return None
        starts = sorted(max(not_before, self._start(place, work, *run)) for run in self._runs)
        return EtaView(p50=round(starts[RUNS // 2], 1), p90=round(starts[RUNS * 9 // 10], 1))

    def _play(self) -> tuple[float, list[float]]:
        """One run: how much longer everything takes than expected, and when each of the first places starts."""
        known = len(self._queue.shapes)
        factor = max(0.1, self._random.gauss(1.0, self._spread / sqrt(known)))
        free = [factor * self._rest(worker) for worker in self._queue.workers]
        heapq.heapify(free)
        starts = [free[0]]
        for seconds in self._queue.head:
            heapq.heapreplace(free, free[0] + factor * seconds * self._random.choice(self._queue.shapes))
            starts.append(free[0])
        return factor, starts

    def _rest(self, worker: WorkerFacts) -> float:
        """Seconds until the worker is free: as long as attempts took that had taken as long as this one has."""
        if worker.elapsed is None:
            return 0.0
        if worker.remaining is not None:
            return worker.remaining
        usual = worker.usual or 0.0
        longer = [usual * shape - worker.elapsed for shape in self._queue.shapes if usual * shape > worker.elapsed]
        # One that has outlasted all others gives no hint: as if it began now.
        return self._random.choice(longer or [usual * shape for shape in self._queue.shapes])

    def _start(self, place: int, work: float, factor: float, starts: list[float]) -> float:
        if place <= len(starts):
            return starts[place - 1]
        beyond = max(0.0, work - sum(self._queue.head))
        spread = self._spread * beyond / sqrt(place - len(starts))
        return starts[-1] + max(0.0, self._random.gauss(factor * beyond, spread)) / len(self._queue.workers)
