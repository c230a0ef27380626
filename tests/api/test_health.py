"""Health, readiness and metrics, also while something is away."""

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from api.routes import meta
from noisemill.local.ports import free_port
from shared.jobs import workers
from tests.api.conftest import MakeOwner
from tests.api.support import Owner, claim, make_settings, serving, succeed, train_request
from tests.shared.failover import read_only

DEAF = "redis://127.0.0.1:9/0"
NOWHERE = "postgresql://u:secret-password@127.0.0.1:9/none"


@pytest.fixture(scope="module")
def without_anything(module_s3: Any) -> Iterator[str]:
    module_s3 = type(module_s3)(**{**vars(module_s3), "endpoint": f"http://127.0.0.1:{free_port()}"})
    with serving(make_settings(NOWHERE, DEAF, module_s3)) as url:
        yield url


def test_everything_is_ready(stranger: httpx.Client) -> None:
    answer = stranger.get("/readyz")

    assert (stranger.get("/healthz").status_code, answer.status_code) == (200, 200)
    assert answer.json() == {"status": "ok", "database": "ok", "broker": "ok", "storage": "ok"}


def test_without_a_database_the_api_is_alive_and_not_ready(without_anything: str) -> None:
    answer = httpx.get(f"{without_anything}/readyz", timeout=10)

    assert httpx.get(f"{without_anything}/healthz").status_code == 200
    assert answer.status_code == 503
    assert answer.json() == {"status": "away", "database": "away", "broker": "away", "storage": "away"}


def test_without_a_database_requests_are_told_to_come_again(without_anything: str) -> None:
    answer = httpx.get(f"{without_anything}/v1/jobs", headers={"Authorization": "Bearer k"}, timeout=10)

    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert "secret-password" not in answer.text and "psycopg" not in answer.text


def test_an_exhausted_pool_is_told_in_the_same_way(
    module_database: str, valkey: str, module_s3: Any, make_owner: MakeOwner, engine: Engine
) -> None:
    settings = make_settings(module_database, valkey, module_s3)
    short = settings.database.model_copy(update={"pool_size": 1, "pool_timeout": settings.jobs.lease / 100})
    with serving(settings.model_copy(update={"database": short})) as url, engine.begin() as connection:
        owner = make_owner(url=url)
        body = train_request(owner.add_dataset())
        connection.execute(text("LOCK TABLE jobs"))
        with httpx.Client(base_url=url, headers=owner.client.headers) as other:
            with pytest.raises(httpx.ReadTimeout):  # holds the only connection from now on
                owner.client.post("/v1/jobs", json=body, timeout=0.5)
            answer = other.get("/v1/jobs")

    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")


def test_while_nobody_may_write_those_who_would_are_told_to_come_again(
    database: str, valkey: str, module_s3: Any, make_owner: MakeOwner
) -> None:
    engine = create_engine(database)
    with serving(make_settings(database, valkey, module_s3)) as url:
        owner = make_owner(url=url, engine=engine)
        body = train_request(owner.add_dataset())
        engine.dispose()
        with read_only(database):
            refused = [owner.client.post("/v1/jobs", json=body) for _ in range(3)]
        accepted = owner.client.post("/v1/jobs", json=body)

    assert [(one.status_code, one.json()["code"]) for one in refused] == [(503, "unavailable")] * 3
    assert all(int(one.headers["Retry-After"]) >= 1 for one in refused)
    assert accepted.status_code == 202


def metric(client: httpx.Client, line: str) -> float:
    found = [one for one in client.get("/metrics").text.splitlines() if one.startswith(line + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def test_metrics_count_what_sql_knows(
    owner: Owner, engine: Engine, stranger: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api import metrics

    monkeypatch.setattr(metrics, "CACHE_SECONDS", 0.0)
    lines = [
        'noisemill_queue_jobs{queue="train",state="queued"}',
        'noisemill_queue_jobs{queue="train",state="running"}',
        'noisemill_jobs_finished_total{state="succeeded",type="train"}',
        'noisemill_attempts_total{outcome="succeeded"}',
    ]
    before = [metric(stranger, line) for line in lines]
    jobs = [owner.train()["id"] for _ in range(3)]
    claim(engine, jobs[0])
    succeed(engine, claim(engine, jobs[1]))

    assert [metric(stranger, line) - was for line, was in zip(lines, before, strict=True)] == [1, 1, 1, 1]
    assert metric(stranger, 'noisemill_queue_oldest_seconds{queue="train"}') > 0
    assert metric(stranger, 'noisemill_queue_jobs{queue="generate",state="queued"}') == 0


def test_metrics_tell_how_often_each_worker_had_the_model_already(
    engine: Engine, stranger: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api import metrics

    monkeypatch.setattr(metrics, "CACHE_SECONDS", 0.0)
    with Session(engine) as session, session.begin():
        says: dict[str, Any] = {"host": "here", "pid": 1, "state": "idle", "queues": [], "device": "cpu"}
        workers.sign_in(session, name="warm", job_id=None, **says)
        workers.count_models(session, "warm", hits=2, misses=1)

    assert metric(stranger, 'noisemill_model_hits_total{worker="warm"}') == 2
    assert metric(stranger, 'noisemill_model_misses_total{worker="warm"}') == 1


def test_requests_are_counted_by_route_not_by_id(owner: Owner, stranger: httpx.Client) -> None:
    line = 'noisemill_http_request_seconds_count{method="GET",route="/v1/jobs/{job_id}",status="200"}'
    before = metric(stranger, line)

    owner.client.get(owner.train()["urls"]["self"])

    assert metric(stranger, line) == before + 1


def test_a_bug_of_ours_tells_the_client_nothing_and_the_log_everything(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(meta, "_families", fail)
    with caplog.at_level(logging.ERROR):
        answer = owner.client.get("/v1/families", headers={"X-Request-Id": "abc"})

    assert (answer.status_code, answer.json()["code"], answer.json()["request_id"]) == (500, "internal", "abc")
    assert "secret" not in answer.text and "RuntimeError" not in answer.text
    assert "request_id=abc" in caplog.text and "a secret detail" in caplog.text
