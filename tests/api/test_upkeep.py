"""Jobs end although no worker lives: the API does what cannot wait for one, and leaves it to any that does."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, create_engine, event, func, text
from sqlalchemy.orm import Session

from api.upkeep import UpkeepThread
from shared.ids import parse, uuid7
from shared.jobs import upkeep, workers
from shared.jobs.need_rows import Need
from shared.jobs.rows import Job, NamedLease, Tenant
from shared.jobs.state import JobState, JobType
from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import claim, make_settings, serving
from tests.conftest import WaitUntil


@pytest.fixture
def alone(database: str, valkey: str, s3: Any) -> Settings:
    """An installation without workers, whose API looks often."""
    settings = make_settings(database, valkey, s3)
    often = settings.worker.model_copy(update={"tick": timedelta(seconds=0.1)})
    return settings.model_copy(update={"worker": often})


@pytest.fixture
def its_engine(database: str) -> Iterator[Engine]:
    engine = create_engine(database)
    yield engine
    engine.dispose()


def state(engine: Engine, job_id: str) -> JobState:
    with Session(engine) as session:
        return session.get_one(Job, parse("job", job_id)).state


def pass_by(engine: Engine, column: str, job_id: str) -> None:
    with engine.begin() as connection:
        statement = text(f"UPDATE jobs SET {column} = clock_timestamp() - interval '1 s' WHERE id = :id")
        connection.execute(statement, {"id": parse("job", job_id)})


def test_an_api_without_workers_ends_what_was_lost_or_is_too_late(
    alone: Settings, its_engine: Engine, make_owner: MakeOwner, wait_until: WaitUntil
) -> None:
    with serving(alone) as url:
        owner = make_owner(url=url, engine=its_engine)
        lost, canceled, late = (owner.train()["id"] for _ in range(3))
        for job_id in (lost, canceled):
            claim(its_engine, job_id)
        owner.client.post(f"/v1/jobs/{canceled}/cancel").raise_for_status()

        for job_id in (lost, canceled):
            pass_by(its_engine, "lease_until", job_id)
        pass_by(its_engine, "start_deadline", late)

        wait_until(lambda: state(its_engine, late) == JobState.EXPIRED)
        wait_until(lambda: state(its_engine, lost) == JobState.QUEUED)
        wait_until(lambda: state(its_engine, canceled) == JobState.CANCELED)


@pytest.mark.parametrize(("worker", "ended"), [("idle", False), ("draining", True)])
def test_the_api_leaves_it_to_a_worker_that_lives(
    alone: Settings, its_engine: Engine, worker: str, ended: bool
) -> None:
    told: list[UUID] = []
    job_id = late_job(its_engine)
    says = {"name": "w", "host": "h", "pid": 1, "queues": ["train"], "device": "cpu", "job_id": None, "state": worker}
    with Session(its_engine) as session, session.begin():
        workers.sign_in(session, **says)

    UpkeepThread(alone, told.append)._round(its_engine)

    assert told == [job_id] * ended
    with Session(its_engine) as session:
        assert (session.get(NamedLease, upkeep.LEASE) is not None) == ended


def test_who_ends_with_another_is_told_of_as_well(alone: Settings, its_engine: Engine) -> None:
    told: list[UUID] = []
    late, waiting = late_job(its_engine), late_job(its_engine)
    with Session(its_engine) as session, session.begin():
        session.execute(text("UPDATE jobs SET start_deadline = NULL, queued_at = NULL WHERE id = :id"), {"id": waiting})
        session.add(Need(job_id=waiting, field="init_from", needs_job_id=late))

    UpkeepThread(alone, told.append)._round(its_engine)

    assert sorted(told) == sorted([late, waiting])


def test_an_api_that_is_stopped_after_any_statement_keeps_no_lease_locked(alone: Settings, its_engine: Engine) -> None:
    """Where it is stopped, another asks for the rows of the named leases, and waits for nobody."""
    thread, held = UpkeepThread(alone, lambda _: None), list[str]()

    def look(*_: object) -> None:
        with other.begin() as connection:
            free = set(connection.scalars(text("SELECT name FROM named_leases FOR UPDATE SKIP LOCKED")))
            held.extend(set(connection.scalars(text("SELECT name FROM named_leases"))) - free)

    other = create_engine(its_engine.url)
    try:
        thread._round(its_engine)  # so that the rows are there
        event.listen(its_engine, "after_cursor_execute", look)
        thread._round(its_engine)
        thread._resign(its_engine)
    finally:
        other.dispose()

    assert held == []


def late_job(engine: Engine) -> UUID:
    with Session(engine) as session, session.begin():
        tenant = Tenant(name=uuid7().hex)
        session.add(tenant)
        session.flush()
        job = Job(
            tenant_id=tenant.id, type=JobType.TRAIN, queue="train", summary="late", spec={}, inputs={}, event_seq=1,
            state=JobState.QUEUED, max_attempts=3, start_deadline=func.clock_timestamp(),
        )  # fmt: skip
        session.add(job)
        session.flush()
        return job.id
