"""What an outage of storage costs a job: no attempt, a pause that doubles, and in the end its patience."""

from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.errors import StorageUnavailable
from shared.jobs import attempts, claims
from shared.jobs.rows import Job
from shared.jobs.state import AttemptOutcome, JobState
from tests.shared.test_moves import LEASE, NOW, TERMS, attempt_of, claim_of, make_job, state_of

BACKOFF = timedelta(seconds=2)
PATIENCE = timedelta(seconds=30)
"""2 + 4 + 8 + 16 s: four pauses, and then no fifth of 32 s."""
AWAY = StorageUnavailable("it does not answer")


def postpone(session: Session, job_id: UUID) -> JobState | None:
    fence = session.scalars(select(col(Job.fence)).where(col(Job.id) == job_id)).one()
    return attempts.postpone(session, job_id, fence, AWAY, backoff=BACKOFF, patience=PATIENCE)


def claim_again(session: Session, job_id: UUID) -> None:
    session.execute(update(Job).where(col(Job.id) == job_id).values(not_before=None))
    assert claims.claim(session, worker="w1", queues=["generate"], terms=TERMS)


def pause_of(session: Session, job_id: UUID) -> float:
    return float(
        session.scalar(select(func.extract("epoch", col(Job.not_before) - NOW)).where(col(Job.id) == job_id)) or 0
    )


def test_outages_count_against_no_limit_and_wait_twice_as_long_each_time(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING, max_attempts=1)
    pauses = []
    for _ in range(4):
        assert postpone(session, job_id) == JobState.QUEUED
        pauses.append(pause_of(session, job_id))
        claim_again(session, job_id)

    session.expire_all()
    job = session.get_one(Job, job_id)
    assert (job.failures, job.losses, job.interruptions) == (0, 0, 4)
    assert pauses == pytest.approx([2, 4, 8, 16], abs=1)


def test_an_outage_that_outlasts_the_patience_fails_the_job_by_its_name(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING, max_attempts=3)
    for _ in range(4):
        postpone(session, job_id)
        claim_again(session, job_id)

    assert postpone(session, job_id) == JobState.FAILED

    session.expire_all()
    job = session.get_one(Job, job_id)
    assert (job.error_code, job.failures) == ("storage_unavailable", 1)
    assert attempt_of(session, job_id, 5).outcome == AttemptOutcome.FAILED


def test_what_was_stored_since_an_outage_ends_it(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING)
    for _ in range(4):
        postpone(session, job_id)
        claim_again(session, job_id)
    stored = attempts.NewArtifact(kind="preview", name="p", key="k", size_bytes=1, sha256="0", media_type="a/b")
    attempts.report(session, claim_of(session, job_id, 5), [attempts.Report.of(stored)], lease=LEASE)

    assert postpone(session, job_id) == JobState.QUEUED
    assert pause_of(session, job_id) == pytest.approx(2, abs=1)


@pytest.mark.parametrize(
    ("state", "end", "outcome"),
    [
        (JobState.CANCELING, JobState.CANCELED, AttemptOutcome.CANCELED),
        (JobState.PAUSING, JobState.PAUSED, AttemptOutcome.PAUSED),
    ],
)
def test_what_a_client_asked_for_happens_although_storage_is_away(
    session: Session, state: JobState, end: JobState, outcome: AttemptOutcome
) -> None:
    job_id = make_job(session, state)

    postpone(session, job_id)

    attempt = attempt_of(session, job_id)
    assert (state_of(session, job_id), attempt.outcome, attempt.error_code) == (end, outcome, AWAY.code)
