"""The outbox and its relay: a bell leaves the outbox when the broker has it, and not before."""

from collections.abc import Iterator

import pytest
import redis
from celery import Celery
from pydantic import SecretStr
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared.database import make_engine
from shared.jobs.rows import Bell
from shared.jobs.state import JobState
from shared.queue import BROKER_AWAY, Relay, make_celery
from shared.settings import BrokerSettings, DatabaseSettings
from tests.shared.test_moves import make_job


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = make_engine(DatabaseSettings(url=SecretStr(database)), "test")
    yield engine
    engine.dispose()


def celery_of(url: str) -> Celery:
    return make_celery(BrokerSettings(url=SecretStr(url), prefix="relay:"))


@pytest.fixture
def app(broker: str) -> Iterator[Celery]:
    app = celery_of(broker)
    yield app
    app.close()


def ring(engine: Engine, state: JobState = JobState.QUEUED) -> None:
    with Session(engine) as session, session.begin():
        session.add(Bell(job_id=make_job(session, state)))


def unsent(engine: Engine) -> int:
    with Session(engine) as session:
        return len(session.scalars(select(Bell).where(col(Bell.sent_at).is_(None))).all())


def messages(broker: str) -> int:
    with redis.Redis.from_url(broker) as client:
        return int(client.llen("relay:generate"))  # pyright: ignore


def test_a_bell_is_published_once(engine: Engine, app: Celery, broker: str) -> None:
    ring(engine)

    assert [Relay(engine, app).run_once() for _ in range(2)] == [1, 0]
    assert messages(broker) == 1


def test_a_bell_that_the_broker_did_not_take_stays_in_the_outbox(engine: Engine) -> None:
    ring(engine)
    app = celery_of("redis://127.0.0.1:9/0")

    with pytest.raises(BROKER_AWAY):
        Relay(engine, app).run_once()
    app.close()

    assert unsent(engine) == 1


def test_nothing_is_rung_for_a_job_that_does_not_wait_any_more(engine: Engine, app: Celery, broker: str) -> None:
    ring(engine, JobState.CANCELED)

    Relay(engine, app).run_once()

    assert (unsent(engine), messages(broker)) == (0, 0)


def test_bells_that_another_relay_holds_are_left_to_it(engine: Engine, app: Celery, broker: str) -> None:
    ring(engine)

    with Session(engine) as other, other.begin():
        other.execute(select(Bell).with_for_update())
        assert Relay(engine, app).run_once() == 0

    assert (unsent(engine), messages(broker)) == (1, 0)
