"""What keeps jobs moving when somebody died: reap, expire, redispatch. Each safe to run twice at once.

Like ``attempts.py``: the caller's session, no commit, the database's clock.
"""

from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, delete, exists, func, insert, literal, not_, select, text, update
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import WorkerLost
from shared.jobs import needs
from shared.jobs.moves import move, move_by_case
from shared.jobs.rows import Bell, Dataset, DatasetState, Job, NamedLease, Worker
from shared.jobs.state import ENDED_BADLY, HELD, AttemptOutcome, JobState
from shared.jobs.workers import GONE_AFTER

_NOW = func.clock_timestamp()

LEASE: Final = "ticker"
"""Held by whoever does this. A worker, and where none lives the API."""

RUNG_AT_ONCE: Final = 20
"""Jobs of one queue that are rung for again."""


def reap(session: Session) -> list[tuple[UUID, JobState]]:
    """End every attempt whose lease ran out: its job is queued again, or ends if it was lost too often.

    One UPDATE decides for all: a job that was finished or claimed meanwhile is not touched. One whose row somebody
    holds is left for the next round, so that a worker which sleeps in the middle of a transaction delays only its own.
    """
    lost = WorkerLost("the worker stopped answering; its lease ran out")
    statement = move_by_case(
        [
            (JobState.CANCELED, col(Job.state) == JobState.CANCELING),
            (JobState.FAILED, col(Job.failures) + col(Job.losses) + 1 >= col(Job.max_attempts)),
            (JobState.PAUSED, col(Job.state) == JobState.PAUSING),
            (JobState.QUEUED, literal(True)),
        ],
        *_unlocked(col(Job.state).in_(HELD), col(Job.lease_until) < _NOW),
        outcome=AttemptOutcome.LOST,
        error=lost,
        losses=Job.losses + 1,
        # Whichever job killed the worker, next time it takes no other with it.
        alone=literal(True),
    )
    moved = [(row["id"], JobState(row["state"])) for row in session.execute(statement).mappings()]
    needs.settle(session, [job_id for job_id, state in moved if state in ENDED_BADLY])
    return moved


def _unlocked(*conditions: ColumnElement[bool]) -> tuple[ColumnElement[bool], ...]:
    """The conditions, for rows that nobody holds."""
    free = select(col(Job.id)).where(*conditions).with_for_update(skip_locked=True)
    return (*conditions, col(Job.id).in_(free))


def expire(session: Session) -> list[UUID]:
    """End every job that did not start before its deadline. One that did, and waits again, goes on waiting."""
    never_started = (col(Job.state) == JobState.QUEUED, col(Job.started_at).is_(None))
    statement = move(JobState.EXPIRED, *_unlocked(*never_started, col(Job.start_deadline) < _NOW))
    expired = [row["id"] for row in session.execute(statement).mappings()]
    needs.settle(session, expired)
    return expired


def redispatch(session: Session, *, after: timedelta) -> int:
    """Ring again for jobs that stayed queued: their bell was lost. Returns how many.

    Only for the first of each queue: a bell makes a worker claim the best job, whichever it was rung for. Who waits for
    other jobs is in no queue, however urgent.
    """
    place = func.row_number().over(
        partition_by=col(Job.queue), order_by=(col(Job.priority).desc(), col(Job.queued_at), col(Job.id))
    )
    may_start = col(Job.not_before).is_(None) | (col(Job.not_before) <= _NOW)
    queue = (
        select(col(Job.id), col(Job.queued_at), place.label("place"))
        .where(col(Job.state) == JobState.QUEUED, col(Job.queued_at).is_not(None), may_start)
        .subquery()
    )
    rung = exists().where(
        col(Bell.job_id) == queue.c.id, col(Bell.sent_at).is_(None) | (col(Bell.sent_at) > _NOW - literal(after))
    )
    waiting = select(queue.c.id).where(
        queue.c.place <= RUNG_AT_ONCE, queue.c.queued_at < _NOW - literal(after), not_(rung)
    )
    added = insert(Bell).from_select(["job_id"], waiting).returning(col(Bell.id))
    return len(session.execute(added).all())


def settle_needs(session: Session) -> list[UUID]:
    """Release or end who waits for jobs that have ended, where whoever ended those could not.

    Returns the jobs that ended because of that.
    """
    return needs.settle_remaining(session)


def settle_datasets(session: Session) -> None:
    """A dataset whose ingestion ended without success says so."""
    session.execute(
        update(Dataset)
        .where(
            col(Dataset.job_id) == Job.id,
            col(Dataset.state) == DatasetState.INGESTING,
            col(Job.state).in_([JobState.FAILED, JobState.CANCELED, JobState.EXPIRED]),
        )
        .values(
            state=DatasetState.FAILED,
            error=func.coalesce(Job.error_message, literal("ingestion was ") + col(Job.state)),
        )
    )


def is_watched(session: Session) -> bool:
    """Whether a worker lives that has not been told to end, so that it looks after the jobs."""
    lives = col(Worker.state).in_(["idle", "busy"]) & (col(Worker.seen_at) > _NOW - literal(GONE_AFTER))
    return bool(session.scalar(select(exists().where(lives))))


def lead_lease(tick: timedelta) -> timedelta:
    """For how long one round, of those that come every ``tick``, keeps the lead."""
    return max(tick * 3, timedelta(seconds=5))


def hold(session: Session, name: str, holder: str, lease: timedelta) -> bool:
    """Take or keep a named lease, so that of many tickers one does the work."""
    held = session.execute(
        text("""
            INSERT INTO named_leases (name, holder, until) VALUES (:name, :holder, clock_timestamp() + :lease)
            ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
                WHERE named_leases.holder = excluded.holder OR named_leases.until < clock_timestamp()
            RETURNING name
        """),
        {"name": name, "holder": holder, "lease": lease},
    )
    return held.scalar_one_or_none() is not None


def release(session: Session, name: str, holder: str) -> None:
    """Give a named lease up."""
    session.execute(delete(NamedLease).where(col(NamedLease.name) == name, col(NamedLease.holder) == holder))
