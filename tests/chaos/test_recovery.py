"""How late the job of a killed worker may go on: by its lease and 5 s, and by what the faults themselves took away."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from shared.jobs.rows import Attempt, Event
from shared.jobs.state import AttemptOutcome
from tests.chaos.history import History
from tests.chaos.lookout import Look
from tests.chaos.nemesis import Fault
from tests.chaos.recovery import Excuses, figures, late, recoveries

JOB = UUID(int=1)
START = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = 15.0
KILLED, REAPED = 10.0, 26.0


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def looks(
    *, away: tuple[float, float] = (0, 0), busy: tuple[float, float] = (0, 0), untidy: tuple[float, float] = (0, 0)
) -> list[Look]:
    """Four a second for two minutes; the spans are when SQL was away, no worker free, nobody kept house."""
    moments = (number / 4 for number in range(480))
    return [
        Look(
            at=at(when), free=not busy[0] <= when < busy[1], housekeeper=None if untidy[0] <= when < untidy[1] else "u"
        )
        for when in moments
        if not away[0] <= when < away[1]
    ]


def history(reaped: float, began: float | None, state: str = "queued") -> History:
    """Of a job whose worker was killed at 10 s."""
    lost = Attempt(job_id=JOB, fence=1, worker="w", outcome=AttemptOutcome.LOST, started_at=at(5), ended_at=at(reaped))
    following = [] if began is None else [Attempt(job_id=JOB, fence=2, worker="v", started_at=at(began))]
    said = [("running", 1), (state, 1), ("running", 2)]
    events = [
        Event(job_id=JOB, seq=seq, type="job.state", data={"state": name, "attempt": fence})
        for seq, (name, fence) in enumerate(said, start=1)
    ]
    rest: dict[str, list[Any]] = {"jobs": [], "artifacts": [], "usage": [], "versions": [], "datasets": []}
    return History(attempts=[lost, *following], events=events, **rest)


def judged(
    seen: Sequence[Look],
    *,
    reaped: float = REAPED,
    began: float | None,
    state: str = "queued",
    kind: str = "kill_worker",
) -> list[str]:
    """What is said of it."""
    fault = Fault(kind=kind, target="w", at=at(KILLED), job_id=JOB, fence=1)
    found = list(recoveries(history(reaped, began, state), [fault]))
    return list(late(found, Excuses(seen, timedelta(seconds=LEASE))))


def test_whoever_goes_on_within_lease_and_five_seconds_is_in_time() -> None:
    assert judged(looks(), began=29.9) == []


@pytest.mark.parametrize("kind", ["kill_worker", "kill_supervisor"])
def test_whoever_goes_on_later_though_a_worker_was_free_is_late(kind: str) -> None:
    (said,) = judged(looks(), began=30.5, kind=kind)

    assert "20.5 s after the worker of attempt 1 was killed" in said


def test_a_lease_that_is_ended_late_is_late_though_nothing_followed() -> None:
    assert len(judged(looks(), reaped=31, began=None)) == 1


def test_no_free_worker_is_an_excuse_for_as_long_as_there_was_none() -> None:
    seen = looks(busy=(26, 50))

    assert judged(seen, began=53.5) == []
    assert len(judged(seen, began=55)) == 1


def test_a_worker_that_was_busy_while_the_lease_still_ran_is_none() -> None:
    assert len(judged(looks(busy=(11, 25)), began=31)) == 1


def test_what_was_away_and_back_before_the_lease_ended_is_none() -> None:
    assert len(judged(looks(away=(12, 15)), reaped=30, began=31)) == 1


def test_sql_that_is_away_when_the_lease_ends_is_an_excuse_until_it_is_back() -> None:
    seen = looks(away=(24, 27))

    assert judged(seen, reaped=30, began=32) == []
    assert len(judged(seen, reaped=35, began=36)) == 1


def test_after_half_a_lease_without_sql_leases_mean_nothing_for_one_more() -> None:
    seen = looks(away=(12, 20))

    assert judged(seen, reaped=36, began=38) == []
    assert len(judged(seen, reaped=41, began=43)) == 1


def test_nobody_who_keeps_house_is_an_excuse_for_a_lease_that_is_ended_late() -> None:
    seen = looks(untidy=(23, 30))

    assert judged(seen, reaped=32, began=34) == []
    assert len(judged(seen, reaped=26, began=34)) == 1


def test_a_paused_job_waits_for_its_client() -> None:
    assert judged(looks(), began=90, state="paused") == []


def test_what_is_judged_is_reported_without_its_excuses() -> None:
    fault = Fault(kind="kill_worker", target="w", at=at(KILLED), job_id=JOB, fence=1)

    found = list(recoveries(history(REAPED, 53), [fault]))
    told = figures(found, Excuses(looks(busy=(26, 50)), timedelta(seconds=LEASE)))

    assert (told["max"], told["judged_max"], told["judged_limit"]) == (43.0, 19.0, 20.0)
