"""What of the database can influence what happens next, with names and times taken away.

Left out are columns that no statement of the product reads to decide anything: texts, ids, figures, the log of
events, versions (each step is checked to raise them), times of which only "is it set" matters. That this leaves out
nothing that matters is not assumed: ``replay.py`` runs whole traces on PostgreSQL and compares at each step.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal

LEASE: Final = timedelta(hours=1)
OLD: Final = timedelta(hours=1)
"""What stayed queued for longer is rung for again."""
BACKOFF: Final = timedelta(minutes=10)
PATIENCE: Final = BACKOFF
"""With storage that is away: enough for one pause."""
DEADLINE: Final = timedelta(hours=2)
JUMP: Final = timedelta(hours=10)
"""Longer than every bound above, so that one jump passes all of them; each bound is longer than any search takes."""

Canonical = tuple[Any, ...]
When = Literal["future", "recent", "old"] | None


def when(offset: float | None) -> When:
    """The class of a time, given in seconds from now."""
    if offset is None:
        return None
    if offset > 0:
        return "future"
    return "recent" if offset > -OLD.total_seconds() else "old"


def canonical(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Canonical:
    """A value equal for two states exactly if the model takes them for one."""
    jobs = rows["jobs"]
    return (
        tuple(_job(job) for job in jobs),
        tuple((row["fence"], row["outcome"] is None, is_postponed(row)) for row in rows["attempts"]),
        tuple(_bells(job, rows["outbox"]) for job in jobs),
        tuple(sorted(_artifact(row) for row in rows["artifacts"] if row["removed_at"] is None)),
        tuple(row["version"] for row in rows["model_versions"]),
        tuple(sorted(row["fence"] for row in rows["usage"])),
    )


def is_postponed(attempt: Mapping[str, Any]) -> bool:
    """Whether storage was away, so that the job was to be tried again."""
    return attempt["outcome"] == "interrupted" and attempt["error_code"] is not None


def _job(job: Mapping[str, Any]) -> tuple[Any, ...]:
    state = job["state"]
    if job["completed_at"] is not None:
        return state, job["fence"]
    return (
        *(state, job["fence"], job["failures"] + job["losses"], job["preempt_fence"]),
        *(when(job[name]) == "future" for name in ("lease_until", "not_before", "start_deadline")),
        job["started_at"] is not None,
        _waits_long(job),
    )


def _artifact(row: Mapping[str, Any]) -> tuple[Any, ...]:
    without_job = row["key"].split("/", maxsplit=2)[2]
    return row["fence"], row["kind"], without_job, row["sha256"]


def _waits_long(job: Mapping[str, Any]) -> bool:
    """Whether its place in line is an old one, which it keeps when an attempt ends. A paused job gets a new one."""
    return job["state"] != "paused" and when(job["queued_at"]) == "old"


def _bells(job: Mapping[str, Any], bells: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
    """Whether one is unsent (more are sent together), and whether one was sent so recently that no other is due.

    The latter matters only to a job that waits for long: by the time that its place in line is old, these bells are,
    too. For a job that has ended none is sent.
    """
    if job["completed_at"] is not None:
        return False, False
    unsent = any(bell["sent_at"] is None for bell in bells)
    return unsent, _waits_long(job) and any(when(bell["sent_at"]) == "recent" for bell in bells)
