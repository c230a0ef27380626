"""How soon the jobs of killed workers went on, and whether that was as soon as is promised: lease and 5 s.

A job does not wait for its lease and a worker alone: while faults keep SQL, the machine, whoever keeps house or every
other worker away, nobody could take it. What of the wait was so, is taken off (``excused``); what is left is judged.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

from shared.ids import public
from shared.jobs.rows import Attempt
from shared.jobs.state import AttemptOutcome
from tests.chaos.history import History
from tests.chaos.lookout import Look, Span, away, overlap, without
from tests.chaos.nemesis import Fault

PROMISED: Final = 5.0
"""Seconds after the lease."""
_OF_A_WORKER: Final = frozenset({"kill_worker", "kill_supervisor"})


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What became of one job whose worker was killed."""

    name: str
    fence: int
    killed_at: datetime
    reaped_at: datetime
    began_at: datetime | None
    """None: there was no next attempt."""

    @property
    def reaped_s(self) -> float:
        return (self.reaped_at - self.killed_at).total_seconds()

    @property
    def began_s(self) -> float | None:
        return None if self.began_at is None else (self.began_at - self.killed_at).total_seconds()


@dataclass(frozen=True)
class Excuses:
    """When nobody could have done what a job waited for."""

    looks: Sequence[Look]
    lease: timedelta

    def reaping(self) -> Iterator[Span]:
        """SQL or the machine was away; after half a lease of that, leases mean nothing for one more (continuity).

        Or the worker that keeps house was dead or stopped, until another has taken that over.
        """
        for since, until in away(self.looks):
            is_long = until - since + _ROUNDS >= self.lease / 2
            yield since, until + self.lease if is_long else until
        yield from without(self.looks, lambda look: look.housekeeper is not None)

    def taking(self) -> Iterator[Span]:
        """SQL or the machine was away, or no worker was free."""
        yield from away(self.looks)
        yield from without(self.looks, lambda look: look.free)

    def of(self, one: Recovery) -> float:
        """Seconds, until the next attempt began or, where there was none, the lease was ended.

        What was away while the lease still ran, and came back, kept nobody waiting.
        """
        spent = overlap(list(self.reaping()), one.killed_at + self.lease, one.reaped_at)
        return spent + (0.0 if one.began_at is None else overlap(list(self.taking()), one.reaped_at, one.began_at))


_ROUNDS: Final = timedelta(seconds=4)
"""Two rounds of housekeeping: so much longer than SQL was away is the time between the last round before and the first
after, at most."""


def recoveries(history: History, faults: Sequence[Fault]) -> Iterator[Recovery]:
    """One for each kill of a whole worker that held a job, and whose attempt ended by that."""
    for fault in faults:
        if fault.kind not in _OF_A_WORKER or fault.job_id is None:
            continue
        attempts = {attempt.fence: attempt for attempt in history.attempts_of.get(fault.job_id, [])}
        hit, following = attempts.get(fault.fence), attempts.get(fault.fence + 1)
        if hit is None or hit.ended_at is None or hit.outcome != AttemptOutcome.LOST:
            continue  # it had ended before the kill reached it
        yield Recovery(
            name=public("job", fault.job_id),
            fence=fault.fence,
            killed_at=fault.at,
            reaped_at=hit.ended_at,
            began_at=None if following is None or _was_paused(history, hit) else following.started_at,
        )


def _was_paused(history: History, hit: Attempt) -> bool:
    """Whether the job did not wait for a worker but for its client."""
    states = [event.data for event in history.events_of.get(hit.job_id, []) if event.type == "job.state"]
    return any(one["state"] == "paused" for before, one in pairwise(states) if before["attempt"] == hit.fence)


def late(found: Sequence[Recovery], excuses: Excuses) -> Iterator[str]:
    """The promise, for each of them."""
    lease = excuses.lease.total_seconds()
    for one in found:
        took, excused = one.began_s or one.reaped_s, excuses.of(one)
        if took - excused > lease + PROMISED:
            what = "its lease was ended" if one.began_s is None else "its next attempt began"
            yield (
                f"{one.name}: {what} {took:.1f} s after the worker of attempt {one.fence} was killed, of which only "
                f"{excused:.1f} s had a reason beside its lease of {lease:.0f} s"
            )


def figures(found: Sequence[Recovery], excuses: Excuses) -> Mapping[str, float]:
    """For the report: from the kill to the next attempt, to the end of the lease, and what of the first is judged."""
    started = [(one.began_s, excuses.of(one)) for one in found if one.began_s is not None]
    return {
        **_spread("", [seconds for seconds, _ in started]),
        **_spread("lease_lost_", [one.reaped_s for one in found]),
        **_spread("judged_", [seconds - excused for seconds, excused in started]),
        "judged_limit": excuses.lease.total_seconds() + PROMISED,
    }


def _spread(prefix: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        f"{prefix}count": len(seconds),
        f"{prefix}p50": round(statistics.median(seconds), 2),
        f"{prefix}max": round(max(seconds), 2),
    }
