"""What SQL does to those that share a device: rows that somebody keeps locked, claims that nobody confirmed."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from threading import Event
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from shared.database import make_engine
from shared.jobs.rows import Job, Model, ModelVersion
from shared.jobs.state import AttemptOutcome, JobState, JobType
from tests.conftest import WaitUntil
from tests.worker.conftest import Workplace
from tests.worker.test_company import Models
from tests.worker.test_faults import UNCONFIRMED


@pytest.fixture
def impatient(workplace: Workplace) -> Iterator[Engine]:
    """An engine that waits for locked rows as briefly as a worker's does."""
    engine = make_engine(workplace.settings.database, "test", ping=False, lock_timeout=timedelta(seconds=0.1))
    yield engine
    engine.dispose()


@contextmanager
def holding(workplace: Workplace) -> Iterator[Session]:
    """A session that keeps what it locks for as long as it likes: the server does not end its transaction."""
    with Session(workplace.engine) as session:
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        yield session


def lease_of(workplace: Workplace, job_id: UUID) -> datetime | None:
    with Session(workplace.engine) as session:
        return session.get_one(Job, job_id).lease_until


def test_a_row_that_somebody_keeps_locked_holds_up_no_other_lease(
    workplace: Workplace, impatient: Engine, wait_until: WaitUntil
) -> None:
    models = Models(workplace)
    version = models.version()
    jobs = [models.job(version, ["steps", 100, 0.05]) for _ in range(2)]
    supervisor = workplace.supervisor(engine=impatient)
    thread = workplace.background(supervisor.run_next)
    wait_until(lambda: all(workplace.get(job).step for job in jobs))

    with holding(workplace) as holder:
        holder.get_one(Job, jobs[0], with_for_update=True)
        for _ in range(2):
            before = lease_of(workplace, jobs[1])
            wait_until(lambda before=before: lease_of(workplace, jobs[1]) != before)
    thread.join(20)

    assert [workplace.state(job) for job in jobs] == [JobState.SUCCEEDED] * 2


def test_an_end_that_waits_for_a_locked_row_holds_up_no_other_lease(
    workplace: Workplace, impatient: Engine, wait_until: WaitUntil
) -> None:
    models = Models(workplace)
    version = models.version()
    short, long = models.job(version, ["steps", 40, 0.05]), models.job(version, ["steps", 100, 0.05])
    supervisor = workplace.supervisor(engine=impatient)
    thread = workplace.background(supervisor.run_next)
    wait_until(lambda: all(workplace.get(job).step for job in (short, long)))

    with holding(workplace) as holder:
        holder.get_one(Job, short, with_for_update=True)
        wait_until(lambda: workplace.get(long).step > 50)
        for _ in range(2):
            before = lease_of(workplace, long)
            wait_until(lambda before=before: lease_of(workplace, long) != before)
    thread.join(20)

    assert [workplace.state(job) for job in (short, long)] == [JobState.SUCCEEDED] * 2
    assert [len(workplace.attempts(job)) for job in (short, long)] == [1, 1]


def test_an_end_that_waits_for_another_row_than_the_jobs_holds_its_own_lease(
    workplace: Workplace, impatient: Engine, wait_until: WaitUntil
) -> None:
    """As the name of a model, which somebody else who publishes a version of it has locked."""
    first, second = (workplace.job(["train", 5, 0.05, 100], type=JobType.TRAIN) for _ in range(2))
    supervisor = workplace.supervisor(engine=impatient)
    supervisor.run_next()
    transact, tries = supervisor.transact, Event()

    def trying(work: Any) -> Any:
        tries.set()
        return transact(work)

    supervisor.transact = trying  # type: ignore[method-assign]
    with holding(workplace) as holder:
        holder.scalars(select(Model).with_for_update()).one()
        thread = workplace.background(supervisor.run_next)
        wait_until(tries.is_set)
        for _ in range(4):
            before = lease_of(workplace, second)
            wait_until(lambda before=before: lease_of(workplace, second) != before)
    thread.join(20)

    assert [workplace.state(job) for job in (first, second)] == [JobState.SUCCEEDED] * 2
    assert [version.version for version in workplace.rows(ModelVersion)] == [1, 2]


def test_a_claim_that_is_found_again_and_cannot_join_is_handed_back(workplace: Workplace) -> None:
    models = Models(workplace)
    version, other = models.version(), models.version("letters")
    job_id = models.job(version, ["steps", 1, 0.0])
    supervisor = workplace.supervisor()
    settle = supervisor.settle

    def unconfirmed(work: Any) -> Any:
        settle(work)
        raise UNCONFIRMED

    supervisor.settle = unconfirmed  # type: ignore[method-assign]
    assert not supervisor.run_next()
    supervisor.settle = settle  # type: ignore[method-assign]

    assert supervisor.claim_company(other, room=4, others_wait=True) == []

    job = workplace.get(job_id)
    assert (job.state, job.losses, job.failures) == (JobState.QUEUED, 0, 0)
    assert [attempt.outcome for attempt in workplace.attempts(job_id)] == [AttemptOutcome.INTERRUPTED]
    assert supervisor.run_next()
    assert workplace.state(job_id) == JobState.SUCCEEDED


def test_a_claim_that_is_found_again_joins_its_own_kind(workplace: Workplace) -> None:
    models = Models(workplace)
    version = models.version()
    job_id = models.job(version, ["steps", 1, 0.0])
    supervisor = workplace.supervisor()
    settle = supervisor.settle

    def unconfirmed(work: Any) -> Any:
        settle(work)
        raise UNCONFIRMED

    supervisor.settle = unconfirmed  # type: ignore[method-assign]
    supervisor.run_next()
    supervisor.settle = settle  # type: ignore[method-assign]

    [held] = supervisor.claim_company(version, room=0, others_wait=True)

    assert (held.claim.job_id, held.claim.fence) == (job_id, 1)
