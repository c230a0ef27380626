"""While the broker is away jobs are accepted all the same, and their bells are published later."""

import time
from typing import Any

import httpx
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import Engine, text

from shared.settings import Settings
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, make_settings, serving, train_request
from tests.conftest import WaitUntil


@pytest.fixture(scope="module")
def settings(module_database: str, module_s3: Any) -> Settings:
    """Of a server whose broker is away. No other server works on its database."""
    return make_settings(module_database, "redis://127.0.0.1:9/0", module_s3)


def test_without_a_broker_the_api_is_degraded_and_ready(stranger: httpx.Client) -> None:
    answer = stranger.get("/readyz")

    assert (answer.status_code, answer.json()["status"], answer.json()["broker"]) == (200, "degraded", "away")


def test_jobs_are_accepted_at_once_while_the_broker_is_away(owner: Owner, engine: Engine) -> None:
    dataset = owner.add_dataset()

    times = []
    for _ in range(20):
        began = time.monotonic()
        assert owner.client.post("/v1/jobs", json=train_request(dataset)).status_code == 202
        times.append(time.monotonic() - began)

    assert sorted(times)[10] < 0.25
    with engine.connect() as connection:
        unsent = "SELECT count(*) FROM outbox JOIN jobs ON jobs.id = job_id WHERE sent_at IS NULL AND tenant_id = :id"
        assert connection.execute(text(unsent), {"id": owner.id}).scalar_one() == 20


def test_bells_are_published_once_the_broker_is_back(
    settings: Settings, owner: Owner, valkey: str, wait_until: WaitUntil
) -> None:
    job_id = owner.train()["id"]
    broker = settings.broker.model_copy(update={"url": SecretStr(valkey)})

    with serving(settings.model_copy(update={"broker": broker})):
        wait_until(lambda: job_id in messages(settings, valkey), timeout=15)


def test_a_submission_rings_within_a_moment(
    settings: Settings, make_owner: MakeOwner, valkey: str, wait_until: WaitUntil
) -> None:
    broker = settings.broker.model_copy(update={"url": SecretStr(valkey), "prefix": "moment:"})
    settings = settings.model_copy(update={"broker": broker})
    with serving(settings) as url:
        job_id = make_owner(url=url).train()["id"]

        wait_until(lambda: job_id in messages(settings, valkey), timeout=10)


def messages(settings: Settings, valkey: str) -> str:
    with redis.Redis.from_url(valkey) as client:
        return str(client.lrange(f"{settings.broker.prefix}train", 0, -1))
