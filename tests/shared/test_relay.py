"""The outbox and its relay: a bell leaves the outbox when the broker has it, and not before."""

import json
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session
from sqlmodel import col

from shared import database
from shared.database import make_engine
from shared.ids import public, uuid7
from shared.jobs.rows import Bell
from shared.jobs.state import JobState, JobType
from shared.queue import make_celery
from shared.relay import BROKER_AWAY, Bells, Relay
from shared.settings import BrokerSettings, DatabaseSettings
from tests.shared.test_moves import make_job


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = make_engine(DatabaseSettings(url=SecretStr(database)), "test")
    yield engine
    engine.dispose()


def settings_of(url: str) -> BrokerSettings:
    return BrokerSettings(url=SecretStr(url), prefix="relay:")


@pytest.fixture
def bells(broker: str) -> Iterator[Bells]:
    bells = Bells(settings_of(broker))
    yield bells
    bells.close()


def ring(engine: Engine, state: JobState = JobState.QUEUED) -> None:
    with Session(engine) as session, session.begin():
        session.add(Bell(job_id=make_job(session, state)))


def unsent(engine: Engine) -> int:
    with Session(engine) as session:
        return len(session.scalars(select(Bell).where(col(Bell.sent_at).is_(None))).all())


def messages(broker: str) -> int:
    with redis.Redis.from_url(broker) as client:
        return int(client.llen("relay:generate"))  # pyright: ignore


def test_a_bell_is_published_once(engine: Engine, bells: Bells, broker: str) -> None:
    ring(engine)

    assert [Relay(engine, bells).run_once() for _ in range(2)] == [1, 0]
    assert messages(broker) == 1


def test_a_bell_that_the_broker_did_not_take_stays_in_the_outbox(engine: Engine) -> None:
    ring(engine)

    with pytest.raises(BROKER_AWAY):
        Relay(engine, Bells(settings_of("redis://127.0.0.1:9/0"))).run_once()

    assert unsent(engine) == 1


def test_a_bell_that_the_broker_was_slow_to_take_is_rung_once(engine: Engine, broker: str) -> None:
    class SlowBells(Bells):
        def ring(self, jobs: Sequence[Any]) -> None:
            super().ring(jobs)
            time.sleep(database._LONGEST_REST.total_seconds() + 1)

    ring(engine)
    relay = Relay(engine, SlowBells(settings_of(broker)))

    assert [relay.run_once() for _ in range(2)] == [1, 0]
    assert messages(broker) == 1


def test_nothing_is_rung_for_a_job_that_does_not_wait_any_more(engine: Engine, bells: Bells, broker: str) -> None:
    ring(engine, JobState.CANCELED)

    Relay(engine, bells).run_once()

    assert (unsent(engine), messages(broker)) == (0, 0)


def test_bells_that_another_relay_holds_are_left_to_it(engine: Engine, bells: Bells, broker: str) -> None:
    ring(engine)

    with Session(engine) as other, other.begin():
        other.execute(select(Bell).with_for_update())
        assert Relay(engine, bells).run_once() == 0

    assert (unsent(engine), messages(broker)) == (1, 0)


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """What two messages for the same job have in common; Celery repeats options of its own in the properties."""
    headers = {name: value for name, value in message["headers"].items() if name not in ("id", "root_id", "origin")}
    own = ("correlation_id", "delivery_tag", "reply_to", *headers)
    properties = {name: value for name, value in message["properties"].items() if name not in own}
    return message | {"headers": headers, "properties": properties}


def test_a_message_is_the_one_that_celery_would_send(broker: str, bells: Bells) -> None:
    job = SimpleNamespace(id=uuid7(), type=JobType.GENERATE, queue="generate", summary="generate digits@1")
    name = public("job", job.id)
    app = make_celery(settings_of(broker))
    how: Any = {"argsrepr": f"({name}, {job.summary})", "kwargsrepr": "{}", "ignore_result": True}
    app.send_task("generate", args=[name], queue="generate", exchange="", **how)
    app.close()

    bells.ring([job])

    with redis.Redis.from_url(broker) as client:
        ours, celerys = (json.loads(one) for one in client.lrange("relay:generate", 0, 1))  # pyright: ignore
    assert without_ids(ours) == without_ids(celerys)
    assert ours["headers"].keys() == celerys["headers"].keys()
    assert ours["properties"].keys() <= celerys["properties"].keys()
