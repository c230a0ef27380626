"""When waiting jobs start, if things go on as they went lately. Pure arithmetic on what ``waiting.py`` read; no SQL.

The line in front of a job is played through many times, with durations like the last ones. What is submitted later and
still served before it stretches the time: all of a higher priority, and what tenants submit who have had less of the
devices. The same facts give the same answer.
"""

import heapq
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from random import Random
from typing import Final

from shared.wire import EtaView

RUNS: Final = 100
FEWEST: Final = 5
"""Attempts that must have ended before anything is told: so many, and so many more for each worker ..."""
_FEWEST_PER_WORKER: Final = 3
"""... for the short ones end first, and the first to end tell too little."""
_MOST_NEEDED: Final = 100
_FEWEST_LONGER: Final = 3
"""Attempts that took longer than one that runs, to tell by them how long that will still take."""
_FULL: Final = 0.9
"""Higher share of the devices that jobs of higher priority are never thought to take."""
_ROUNDS: Final = 20


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
class Rival:
    """A tenant whose jobs of one priority were served lately, and may be so again."""

    tenant: str
    priority: int
    rate: float
    """Device-seconds per second that it was served."""
    usual: float
    """Seconds that its jobs take."""
    level: float
    """Where its account stands once all that it has waiting is served."""


@dataclass(frozen=True, kw_only=True)
class QueueFacts:
    """What is known of a queue."""

    workers: Sequence[WorkerFacts]
    shapes: Sequence[float]
    """How long each of the last attempts took, relative to what attempts of its tenant take on average."""
    head: Sequence[float]
    """Seconds that each of the first jobs in line should take, in their order."""
    rivals: Sequence[Rival]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job stands in line."""

    tenant: str
    position: int
    rank: int
    work: float
    """Seconds that the jobs before it should take."""
    turn: float
    """Where its tenant's account will stand when it is its turn."""


class Forecast:
    """Start times in one queue.

    The first places are played through worker by worker. From there on the line moves as fast as all workers together
    work, with the spread of a sum. In each run all durations share an error, for their average is known only so well.
    """

    def __init__(self, queue: QueueFacts) -> None:
        self._queue = queue
        self._random = Random(0)
        self._spread = statistics.pstdev(queue.shapes) if queue.shapes else 0.0
        self._rests = [self._rests_of(worker) for worker in queue.workers]
        self._runs = [self._play() for _ in range(RUNS)] if self._is_possible else []

    @property
    def _is_possible(self) -> bool:
        needed = min(max(FEWEST, _FEWEST_PER_WORKER * len(self._queue.workers)), _MOST_NEEDED)
        return bool(self._queue.workers) and len(self._queue.shapes) >= needed

    def at(self, place: Place, *, backoff: float = 0.0) -> EtaView | None:
        """When the job with this place starts, but not before ``backoff`` seconds; None if that cannot be told."""
        if not self._runs:
            return None
        starts = [self._start(place, *run) for run in self._runs]
        later, spread = self._overtaking(place, statistics.fmean(starts))
        stretched = sorted(
            max(backoff, start * later + max(-start, self._random.gauss(0.0, spread))) for start in starts
        )
        return EtaView(p50=round(stretched[RUNS // 2], 1), p90=round(stretched[RUNS * 9 // 10], 1))

    def _play(self) -> tuple[float, list[float]]:
        """One run: how much longer everything takes than expected, and when each of the first places starts."""
        factor = max(0.1, self._random.gauss(1.0, self._spread / sqrt(len(self._queue.shapes))))
        free = [factor * self._random.choice(rests) for rests in self._rests]
        heapq.heapify(free)
        starts = [free[0]]
        for seconds in self._queue.head:
            heapq.heapreplace(free, free[0] + factor * seconds * self._random.choice(self._queue.shapes))
            starts.append(free[0])
        return factor, starts

    def _rests_of(self, worker: WorkerFacts) -> Sequence[float]:
        """Seconds until the worker may be free: what attempts still took that had taken as long as this one has."""
        if worker.elapsed is None:
            return [0.0]
        if worker.remaining is not None:
            return [worker.remaining]
        taken = [(worker.usual or 0.0) * shape for shape in self._queue.shapes]
        longer = [seconds - worker.elapsed for seconds in taken if seconds > worker.elapsed]
        # One that outlasts nearly all: the more attempts differ, the longer it may still take.
        return longer if len(longer) >= _FEWEST_LONGER else [seconds * self._spread for seconds in taken]

    def _start(self, place: Place, factor: float, starts: list[float]) -> float:
        if place.position <= len(starts):
            return starts[place.position - 1]
        beyond = max(0.0, place.work - sum(self._queue.head))
        spread = self._spread * beyond / sqrt(place.position - len(starts))
        return starts[-1] + max(0.0, self._random.gauss(factor * beyond, spread)) / len(self._queue.workers)

    def _overtaking(self, place: Place, seconds: float) -> tuple[float, float]:
        """By what jobs that come later stretch the time to the start, and with what spread in seconds."""
        num_workers = len(self._queue.workers)
        until = seconds
        for _ in range(_ROUNDS):
            until = seconds + sum(work for work, _ in self._passing(place, until)) / num_workers
        passing = list(self._passing(place, until))
        variance = sum(work * usual for work, usual in passing) * (1 + self._spread**2)
        return (until / seconds if seconds else 1.0), sqrt(variance) / num_workers

    def _passing(self, place: Place, seconds: float) -> Iterator[tuple[float, float]]:
        """Work of later jobs that is done before the job within ``seconds``, and how long each of them takes."""
        above = [rival for rival in self._queue.rivals if rival.priority > place.rank]
        share = min(1.0, _FULL * len(self._queue.workers) / max(sum(rival.rate for rival in above), 1e-9))
        for rival in above:
            yield share * rival.rate * seconds, rival.usual
        for rival in self._queue.rivals:
            if rival.priority == place.rank and rival.tenant != place.tenant:
                yield min(rival.rate * seconds, max(0.0, place.turn - rival.level)), rival.usual
