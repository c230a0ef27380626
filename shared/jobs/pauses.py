"""How long a job waits before its next attempt: each pause is twice the one before, up to the longest."""

from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, func, select
from sqlmodel import col

from shared.errors import JobError
from shared.jobs.rows import Artifact, Attempt
from shared.jobs.state import AttemptOutcome

LONGEST: Final = timedelta(minutes=10)
SHORTEST: Final = timedelta(milliseconds=1)
"""What is doubled from here on comes to an end."""
_MOST_DOUBLINGS: Final = 60
"""Far past the longest pause, and before the number overflows."""


def end_of(backoff: timedelta, num_before: Any) -> ColumnElement[Any]:
    """When the pause that begins now is over. ``num_before`` (SQL) were made already, the first for ``backoff``."""
    times = func.power(2, func.least(num_before, _MOST_DOUBLINGS))
    seconds = func.least(backoff.total_seconds() * times, LONGEST.total_seconds())
    return func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def num_within(patience: timedelta, backoff: timedelta) -> int:
    """How many pauses, the first of length ``backoff``, come to ``patience`` at most."""
    num, pause = 0, backoff
    while pause <= patience:
        num, patience, pause = num + 1, patience - pause, min(2 * pause, LONGEST)
    return num


def num_outages(job_id: UUID, error: JobError) -> ColumnElement[int]:
    """How many attempts of the job this outage has postponed since the last that stored something."""
    stored = select(func.coalesce(func.max(col(Artifact.fence)), 0)).where(col(Artifact.job_id) == job_id)
    postponed = select(func.count()).where(
        col(Attempt.job_id) == job_id,
        col(Attempt.fence) > stored.scalar_subquery(),
        col(Attempt.outcome) == AttemptOutcome.INTERRUPTED,
        col(Attempt.error_code) == error.code,
    )
    return postponed.scalar_subquery()
