"""Which jobs are claimed, which are rung for, and what is counted when an attempt is lost."""

from datetime import timedelta

import pytest
from sqlalchemy.orm import Session

from shared.errors import UploadFailed
from shared.jobs import attempts, claims, upkeep
from shared.jobs.rows import Job
from shared.jobs.state import JobState, JobType
from tests.shared.desk import Desk
from tests.shared.test_moves import LEASE, NOW, TERMS, lose, make_job


@pytest.mark.parametrize("state", [state for state in JobState if state != JobState.QUEUED])
def test_only_a_queued_job_is_claimed(session: Session, state: JobState) -> None:
    make_job(session, state)

    assert not claims.claim(session, worker="w", queues=["generate"], terms=TERMS)


def test_a_lost_attempt_is_counted_as_lost_alone(session: Session) -> None:
    job_id = make_job(session, JobState.RUNNING)
    lose(session, job_id)

    upkeep.reap(session)

    job = session.get_one(Job, job_id, populate_existing=True)
    assert (job.losses, job.failures, job.interruptions) == (1, 0, 0)


def test_nobody_is_rung_for_a_job_that_backs_off(session: Session) -> None:
    make_job(session, queued_at=NOW - LEASE, not_before=NOW + LEASE)

    assert upkeep.redispatch(session, after=timedelta(seconds=20)) == 0


def test_nobody_is_rung_again_for_a_job_that_has_just_been_queued(session: Session) -> None:
    make_job(session)

    assert upkeep.redispatch(session, after=timedelta(seconds=20)) == 0


def test_behind_a_job_that_cannot_be_run_the_next_one_is_claimed(session: Session) -> None:
    make_job(session, type=JobType.GENERATE, priority=2)
    good = make_job(session)

    assert [claim.job_id for claim in claims.claim(session, worker="w", queues=["generate"], terms=TERMS)] == [good]


@pytest.mark.parametrize(("failures", "end"), [(0, JobState.PAUSED), (2, JobState.FAILED)])
def test_a_failure_that_may_pass_leaves_a_pausing_job_paused(session: Session, failures: int, end: JobState) -> None:
    job_id = make_job(session, JobState.PAUSING, failures=failures)

    assert attempts.fail(session, job_id, 1, UploadFailed("x"), backoff=LEASE) == end


def test_a_row_that_somebody_holds_delays_no_other(desk: Desk) -> None:
    with Session(desk.engine) as setup, setup.begin():
        asleep, lost = make_job(setup, JobState.RUNNING), make_job(setup, JobState.RUNNING)
        for job_id in (asleep, lost):
            lose(setup, job_id)

    with Session(desk.engine) as sleeper:
        sleeper.get_one(Job, asleep, with_for_update=True)
        assert desk.work(upkeep.reap) == [(lost, JobState.QUEUED)]

    assert desk.work(upkeep.reap) == [(asleep, JobState.QUEUED)]
