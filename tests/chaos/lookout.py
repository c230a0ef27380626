"""What a job could have hoped for at each moment of a run: SQL, somebody who keeps house, a worker that is free.

A thread looks four times a second, at SQL past the proxy and at the processes. What it saw says afterwards how long a
job had to wait because of what the faults had done to others, and how long for no such reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from threading import Event, Thread
from typing import Any, Final

import psutil
from sqlalchemy import text

EVERY: Final = 0.25
"""Seconds between two looks."""
_AWAY: Final = timedelta(seconds=1)
"""Without an answer for longer, SQL or the machine was away."""
_ASLEEP: Final = frozenset({psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})

# A worker that was killed stays in the table as it was: its process tells.
_WORKERS: Final = text("""
    SELECT clock_timestamp() AS now, name, pid, workers.state = 'idle' AND held.worker IS NULL AS is_free,
        name = (SELECT holder FROM named_leases WHERE named_leases.name = 'ticker') AS keeps_house
    FROM workers LEFT JOIN (SELECT DISTINCT worker FROM jobs
        WHERE state IN ('running', 'canceling', 'pausing')) AS held ON held.worker = workers.name
""")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen at one moment at which SQL answered."""

    at: datetime
    """By the database's clock."""
    free: bool
    """Whether a worker that lives, and is not stopped, was idle and held nothing."""
    housekeeper: str | None
    """The worker that does the housekeeping, if it lives, and is not stopped."""


Span = tuple[datetime, datetime]


class Lookout:
    """Looks until it is told to end. ``ask`` answers nothing while SQL is away."""

    def __init__(self, ask: Callable[[Any], Sequence[Any]]) -> None:
        self._ask = ask
        self._ending = Event()
        self._thread = Thread(target=self._look_on, name="lookout", daemon=True)
        self.looks: list[Look] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ending.wait(EVERY):
            if rows := self._ask(_WORKERS):
                alive = [row for row in rows if _is_awake(row.pid)]
                self.looks.append(
                    Look(
                        at=rows[0].now,
                        free=any(row.is_free for row in alive),
                        housekeeper=next((row.name.partition("@")[0] for row in alive if row.keeps_house), None),
                    )
                )


def _is_awake(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in _ASLEEP
    except psutil.Error:
        return False


def away(looks: Sequence[Look]) -> Iterator[Span]:
    """When SQL, or the whole machine, did not answer."""
    return ((one.at, two.at) for one, two in pairwise(looks) if two.at - one.at > _AWAY)


def without(looks: Sequence[Look], what: Callable[[Look], bool]) -> Iterator[Span]:
    """When SQL answered, and ``what`` was not so."""
    return ((one.at, two.at) for one, two in pairwise(looks) if two.at - one.at <= _AWAY and not what(one))


def overlap(spans: Sequence[Span], begin: datetime, end: datetime) -> float:
    """Seconds of what lies in at least one of the spans, between the two times."""
    total, reached = timedelta(0), begin
    for since, until in sorted(spans):
        counted = max(since, reached), min(until, end)
        if counted[1] > counted[0]:
            total, reached = total + (counted[1] - counted[0]), counted[1]
    return total.total_seconds()
