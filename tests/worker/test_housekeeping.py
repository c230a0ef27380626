"""The ticker: it goes on while the broker hangs, hands over at once, and tells a new process from the last one."""

import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.orm import Session

from shared.errors import NanLoss
from shared.events import channel, connect
from shared.ids import uuid7
from shared.jobs import attempts, claims, needs, upkeep
from shared.jobs.need_rows import Need
from shared.jobs.rows import Bell, NamedLease, Worker
from shared.jobs.state import JobState
from shared.settings import BrokerSettings, JobSettings, Settings
from tests.conftest import WaitUntil
from tests.worker.conftest import Workplace

HOUR = timedelta(hours=1)
TERMS = claims.Terms.of(JobSettings())


@pytest.fixture
def deaf(settings: Settings) -> Iterator[Settings]:
    """A broker that takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = SecretStr(f"redis://127.0.0.1:{server.getsockname()[1]}/0")
        yield settings.model_copy(update={"broker": BrokerSettings(url=url)})


def test_a_round_does_not_wait_for_a_broker_that_hangs(workplace: Workplace, deaf: Settings) -> None:
    workplace.settings = deaf
    ticker, lost = workplace.ticker(workplace.supervisor()), workplace.job()
    with workplace.engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET state = 'running', fence = 1, lease_until = now() - interval '1 s'"))
    workplace.job()  # its bell waits to be published

    began = time.monotonic()
    ticker.tick()

    assert workplace.state(lost) == JobState.QUEUED
    assert time.monotonic() - began < 3  # the broker's own time-out is 5 s


@pytest.mark.parametrize("is_new", [False, True])
def test_after_an_outage_longer_than_the_lease_a_worker_that_lives_keeps_its_job(
    workplace: Workplace, wait_until, *, is_new: bool
) -> None:
    """Though the first to come back is somebody else, who may even have been started meanwhile."""
    workplace.settings = workplace.settings.model_copy(update={"jobs": JobSettings(lease=timedelta(seconds=3))})
    other = workplace.supervisor("w2", tick=timedelta(seconds=0.1))
    ticker, job_id = workplace.ticker(other), workplace.job()
    with Session(workplace.engine) as session, session.begin():
        terms = claims.Terms.of(workplace.settings.jobs)
        (claim,) = claims.claim(session, worker="w1", queues=["generate"], terms=terms)
    ticker.tick()
    wait_until(lambda: has_run_out(workplace))  # nobody asks SQL anything meanwhile

    ticker = workplace.ticker(other) if is_new else ticker
    ticker.tick()
    ticker.tick()
    with Session(workplace.engine) as session, session.begin():
        attempts.heartbeat(session, claim.job_id, claim.fence, lease=timedelta(seconds=0.1))

    wait_until(lambda: ticker.tick() or workplace.state(job_id) == JobState.QUEUED, timeout=30)
    assert workplace.get(job_id).losses == 1


def has_run_out(workplace: Workplace) -> bool:
    with workplace.engine.connect() as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM jobs WHERE lease_until < clock_timestamp()")))


def test_a_clock_that_is_put_forward_ends_no_attempt_whose_worker_lives(workplace: Workplace) -> None:
    ticker, job_id = workplace.ticker(workplace.supervisor("w2")), workplace.job()
    with Session(workplace.engine) as session, session.begin():
        claims.claim(session, worker="w1", queues=["generate"], terms=claims.Terms.of(workplace.settings.jobs))
    ticker.tick()

    with workplace.engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET lease_until = lease_until - interval '1 h'"))
        connection.execute(text("UPDATE named_leases SET until = until - interval '1 h'"))
    ticker.tick()

    assert workplace.state(job_id) == JobState.RUNNING


def test_a_heartbeat_does_not_wait_for_a_broker_that_hangs(workplace: Workplace, deaf: Settings) -> None:
    workplace.settings = deaf
    supervisor, job_id = workplace.supervisor(), workplace.job()

    began = time.monotonic()
    for _ in range(3):
        supervisor.ring(job_id)

    assert time.monotonic() - began < 1


def test_a_drained_worker_leaves_the_housekeeping_to_the_next(workplace: Workplace) -> None:
    first, second = workplace.supervisor("w1"), workplace.supervisor("w2")
    leaving, staying = workplace.ticker(first), workplace.ticker(second)
    leaving.tick()
    staying.tick()

    first.drain()
    leaving.tick()
    staying.tick()

    assert {lease.name: lease.holder for lease in workplace.rows(NamedLease)}[upkeep.LEASE] == "w2"
    assert {worker.name: worker.state for worker in workplace.rows(Worker)} == {"w1": "draining", "w2": "idle"}


def test_a_worker_tells_how_often_models_were_loaded_already(workplace: Workplace) -> None:
    for was_loaded in (False, True, True):
        workplace.job(["model", was_loaded])
    supervisor = workplace.supervisor()
    while supervisor.run_next():
        pass

    workplace.ticker(supervisor).tick()

    (worker,) = workplace.rows(Worker)
    assert (worker.model_hits, worker.model_misses) == (2, 1)


def test_a_worker_that_starts_again_under_its_name_started_anew(workplace: Workplace) -> None:
    ticker = workplace.ticker(workplace.supervisor())
    ticker.tick()
    (first,) = workplace.rows(Worker)

    ticker.tick()
    (same,) = workplace.rows(Worker)
    workplace.ticker(workplace.supervisor()).tick()
    (again,) = workplace.rows(Worker)

    assert first.started_at == same.started_at
    assert same.started_at and again.started_at and same.started_at < again.started_at


def waiting_for(workplace: Workplace, job_id: UUID) -> UUID:
    waiting = workplace.job()
    with Session(workplace.engine) as session, session.begin():
        session.add(Need(job_id=waiting, field="model", needs_job_id=job_id))
        session.execute(text("UPDATE jobs SET queued_at = NULL WHERE id = :id"), {"id": waiting})
    return waiting


def test_a_worker_tells_of_who_ended_with_its_job(workplace: Workplace) -> None:
    supervisor, job_id = workplace.supervisor(), workplace.job()
    waiting = waiting_for(workplace, job_id)
    with connect(workplace.settings.broker).pubsub() as heard:
        heard.subscribe(channel(workplace.settings.broker, waiting))
        assert heard.get_message(timeout=10)["type"] == "subscribe"
        (claim,) = supervisor.transact(lambda s: claims.claim(s, worker="w1", queues=["generate"], terms=TERMS))

        supervisor.transact(
            lambda s: attempts.fail(s, claim.job_id, claim.fence, NanLoss("no number"), backoff=timedelta(0))
        )

        assert workplace.state(waiting) == JobState.FAILED
        assert heard.get_message(timeout=10)["type"] == "message"


def test_a_worker_rings_at_once_for_whom_it_released(workplace: Workplace) -> None:
    """Though it does not keep the house."""
    supervisor = workplace.supervisor(tick=timedelta(seconds=0.1))
    ticker = workplace.ticker(supervisor)
    workplace.job()
    ticker.publish()
    assert [bell.sent_at for bell in workplace.rows(Bell)] == [None]

    supervisor.transact(lambda s: needs.news(s).append(uuid7()))
    ticker.publish()

    assert None not in [bell.sent_at for bell in workplace.rows(Bell)]


def test_a_worker_rings_at_once_for_what_it_hands_back(workplace: Workplace, wait_until: WaitUntil) -> None:
    supervisor = workplace.supervisor(tick=timedelta(seconds=0.1))
    ticker = workplace.ticker(supervisor)
    job_id = workplace.job(["steps", 10_000, 0.01])
    running = workplace.background(supervisor.run_next)
    wait_until(lambda: workplace.get(job_id).step > 0)

    supervisor.drain()
    running.join(20)
    ticker.publish()

    bells = [bell.sent_at for bell in workplace.rows(Bell)]
    assert (len(bells), None in bells) == (2, False)


def test_what_is_released_while_the_publisher_stops_waiting_is_rung_for_next(workplace: Workplace) -> None:
    supervisor = workplace.supervisor(tick=timedelta(seconds=0.1))
    ticker, wait = workplace.ticker(supervisor), supervisor.has_queued.wait
    workplace.job()

    def in_vain(seconds: float | None = None) -> bool:
        has_queued = wait(seconds)
        supervisor.has_queued.set()
        return has_queued

    supervisor.has_queued.wait = in_vain  # type: ignore[method-assign]
    ticker.publish()
    assert [bell.sent_at for bell in workplace.rows(Bell)] == [None]
    ticker.publish()

    assert None not in [bell.sent_at for bell in workplace.rows(Bell)]
